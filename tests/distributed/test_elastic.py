"""The step belongs to the run: whoever goes on with it reads the same blocks to the same losses."""

import elastic
import pytest
from launching import Setting
from workspace import Workspace

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> elastic.Elastic:
    return elastic.Elastic(Workspace(tmp_path_factory.mktemp("elastic") / "workspace"))


def by_ddp(count: int) -> Setting:
    return Setting("DDP" if count > 1 else "", count)


# measure.py tries every pair of 1, 2 and 4 processes, and ten of engines.
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 1)])
def test_another_number_of_processes_goes_on_with_what_was_saved(runs, before, after):
    found = runs.change(by_ddp(before), by_ddp(after))
    assert found.held, found
    assert found.files == 2 * before, "each process wrote its part"


@pytest.mark.parametrize(
    ("before", "after"),
    [("FSDP2", "FSDP2"), ("FSDP2", "ZeRO-2"), ("ZeRO-2", "ZeRO-3"), ("ZeRO-3", "ZeRO-3")],
)
def test_another_engine_goes_on_with_what_was_saved(runs, before, after):
    found = runs.change(Setting(before, 2), Setting(after, 2))
    assert found.held, found
