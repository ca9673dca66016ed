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


@pytest.mark.parametrize("after", elastic.COUNTS)
@pytest.mark.parametrize("before", elastic.COUNTS)
def test_any_number_of_processes_goes_on_with_what_any_other_saved(runs, before, after):
    found = runs.change(by_ddp(before), by_ddp(after))
    assert found.held, found
    assert found.files == 2 * before, "each process wrote its part"


@pytest.mark.parametrize(("before", "m", "after", "n"), elastic.ENGINE_PAIRS)
def test_any_engine_goes_on_with_what_any_other_saved(runs, before, m, after, n):
    found = runs.change(Setting(before, m), Setting(after, n))
    assert found.held, found
