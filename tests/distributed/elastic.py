"""A run begun by some processes and ended by others, beside one process that did it all."""

import shutil
from typing import NamedTuple

from launching import ONE, STEP_BLOCKS, Run, Setting, largest_difference
from workspace import Workspace, write_model_config

HALF, STEPS = 4, 8
LIMIT = 1e-5
COUNTS = (1, 2, 4)
# Every engine goes on with what every other one saved, whoever wrote the files.
ENGINE_PAIRS = [
    ("FSDP2", 2, "FSDP2", 4), ("FSDP2", 2, "", 1), ("", 1, "FSDP2", 2), ("FSDP2", 2, "ZeRO-2", 2),
    ("ZeRO-2", 2, "ZeRO-3", 4), ("ZeRO-3", 2, "FSDP2", 2), ("ZeRO-3", 2, "ZeRO-3", 2),
    ("ZeRO-2", 2, "ZeRO-2", 2), ("DDP", 2, "ZeRO-3", 2), ("ZeRO-3", 2, "DDP", 2),
]  # fmt: skip


class Change(NamedTuple):
    """How far a run that changed its processes is from one that did not."""

    before: Setting
    after: Setting
    files: int
    """Files of tensors in the checkpoint between them."""
    loss: float
    grad_norm: float
    same_blocks: bool
    """Whether every step read the same blocks, targets and all."""

    @property
    def held(self) -> bool:
        return self.same_blocks and max(self.loss, self.grad_norm) <= LIMIT


class Elastic:
    """First halves, made once for each setting, and the run that one process made."""

    def __init__(self, workspace: Workspace, method: str = "full") -> None:
        self.workspace, self.method = workspace, method
        self._halves: dict[Setting, Run] = {}
        self._whole: Run | None = None

    def change(self, before: Setting, after: Setting) -> Change:
        """Goes on under another setting with what the first half saved."""
        half = self._half(before)
        run = half.copy(f"{half.name}-{after}".replace(" ", ""))
        files = len(list(run.newest().glob("*.safetensors")))
        # The config stays what it was at the start; the accumulation follows from the step.
        kept = {"gradient_accumulation_steps": STEP_BLOCKS // before.num_processes}
        text = run.start(after, **kept).text
        assert f"{HALF} of {STEPS} made; going on from" in text, text
        ours, theirs = run.read_metrics(), self._reference().read_metrics()
        counters = ("step", "blocks_seen", "target_tokens", "tokens_seen")
        return Change(
            before,
            after,
            files,
            largest_difference(ours, theirs, "loss"),
            largest_difference(ours, theirs, "grad_norm"),
            [[r[key] for key in counters] for r in ours]
            == [[r[key] for key in counters] for r in theirs],
        )

    def _half(self, setting: Setting) -> Run:
        if setting not in self._halves:
            name = f"half-{self.method}-{setting}".replace(" ", "")
            run = self._make(name)
            run.start(setting)
            shutil.rmtree(run.newest())  # as if it had been killed before its end
            self._halves[setting] = run
        return self._halves[setting]

    def _reference(self) -> Run:
        if self._whole is None:
            self._whole = self._make(f"whole-{self.method}")
            self._whole.start(ONE)
        return self._whole

    def _make(self, name: str) -> Run:
        return Run(
            self.workspace, name, self.method,
            max_steps=STEPS, save_steps=HALF, share_above_gb=0,
            # As in the smaller models of Qwen2.5; the other suites have two matrices there.
            model_config_file=write_model_config(
                self.workspace.folder / "tied", tie_word_embeddings=True
            ),
        )  # fmt: skip
