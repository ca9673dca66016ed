"""results/loss.png: held-out loss and training loss over the steps."""

import itertools
from pathlib import Path
from typing import Any

_HELD_OUT, _TRAINING, _REFERENCE = "#b03a2e", "#2e6da4", "#555555"


def plot_losses(
    records: list[dict[str, Any]], evaluations: list[dict[str, Any]], title: str, file: Path
) -> None:
    """Draws both losses in nats per target, and the change in bits per byte.

    Args:
        records: Lines of metrics.jsonl.
        evaluations: Entries of eval_results.json, the first of them the base's, at step 0.
        title: Name of the run.
        file: The PNG.
    """
    # Imported here: it takes a second, and only the end of a run needs it. Agg needs no display.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=100, facecolor="white")
    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    if evaluations:
        _draw_held_out(axes, evaluations)
    axes.plot(steps, losses, color=_TRAINING, alpha=0.18, linewidth=0.8)
    axes.plot(steps, _smooth(losses), color=_TRAINING, alpha=0.6, label="training (smoothed)")
    if records:
        _add_passes(axes, records[-1])
    axes.set_title(f"{title}: loss on held-out and training documents", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per target)")
    axes.margins(x=0.02, y=0.08)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.93))
    figure.tight_layout()
    figure.savefig(file, pil_kwargs={"optimize": True})
    pyplot.close(figure)


def _smooth(losses: list[float]) -> list[float]:
    """Returns the mean over a centred window of a twentieth of the run, shorter at both ends."""
    half = max(1, len(losses) // 40)
    sums = [0.0, *itertools.accumulate(losses)]
    ends = [(max(0, i - half), min(len(losses), i + half + 1)) for i in range(len(losses))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in ends]


def _draw_held_out(axes: Any, evaluations: list[dict[str, Any]]) -> None:
    """Draws the held-out loss, a line at the base's, and the bits per byte of both ends."""
    first, last = evaluations[0], evaluations[-1]
    steps = [evaluation["step"] for evaluation in evaluations]
    losses = [evaluation["loss"] for evaluation in evaluations]
    line = {"color": _HELD_OUT, "linewidth": 2, "marker": "o", "markersize": 5, "zorder": 3}
    axes.plot(steps, losses, label="held out", **line)
    before = f"held out, before training ({first['loss']:.2f})"
    axes.axhline(first["loss"], color=_REFERENCE, linestyle="--", linewidth=1, label=before)
    change = f"{first['bits_per_byte']:.3f} → {last['bits_per_byte']:.3f}"
    text = f"{last['loss']:.2f}\nbits per byte {change}"
    place = {"xytext": (0, 12), "textcoords": "offset points", "ha": "right"}
    axes.annotate(text, (steps[-1], losses[-1]), color=_HELD_OUT, fontweight="bold", **place)


def _add_passes(axes: Any, last: dict[str, Any]) -> None:
    """Adds a second x axis at the top: passes over the training corpus."""
    rate = last["epoch"] / last["step"]
    top = axes.secondary_xaxis("top", functions=(lambda step: step * rate, lambda x: x / rate))
    top.set_xlabel("passes over the corpus")
