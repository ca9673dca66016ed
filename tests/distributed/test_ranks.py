"""What the ranks do together, with two real processes: what one cannot do ends both alike."""

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator

from qloop.distributed.ranks import on_all, on_main
from qloop.errors import ConfigError

SCRIPT = """
import os, sys
from accelerate import Accelerator
from qloop.errors import LockedError
from qloop.distributed.ranks import on_all, on_main
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
rank = accelerator.process_index
answer = on_main(accelerator, lambda: f"made by {accelerator.process_index}")
def refuse():
    raise LockedError("in use")
try:
    on_main(accelerator, refuse)
    refused = "not refused"
except LockedError as error:
    refused = str(error)
own = on_all(accelerator, lambda: accelerator.process_index)
def refuse_on_second():
    if accelerator.process_index == 1:
        raise LockedError("only here")
try:
    on_all(accelerator, refuse_on_second)
    shared = "not refused"
except LockedError as error:
    shared = str(error)
answers = f"{answer}, {refused}, {own}, {shared}"
open(os.path.join(sys.argv[1], str(rank)), "w").write(answers)
os._exit(0)  # as qloop does: threads of torch.distributed may abort the end of the interpreter
"""


def test_on_one_rank_it_is_a_plain_call():
    accelerator = Accelerator(cpu=True)
    assert on_main(accelerator, lambda: 7) == 7

    def refuse() -> None:
        raise ConfigError("no")

    with pytest.raises(ConfigError, match=r"^no$"):
        on_main(accelerator, refuse)


def test_on_one_rank_what_all_do_is_a_plain_call_too():
    accelerator = Accelerator(cpu=True)
    assert on_all(accelerator, lambda: 7) == 7

    def refuse() -> None:
        raise ConfigError("no")

    with pytest.raises(ConfigError, match=r"^no$"):
        on_all(accelerator, refuse)


def test_two_ranks_get_their_answers_and_one_error(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", str(script), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    answers = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    assert answers == [f"made by 0, in use, {rank}, only here" for rank in (0, 1)]
