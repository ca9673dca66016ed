"""The picture of the losses."""

from qloop.report.plot import plot_losses


def test_the_plot_is_a_picture(tmp_path):
    evaluations = [{"step": s, "loss": 3.0 - s, "bits_per_byte": 1.0} for s in (0, 1)]
    records = [{"step": step, "loss": 2.0, "epoch": step / 4} for step in (1, 2)]
    plot_losses(records, evaluations, "run", tmp_path / "loss.png")
    plot_losses(records, [], "run without held-out documents", tmp_path / "alone.png")
    plot_losses([], evaluations[:1], "run without a step", tmp_path / "untrained.png")
    for name in ("loss.png", "alone.png", "untrained.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
