"""The console and its log."""

import dataclasses

from qloop.report.console import Console
from qloop.report.metrics import StepRecord


def make_record(step: int, loss: float = 2.5, **values: float | None) -> StepRecord:
    record = StepRecord(
        step=step,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=0.5,
        target_tokens=100,
        tokens_seen=100 * step,
        blocks_seen=4 * step,
        epoch=0.1 * step,
        data_seconds=0.01,
        forward_backward_seconds=0.2,
        update_seconds=0.03,
        tokens_per_second=400.0,
        padding_share=0.05,
        flops_per_second=4e12,
        mfu=0.414,
        memory_bytes=20_000_000_000,
        peak_memory_bytes=23_440_000_000,
        reserved_memory_bytes=25_000_000_000,
    )
    return dataclasses.replace(record, **values)


def test_a_step_line_names_step_loss_rate_norm_and_speed(tmp_path, capsys):
    console = Console(tmp_path / "log.txt", log_steps=1, last_step=20)
    console.show_step(make_record(1))
    console.show_step(make_record(2))
    console.close()
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == "step  1/20  loss 2.5000  rate 1.00e-04  norm 0.500  400 tokens/s  MFU 41%  23.4 GB"
    )
    assert lines[1].startswith(lines[0].replace(" 1/20", " 2/20"))
    assert lines[1].endswith(" left")


def test_a_model_whose_flops_are_unknown_has_no_mfu_in_its_line(tmp_path, capsys):
    console = Console(tmp_path / "log.txt", log_steps=1, last_step=20)
    console.show_step(make_record(1, mfu=None, flops_per_second=None))
    console.close()
    assert capsys.readouterr().out.endswith("norm 0.500  400 tokens/s  23.4 GB\n")


def test_plain_lines_come_every_log_steps_and_at_the_end(tmp_path, capsys):
    console = Console(tmp_path / "log.txt", log_steps=4, last_step=9)
    for step in range(1, 10):
        console.show_step(make_record(step))
    console.close()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in printed] == ["step 4", "step 8", "step 9"]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 3


def test_a_terminal_gets_one_live_line_and_messages_above_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any output for a terminal
    monkeypatch.setenv("TERM", "xterm")
    console = Console(tmp_path / "log.txt", log_steps=100, last_step=9)
    console.show_step(make_record(1))
    console.say("saved somewhere")
    console.show_step(make_record(2))
    console.close()
    text = capsys.readouterr().out
    assert "\x1b[" in text
    assert text.index("saved somewhere") < text.rindex("step 2/9")


def test_the_log_is_appended_to_and_stamped(tmp_path):
    for message in ("first", "second\nthird"):
        console = Console(tmp_path / "log.txt", 1, 1)
        console.say(message)
        console.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["first", "second", "third"]
    assert lines[0][:4].isdigit()
