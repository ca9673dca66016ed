"""Each RESULTS.md is what its script renders from the JSON next to it."""

import json
from pathlib import Path

import measure
import pytest
import render
import run

TESTS = Path(__file__).parent
PAGES = {
    "torture": (run.render, "python tests/torture/run.py --render"),
    "distributed": (measure.render, "python tests/distributed/measure.py --render"),
    "benchmarks": (lambda results: render.render(), "python tests/benchmarks/render.py"),
}


@pytest.mark.parametrize("folder", PAGES)
def test_results_are_rendered_from_json(folder):
    render_page, command = PAGES[folder]
    file = TESTS / folder / "results.json"
    expected = render_page(json.loads(file.read_text()) if file.exists() else None)
    page = TESTS / folder / "RESULTS.md"
    assert page.read_text() == expected, f"{page}: differs from its JSON; run `{command}`"


def test_a_failed_promise_and_a_failed_run_show_in_the_tables():
    row = {"suite": "kills", "attack": "attack", "trials": 1200, "survived": 1199}
    row |= {"promise": "promise", "note": "note", "baseline": "theirs"}
    page = run.render({"versions": {"torch": "2"}, "rows": [row]})
    assert "| attack | 1,200 | 1,199 | promise | note; theirs |" in page
    row = {"run": "7B full", "contestant": "qloop", "error": "out of memory"}
    shared = {"device": "GPU", "date": "today", "corpus": "q", "versions": {"torch": "2"}}
    assert "| 7B full | qloop | out of memory |" in render.format_gpu({**shared, "rows": [row]})
