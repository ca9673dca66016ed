"""The learning rate: linear warm-up, then a cosine; a pure function of the step.

There is no scheduler object that could be stepped too often or would have to be saved:

    >>> [round(learning_rate_at(s, 1.0, 0.1, warmup_steps=3, max_steps=7), 3) for s in range(9)]
    [0.25, 0.5, 0.75, 1.0, 0.868, 0.55, 0.232, 0.1, 0.1]
"""

import math


def learning_rate_at(
    step: int, learning_rate: float, min_learning_rate: float, warmup_steps: int, max_steps: int
) -> float:
    """Returns the rate of the update that follows `step` completed ones.

    The warm-up starts above 0, so that no step is wasted: at `(step + 1) / (warmup_steps + 1)` of
    the peak. The peak is reached at `step = warmup_steps`, the floor at `step = max_steps`; later
    steps stay there. The cosine is that of SGDR without restarts (Loshchilov and Hutter 2017, arXiv
    1608.03983, eq. 5).

    Args:
        step: Completed updates, from 0.
        learning_rate: The peak.
        min_learning_rate: The floor.
        warmup_steps: Updates below the peak; 0 starts at the peak.
        max_steps: Updates of the whole run; more than `warmup_steps`.
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / (warmup_steps + 1)
    share = min(1.0, (step - warmup_steps) / (max_steps - warmup_steps))
    return min_learning_rate + (learning_rate - min_learning_rate) * 0.5 * (
        1 + math.cos(math.pi * share)
    )
