"""The console: a live line on a terminal, plain lines elsewhere, and training_log.txt."""

import logging
import time
import warnings
from datetime import datetime, timedelta
from pathlib import Path

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from qloop.report.files import LineFile
from qloop.report.metrics import StepRecord


class Console:
    """Writes messages to the terminal and the log, and steps to a live line."""

    def __init__(self, log_file: Path, log_steps: int, last_step: int) -> None:
        """Opens the log.

        Args:
            log_file: training_log.txt, appended to.
            log_steps: Steps between lines in the log, and on output that is no terminal.
            last_step: The last step of the run.
        """
        self._rich = RichConsole(soft_wrap=True, highlight=False, markup=False)
        self._live = Live(console=self._rich, refresh_per_second=8)
        self._log: LineFile | None = LineFile(log_file, self._rich.print)
        self._log_steps, self._last_step = log_steps, last_step
        self._started: tuple[float, int] | None = None

    def say(self, message: str) -> None:
        """Prints a message, above the live line if there is one, and logs it."""
        self._rich.print(message)
        self._write_log(message)

    def show_step(self, record: StepRecord) -> None:
        """Updates the live line; prints and logs a plain line when it is due."""
        line = _describe_step(record, self._last_step, self._estimate_seconds(record.step))
        is_due = record.step % self._log_steps == 0 or record.step == self._last_step
        if self._rich.is_terminal:
            self._live.start()  # does nothing if it is started
            self._live.update(Text(line))
        elif is_due:
            self._rich.print(line)
        if is_due:
            self._write_log(line)

    def close(self) -> None:
        """Ends the live line, whose last state stays, and closes the log."""
        self._live.stop()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _estimate_seconds(self, step: int) -> float | None:
        """Returns the seconds to the end at the pace so far, without the first step (warm-up)."""
        now = time.perf_counter()
        if self._started is None:
            self._started = (now, step)
            return None
        began, first_step = self._started
        return (now - began) / (step - first_step) * (self._last_step - step)

    def _write_log(self, message: str) -> None:
        if self._log is not None:
            stamp = datetime.now().astimezone().isoformat(timespec="seconds")
            self._log.write("".join(f"{stamp} {line}\n" for line in message.splitlines()))


def quieten_libraries() -> None:
    """Turns off progress bars and hints of transformers and datasets; errors stay."""
    import datasets
    import transformers

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _describe_step(record: StepRecord, last_step: int, seconds_left: float | None) -> str:
    left = "" if seconds_left is None else f"  {timedelta(seconds=round(seconds_left))} left"
    width = len(str(last_step))
    mfu = "" if record.mfu is None else f"  MFU {record.mfu:.0%}"
    return (
        f"step {record.step:{width}}/{last_step}  loss {record.loss:.4f}  "
        f"rate {record.learning_rate:.2e}  norm {record.grad_norm:.3f}  "
        f"{record.tokens_per_second:,.0f} tokens/s{mfu}  "
        f"{record.peak_memory_bytes / 1e9:.1f} GB{left}"
    )
