"""The layers of the package, and libraries where they belong: contracts in pyproject.toml."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRACTS = "[tool.importlinter] in pyproject.toml"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_imports_go_downwards():
    linted = run("lint-imports", "--no-cache")
    assert linted.returncode == 0, (
        f"{linted.stdout}\nMove the import's target to a lower layer, or the importer to a higher "
        f"one; the layers are in {CONTRACTS}."
    )


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("schedule", {"math"}),
        ("data/packing", {"collections.abc", "dataclasses", "numpy", "numpy.typing"}),
    ],
)
def test_pure_modules_import_no_more_than_arithmetic(module, allowed):
    tree = ast.parse((ROOT / f"qloop/{module}.py").read_text())
    imported = {
        alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
    }
    imported |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported <= allowed, f"qloop/{module}.py is pure: compute {imported - allowed} elsewhere"


@pytest.mark.parametrize("module", ["qloop", "qloop.cli"])
def test_nothing_heavy_is_imported_before_a_command_runs(module):
    """`qloop --help` answers at once."""
    heavy = {"torch", "transformers", "numpy", "pydantic", "accelerate"}
    code = f"import sys, {module}; print(*sorted({heavy} & sys.modules.keys()))"
    assert run(sys.executable, "-c", code).stdout.split() == [], (
        f"Import it inside the function of {module} that needs it."
    )


def test_no_module_is_named_for_having_no_subject():
    names = {part for file in (ROOT / "qloop").rglob("*.py") for part in file.with_suffix("").parts}
    vague = names & {"utils", "util", "common", "helpers", "misc"}
    assert not vague, f"Name {vague} after its subject."


def test_no_function_is_longer_than_sixty_lines():
    long = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
        for file in (ROOT / "qloop").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert not long, f"Divide {', '.join(long)} into functions with names."
