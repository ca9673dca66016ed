"""What the ranks do together, with two real processes: what one cannot do ends both alike."""

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator

from qloop.errors import ConfigError
from qloop.ranks import on_main

SCRIPT = """
import os, sys
from accelerate import Accelerator
from qloop.errors import LockedError
from qloop.ranks import on_main
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
open(os.path.join(sys.argv[1], str(rank)), "w").write(f"{answer}, {refused}")
"""


def test_on_one_rank_it_is_a_plain_call():
    accelerator = Accelerator(cpu=True)
    assert on_main(accelerator, lambda: 7) == 7

    def refuse() -> None:
        raise ConfigError("no")

    with pytest.raises(ConfigError, match=r"^no$"):
        on_main(accelerator, refuse)


def test_two_ranks_get_one_answer_and_one_error(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", str(script), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    answers = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    assert answers == ["made by 0, in use"] * 2
