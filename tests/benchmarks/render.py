"""Writes tests/benchmarks/RESULTS.md from the JSON files next to it; measures nothing.

python tests/benchmarks/render.py

Each benchmark stores its figures with `save`, which renders the whole file again. A benchmark
without a JSON file has no section; the arithmetic of many GPUs is computed here.
"""

import json
from collections.abc import Callable
from pathlib import Path

import arithmetic

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"

HEAD = """\
# Speed, memory and scale

Written by the scripts of this folder from their JSON files; do not edit. `python
tests/benchmarks/render.py` writes it again without measuring.
"""


def save(name: str, results: dict) -> None:
    """Stores a benchmark's figures next to it and renders RESULTS.md."""
    (HERE / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    RESULTS.write_text(render())


def render() -> str:
    """Returns the text of RESULTS.md."""
    parts = [HEAD]
    for name, (title, text, format_section) in SECTIONS.items():
        file = HERE / f"{name}.json"
        if file.exists():
            parts.append(f"## {title}\n\n{text}\n{format_section(json.loads(file.read_text()))}")
    parts.append(f"## {ARITHMETIC[0]}\n\n{ARITHMETIC[1]}\n{arithmetic.format_table()}")
    return "\n".join(parts)


def format_table(columns: str, rows: list[list[str]]) -> str:
    """Returns a table in Markdown; `columns` is its first line without the outer bars."""
    lines = [f"| {columns} |", "|" + "---|" * (columns.count("|") + 1)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def format_versions(results: dict) -> str:
    return ", ".join(f"{name} {number}" for name, number in results["versions"].items())


def format_gpu(results: dict) -> str:
    def key_of(row: dict) -> tuple:
        return row["size"], row["method"], row["length"]

    done = [row for row in results["rows"] if "error" not in row]
    ours: dict[tuple, dict] = {}
    for row in done:
        if row["contestant"] == "qloop":
            ours.setdefault(key_of(row), row)
    rows = []
    for row in results["rows"]:
        if "error" in row:
            rows.append([row["run"], row["contestant"], row["error"], "", "", "", ""])
            continue
        mine = ours.get(key_of(row)) if row["contestant"] != "qloop" else None
        planned, peak = row["planned_bytes"], row["peak_bytes"]
        rows.append([
            row["run"],
            row["contestant"],
            f"{row['targets_per_second']:,.0f}",
            f"{mine['targets_per_second'] / row['targets_per_second']:.2f}" if mine else "",
            f"{row['flops_per_second'] / row['matmul_flops']:.0%}",
            f"{peak / 1e9:.1f} GB",
            f"{planned / 1e9:.1f} GB ({planned / peak - 1:+.0%})" if planned else "",
        ])  # fmt: skip
    products = [row["matmul_flops"] for row in done]
    product = f" A matrix product reaches {max(products) / 1e12:,.0f} TFLOP/s." if products else ""
    columns = "run | by | targets/s | qloop, times as fast | MFU | peak memory | planned"
    return (
        f"{results['device']}, {results['date']}, {results['corpus']}; {format_versions(results)}."
        f"{product}\n\n{format_table(columns, rows)}"
    )


def format_peers(results: dict) -> str:
    ours = [row for row in results["rows"] if row["name"].startswith("qloop")]
    rows = []
    for row in results["rows"]:
        rate, (low, high) = row["targets_per_second"], row["range"]
        rows.append([
            row["name"],
            f"{rate:,.0f} ({low:,.0f} to {high:,.0f})",
            *(f"{mine['targets_per_second'] / rate:.2f}" for mine in ours),
            f"{row['use']:.0%}",
            f"{row['peak_bytes'] / 1e6:,.0f} MB",
        ])  # fmt: skip
    ratios = " | ".join(f"{row['name']}, times as fast" for row in ours)
    columns = f"contestant | targets/s | {ratios} | MFU | peak memory"
    return (
        f"{results['setup']}; {results['machine']}, {results['date']}; {format_versions(results)}. "
        f"A matrix product reaches {results['rows'][0]['matmul_flops'] / 1e9:,.0f} GFLOP/s.\n\n"
        f"{format_table(columns, rows)}\n"
        f"Packing alone: {results['packing'] / 1e6:,.0f} million tokens/s. From the demo's command "
        f"to its first step, with the corpus already tokenised: {results['start']:.1f} s.\n"
    )


def format_losses(results: dict) -> str:
    first = {}
    rows = []
    for row in results["rows"]:
        if "error" in row:
            rows.append([row["head"], row["loss"], row["error"], "", ""])
            continue
        fastest = first.setdefault(row["head"], row["milliseconds"])
        memory = row["memory_gb"]
        rows.append([
            row["head"],
            row["loss"],
            f"{row['milliseconds']:.0f}",
            f"{row['milliseconds'] / fastest:.2f}",
            "" if memory is None else f"{round(memory, 2):g} GB",
        ])  # fmt: skip
    sizes = ", ".join(f"{count:,} {name}" for name, count in results["setup"].items())
    remarks = "".join(f"\n{remark}\n" for remark in results.get("remarks", ()))
    columns = "head | loss | ms | relative to the first | memory"
    return f"{results['device']}; {sizes}.\n\n{format_table(columns, rows)}{remarks}"


def format_saving(results: dict) -> str:
    rows = [
        [
            row["way"],
            f"{row['blocked_seconds']:.3f} s",
            f"{row['commit_seconds']:.3f} s" if row["commit_seconds"] > 1e-3 else "included",
            f"{row['share_of_step']:.0%}",
            f"{row['next_step_ratio']:.2f}",
        ]
        for row in results["rows"]
    ]
    columns = (
        "save | blocks the loop | commit | share of a step | the next step, relative to others"
    )
    return f"{results['setup']}; {results['machine']}.\n\n{format_table(columns, rows)}"


def format_scale(results: dict) -> str:
    packing = [
        [
            f"{row['packing']}, {row['blocks']:,} blocks",
            f"{row['seconds']:.1f} s",
            f"{row['peak_gb']:.2f} GB",
            f"{row['reopened_seconds']:.2f} s",
            f"{row['from_disk_seconds']:.2f} s",
            f"{row['private_gb']:.2f} GB",
        ]
        for row in results["packing"]
    ]
    training = [
        [
            f"{row['gigabytes']:g} GB",
            f"{row['documents']:,}",
            f"{row['blocks']:,}",
            f"{row['open_seconds']:.2f} s",
            f"{row['private_before_gb']:.3f} GB",
            f"{row['private_gb']:.3f} GB",
            f"{row['mapped_gb']:.2f} GB",
            f"{row['positions_per_second']:,.0f}",
        ]
        for row in results["training"]
    ]
    packed = format_table(
        "packing | packed in | peak memory | reopened in | reopened from disk | private memory",
        packing,
    )
    trained = format_table(
        "tokens on disk | documents | blocks | opened in | private before | private, peak | mapped "
        "| positions/s",
        training,
    )
    return (
        f"{results['machine']}. {results['documents']:,} documents, "
        f"{results['tokens'] / 1e9:.2f} billion tokens:\n\n{packed}\n"
        f"A process that reads {results['micro_batches']:,} micro-batches of "
        f"{results['block_length']:,} tokens, spread over the corpus. Private memory cannot be "
        "given back (\"before\" is Python and torch without a corpus); the system drops mapped "
        "pages when it needs the room. The order of an epoch grows with the corpus, 8 bytes a "
        f"block, and two orders are held from the second epoch on.\n\n{trained}\n"
        "While a corpus is tokenised for the first time, the main process also holds a hash of "
        f"each document to find exact copies: {results['hash_bytes_per_document']:.0f} bytes "
        "each.\n"
    )  # fmt: skip


def format_real_q(results: dict) -> str:
    names = ("read", "documents", "refused", "duplicates", "bytes", "tokens", "targets",
             "first_tokens")  # fmt: skip
    columns = f"split | {' | '.join(names)}"
    ledgers = [
        [side, *(f"{ledger[name]:,}" for name in names)]
        for side, ledger in results["ledger"].items()
    ]
    blocks = [results["ledger"]["train"], *results.get("other_lengths", ())]
    packed = "".join(
        f"The training documents fill {row['blocks']} blocks of {row['block_length']:,} tokens "
        f"with {row['padding_share']:.2%} padding.\n"
        for row in blocks
    )
    rows = [
        [
            row["method"],
            f"{row['first_bits_per_byte']:.4f}",
            f"{row['last_bits_per_byte']:.4f}",
            f"{row['tokens_per_second']:,.0f}",
            "losses and tensors equal" if row["same_after_kill"] else "DIFFERENT",
        ]
        for row in results["rows"]
    ]
    trained = format_table(
        f"method | held-out bits per byte, before | after {results['steps']} steps | tokens/s, "
        "median | killed and resumed",
        rows,
    )
    return (
        f"{results['corpus']}; {results['machine']}.\n\n{format_table(columns, ledgers)}\n"
        f"{packed}\n{trained}"
    )


SECTIONS: dict[str, tuple[str, str, Callable[[dict], str]]] = {
    "gpu": (
        "One large GPU",
        """\
`bash tests/benchmarks/gpu.sh CORPUS` (and `--only peers`): bf16, random weights at Qwen2.5's sizes,
documents packed from a real corpus. A run is size and method, micro-batch of blocks x tokens; four
micro-batches a step (eight for TRL's reference); compiled, as a run of real length is. Two steps
are timed after one. MFU is relative to a matrix product measured in the same run. The plan was made
before the run. "TRL as the reference has it" is TRL's trainer with truncation, batch 1 and gradient
checkpointing. "TRL at its best" packs (`bfd_split`), recomputes nothing and uses Liger's kernels
(0.8.5), but neither `torch.compile` nor a flash-attn wheel; qloop does not use that wheel either.
TRL is compared with qloop's first run of the same size, method and length.
""",
        format_gpu,
    ),
    "peers": (
        "Two CPU cores",
        """\
`python tests/benchmarks/peers.py CORPUS`: the same documents for all, three runs each in
alternation, medians and extremes. The reference is TRL's trainer with truncation, batch 1 and
gradient checkpointing; at its best it packs (`bfd_split`) and recomputes nothing.
""",
        format_peers,
    ),
    "losses": (
        "The loss of a large vocabulary",
        """\
`python tests/benchmarks/losses.py`, on a GPU: forward and backward of one micro-batch's head.
""",
        format_losses,
    ),
    "saving": (
        "Blocking time of a save",
        """\
`python tests/benchmarks/saving.py`. A background save blocks the loop for the copy, and after the
write for the commit: manifest, sync and rename. Old checkpoints are deleted by the next write.
""",
        format_saving,
    ),
    "scale": (
        "Size of the corpus",
        """\
`python tests/benchmarks/scale.py`: synthetic token files. One process reads, tokenises and packs
the corpus, all map it. An index is used only if the hashes of its bytes and of its store are those
it was written with; otherwise it is packed again. Several processes that need it at once wait for
the one that packs.
""",
        format_scale,
    ),
    "real_q": (
        "Real Q files, killed and resumed",
        """\
`bash tests/kill_and_resume.sh CORPUS [STEPS [MAX_SEQ_LENGTH]]`: the demo's 5 M-parameter model from
random weights, then adapters on the result. Each method ran a second time, was killed with
`kill -9` and started again.
""",
        format_real_q,
    ),
}  # fmt: skip

ARITHMETIC = (
    "Many GPUs, on paper",
    """\
Computed, not measured: `python tests/benchmarks/arithmetic.py`; its docstring states every
assumption. A step is 512 micro-batches of 8,192 tokens over all ranks, 8 GPUs to a machine. `share`
is the part of the time that communication would take at 450 GB/s within a machine and 50 GB/s
between machines if nothing overlapped: an upper limit.
""",
)


if __name__ == "__main__":
    RESULTS.write_text(render())
