"""results/loss.png: training loss and held-out loss over the steps."""

from pathlib import Path
from typing import Any


def plot_losses(
    records: list[dict[str, Any]], evaluations: list[dict[str, Any]], title: str, file: Path
) -> None:
    """Draws both losses, in nats per target, and bits per byte as text.

    Args:
        records: Lines of metrics.jsonl.
        evaluations: Entries of eval_results.json.
        title: Name of the run.
        file: The PNG.
    """
    # Imported here: it takes a second, and only the end of a run needs it. Agg needs no display.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    steps = [record["step"] for record in records]
    axes.plot(
        steps,
        [r["loss"] for r in records],
        color="#9db8d9",
        linewidth=1,
        label="training, each step",
    )
    if evaluations:
        axes.plot(
            [e["step"] for e in evaluations],
            [e["loss"] for e in evaluations],
            color="#c0392b",
            marker="o",
            markersize=4,
            label="held out",
        )
        first, last = evaluations[0], evaluations[-1]
        axes.set_title(
            f"{title}: held-out bits per byte {first['bits_per_byte']:.3f} -> "
            f"{last['bits_per_byte']:.3f}",
            fontsize=10,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per target")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
