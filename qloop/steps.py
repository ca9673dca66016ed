"""The counters that survive a restart; together with the tensors, all the state a run has."""

import dataclasses


@dataclasses.dataclass
class Progress:
    """How far a run has come, over all ranks and all its parts."""

    step: int = 0
    """Optimizer updates made."""
    blocks_seen: int = 0
    """Blocks read, of all epochs."""
    tokens_seen: int = 0
    """Targets trained on."""

    def advance(self, blocks: int, target_tokens: int) -> None:
        """Accounts for one update."""
        self.step += 1
        self.blocks_seen += blocks
        self.tokens_seen += target_tokens

    def is_due(self, every_steps: int, last_step: int) -> bool:
        """Whether what happens every so many steps (0: never) and at the end happens now."""
        return self.step == last_step or (every_steps > 0 and self.step % every_steps == 0)
