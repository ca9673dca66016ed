"""Every engine makes the steps that one process makes."""

import parity
import pytest
from workspace import Workspace

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> parity.References:
    return parity.References(Workspace(tmp_path_factory.mktemp("parity") / "workspace"))


@pytest.mark.parametrize(
    ("method", "engine"), [(method, e) for method, engines in parity.CASES.items() for e in engines]
)
def test_losses_norms_rates_and_held_out_figures_are_those_of_one_process(
    references, method, engine
):
    found = parity.compare(references, method, engine)
    assert found.held, found
    assert found.targets[0] < found.targets[1], "uneven targets, or nothing was tried"
