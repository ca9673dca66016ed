"""The token ledger with what packing adds: for data_report.json, and for the opening lines."""

from typing import Any

from qloop.data.corpus import Corpus
from qloop.data.packing import BlockIndex


def describe_corpus(
    corpus: Corpus, index: BlockIndex, held_out: BlockIndex | None
) -> dict[str, Any]:
    """Completes the ledger with what packing adds; the content of data_report.json."""
    report = dict(corpus.report)
    for side, blocks in (("train", index), ("held_out", held_out)):
        if blocks:
            report[side] = {
                **report[side],
                "blocks": len(blocks),
                "block_length": blocks.block_length,
                "padding": blocks.padding_tokens,
                "padding_share": blocks.padding_tokens / (len(blocks) * blocks.block_length),
            }
    return {"fingerprint": corpus.fingerprint, **report}


def describe_ledger(report: dict[str, Any], was_cached: bool) -> list[str]:
    """Says in the opening lines what became of the corpus."""
    lines = []
    for side in ("train", "held_out"):
        ledger = report[side]
        if ledger and ledger["documents"]:
            lines.append(
                f"{side.replace('_', ' '):10} {ledger['documents']:,} documents, "
                f"{ledger['bytes']:,} bytes, {ledger['tokens']:,} tokens, {ledger['targets']:,} "
                f"targets, {ledger['blocks']:,} blocks, {ledger['padding_share']:.2%} padding"
            )
            left_out = [
                f"{ledger[name]:,} {name.replace('_', ' ')}"
                for name in ("refused", "duplicates", "also_held_out")
                if ledger[name]
            ]
            if left_out:
                lines.append(f"           left out: {', '.join(left_out)}; see data_report.json")
    how = "opened from the cache" if was_cached else "tokenised now"
    lines.append(f"           {how}; fingerprint {report['fingerprint'][:12]}")
    return lines
