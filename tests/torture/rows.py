"""What every suite here reports: one row for each kind of attack."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """How often a promise held under one kind of attack."""

    attack: str
    """What was done, as the table says it."""
    trials: int
    survived: int
    """Trials in which every promise held; a row with fewer than `trials` is a failure."""
    promise: str
    """What had to hold."""
    note: str = ""
    """Figures worth a look: how many kills fell inside a save."""
    baseline: str = ""
    """The same attack on `accelerate.load_state`, where there is one."""
    first_failure: str = ""
    """What to type, or which seed, to see the first failure again."""


def print_rows(rows: list[Row]) -> None:
    """Shows rows on a terminal, a few lines each."""
    for row in rows:
        print(f"{row.attack}: {row.survived:,} of {row.trials:,}  ({row.promise})")
        for text in (row.note, row.baseline, row.first_failure and f"FAILED {row.first_failure}"):
            if text:
                print(f"    {text}")
