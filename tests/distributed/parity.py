"""The same steps by every engine: losses, norms, rates and held-out figures beside one process."""

from typing import NamedTuple

from launching import ONE, Run, Setting, largest_difference, write_uneven_corpus
from workspace import Workspace

STEPS = 20
LIMIT = 1e-5
MAX_GRAD_NORM = 0.5  # clips most steps
CASES = {
    "full": ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3"),
    "lora": ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3"),
    "qlora": ("DDP", "FSDP2"),
}
OFFLOADED = ("ZeRO-2 offload", "ZeRO-3 offload")  # DeepSpeed compiles its CPU AdamW for these
FIGURES = ("loss", "grad_norm", "learning_rate")
HELD_OUT = ("loss", "bits_per_byte", "token_accuracy")


class Parity(NamedTuple):
    """The largest differences between an engine and one process, over all steps."""

    method: str
    engine: str
    differences: dict[str, float]
    clipped_steps: int
    targets: tuple[int, int]
    """Fewest and most targets in a step: they are uneven."""

    @property
    def held(self) -> bool:
        return self.clipped_steps > 0 and max(self.differences.values()) <= LIMIT


class References:
    """One process's run of each method, made once."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._runs: dict[str, Run] = {}
        self._corpus = write_uneven_corpus(workspace)

    def make(self, name: str, method: str) -> Run:
        return Run(
            self.workspace, name, method,
            train_file=self._corpus, max_steps=STEPS, max_grad_norm=MAX_GRAD_NORM, eval_steps=10,
            num_samples=1, sample_tokens=8,
        )  # fmt: skip

    def get(self, method: str) -> Run:
        if method not in self._runs:
            self._runs[method] = self.make(f"parity-{method}-one", method)
            self._runs[method].start(ONE)
        return self._runs[method]


def compare(references: References, method: str, engine: str) -> Parity:
    """Runs a method under an engine on two processes, beside one."""
    reference = references.get(method)
    run = references.make(f"parity-{method}-{engine}".replace(" ", "-"), method)
    # As people train; the one process does without it, so that its hooks are compared too.
    run.start(Setting(engine, 2), gradient_checkpointing="true")
    assert (run.folder / "results/samples.md").exists(), "every rank takes part in sampling"
    ours, theirs = run.read_metrics(), reference.read_metrics()
    assert len(theirs) == STEPS
    held_out = run.read_held_out(), reference.read_held_out()
    differences = {key: largest_difference(ours, theirs, key) for key in FIGURES}
    for key in HELD_OUT:
        differences[f"held_out_{key}"] = largest_difference(*held_out, key)
    assert [r["target_tokens"] for r in ours] == [r["target_tokens"] for r in theirs]
    targets = [record["target_tokens"] for record in ours]
    clipped = sum(record["grad_norm"] > MAX_GRAD_NORM for record in ours)
    return Parity(method, engine, differences, clipped, (min(targets), max(targets)))
