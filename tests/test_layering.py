"""Imports go downwards only: who may know whom, and where each heavy library lives."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# Every module from the top down, with the modules of qloop that it may import. All of them stand
# further down, so there is no way back up. A new module takes its place here, beside the reason to
# need what it imports.
MAY_IMPORT: dict[str, set[str]] = {
    "qloop.__main__": {"qloop.cli"},
    # What a person types and what runs. Nothing below knows the command line or the whole run.
    "qloop.cli": {
        "qloop",
        "qloop.checkpoint.listing",
        "qloop.config",
        "qloop.config_file",
        "qloop.errors",
        "qloop.export",
        "qloop.plan",
        "qloop.profiling",
        "qloop.report.console",
        "qloop.train",
    },
    "qloop.profiling": {
        "qloop.assembly",
        "qloop.config",
        "qloop.errors",
        "qloop.model.compilation",
        "qloop.report.metrics",
        "qloop.report.reporter",
        "qloop.stops",
        "qloop.train",
    },
    "qloop.export": {
        "qloop.checkpoint.filesystem",
        "qloop.checkpoint.reading",
        "qloop.checkpoint.store",
        "qloop.checkpoint.tensors",
        "qloop.errors",
        "qloop.model.adapters",
        "qloop.model.build",
        "qloop.model.saving",
    },
    "qloop.train": {
        "qloop.assembly",
        "qloop.checkpoint.store",
        "qloop.config",
        "qloop.errors",
        "qloop.evaluate",
        "qloop.plan",
        "qloop.report.metrics",
        "qloop.schedule",
        "qloop.seeds",
        "qloop.stops",
    },
    "qloop.assembly": {
        "qloop.checkpoint.filesystem",
        "qloop.checkpoint.manager",
        "qloop.checkpoint.reading",
        "qloop.checkpoint.store",
        "qloop.config",
        "qloop.data.batches",
        "qloop.data.indexes",
        "qloop.data.packing",
        "qloop.data.sources",
        "qloop.data.tokens",
        "qloop.engines.build",
        "qloop.engines.engine",
        "qloop.errors",
        "qloop.flops",
        "qloop.lock",
        "qloop.model.activations",
        "qloop.model.build",
        "qloop.model.description",
        "qloop.model.isolation",
        "qloop.model.loss",
        "qloop.model.saving",
        "qloop.model.tokenizer",
        "qloop.peers",
        "qloop.plan",
        "qloop.progress",
        "qloop.ranks",
        "qloop.report.ledger",
        "qloop.report.metrics",
        "qloop.report.reporter",
        "qloop.resume",
        "qloop.run_directory",
        "qloop.warmup",
    },
    # What a run needs: a whole config, and the code of the step, on tensors without memory.
    "qloop.plan": {
        "qloop.checkpoint.store",
        "qloop.config",
        "qloop.errors",
        "qloop.flops",
        "qloop.model.activations",
        "qloop.model.attention",
        "qloop.model.build",
        "qloop.model.compilation",
        "qloop.model.loss",
        "qloop.model.shapes",
        "qloop.optimizer",
        "qloop.simulation",
    },
    "qloop.simulation": {
        "qloop.data.batches",
        "qloop.model.activations",
        "qloop.model.attention",
        "qloop.model.loss",
    },
    # Compiling, on a step's own data: of all parts only the engine, the loss and the ranks.
    "qloop.warmup": {
        "qloop.config",
        "qloop.data.batches",
        "qloop.engines.engine",
        "qloop.errors",
        "qloop.model.activations",
        "qloop.model.compilation",
        "qloop.model.loss",
        "qloop.ranks",
        "qloop.seeds",
    },
    # What a run goes on from: the one part that compares whole configs.
    "qloop.resume": {
        "qloop.checkpoint.filesystem",
        "qloop.checkpoint.reading",
        "qloop.checkpoint.store",
        "qloop.config",
        "qloop.errors",
    },
    "qloop.demo.build_tokenizer": {
        "qloop.config_file",
        "qloop.data.documents",
        "qloop.data.tokens",
    },
    # Reports: told by the loop what happened; none of them changes it.
    "qloop.report.reporter": {
        "qloop.config",
        "qloop.errors",
        "qloop.evaluate",
        "qloop.report.console",
        "qloop.report.metrics",
        "qloop.report.plot",
        "qloop.report.trackers",
        "qloop.run_directory",
    },
    "qloop.report.console": {"qloop.report.lines", "qloop.report.metrics"},
    "qloop.report.metrics": {
        "qloop.data.packing",
        "qloop.flops",
        "qloop.progress",
        "qloop.report.lines",
        "qloop.run_directory",
    },
    "qloop.report.lines": set(),
    "qloop.report.ledger": {"qloop.data.packing", "qloop.data.tokens"},
    "qloop.report.plot": set(),
    "qloop.report.trackers": {"qloop.config", "qloop.errors"},
    # The parts: each takes plain values or its own section of the config.
    "qloop.evaluate": {
        "qloop.data.batches",
        "qloop.data.packing",
        "qloop.data.tokens",
        "qloop.model.attention",
        "qloop.model.compilation",
        "qloop.model.loss",
    },
    "qloop.checkpoint.manager": {
        "qloop.checkpoint.reading",
        "qloop.checkpoint.shares",
        "qloop.checkpoint.store",
        "qloop.checkpoint.tensors",
        "qloop.config",
        "qloop.engines.engine",
        "qloop.errors",
        "qloop.progress",
    },
    "qloop.checkpoint.shares": {"qloop.checkpoint.tensors"},
    "qloop.checkpoint.reading": {
        "qloop.checkpoint.tensors",
        "qloop.config",
        "qloop.engines.engine",
        "qloop.errors",
        "qloop.progress",
    },
    "qloop.flops": {"qloop.data.packing"},
    # The engines: the loop and the checkpoints see the first of them only.
    "qloop.engines.build": {
        "qloop.config",
        "qloop.engines.engine",
        "qloop.engines.zero",
        "qloop.errors",
        "qloop.model.build",
        "qloop.optimizer",
        "qloop.seeds",
    },
    "qloop.engines.zero": {
        "qloop.checkpoint.tensors",
        "qloop.engines.engine",
        "qloop.errors",
        "qloop.model.saving",
        "qloop.optimizer",
    },
    "qloop.engines.engine": {
        "qloop.checkpoint.tensors",
        "qloop.model.saving",
        "qloop.optimizer",
    },
    "qloop.optimizer": {"qloop.config", "qloop.errors", "qloop.model.activations"},
    "qloop.model.build": {
        "qloop.checkpoint.tensors",
        "qloop.config",
        "qloop.errors",
        "qloop.model.adapters",
        "qloop.model.description",
        "qloop.model.saving",
    },
    "qloop.model.shapes": {
        "qloop.config",
        "qloop.errors",
        "qloop.model.adapters",
        "qloop.model.description",
    },
    "qloop.model.adapters": {
        "qloop.checkpoint.tensors",
        "qloop.config",
        "qloop.errors",
        "qloop.model.saving",
    },
    "qloop.model.tokenizer": {
        "qloop.config",
        "qloop.data.tokens",
        "qloop.errors",
        "qloop.model.description",
    },
    "qloop.model.description": {"qloop.config", "qloop.errors"},
    "qloop.model.saving": set(),
    "qloop.model.isolation": {
        "qloop.data.batches",
        "qloop.errors",
        "qloop.model.attention",
        "qloop.model.loss",
    },
    "qloop.model.loss": {
        "qloop.data.batches",
        "qloop.errors",
        "qloop.model.attention",
        "qloop.model.linear_loss",
    },
    "qloop.model.linear_loss": {"qloop.data.batches"},
    "qloop.model.compilation": {"qloop.config", "qloop.model.activations"},
    "qloop.model.activations": {"qloop.errors"},
    "qloop.model.attention": {"qloop.data.batches"},
    "qloop.data.sources": {
        "qloop.config",
        "qloop.data.documents",
        "qloop.data.tokens",
        "qloop.errors",
    },
    "qloop.data.indexes": {"qloop.data.documents", "qloop.data.packing", "qloop.data.tokens"},
    "qloop.data.batches": {"qloop.data.packing", "qloop.data.tokens"},
    "qloop.data.tokens": {"qloop.data.documents", "qloop.data.packing", "qloop.errors"},
    "qloop.data.documents": {"qloop.errors"},
    "qloop.data.packing": set(),
    "qloop.checkpoint.listing": {
        "qloop.checkpoint.filesystem",
        "qloop.checkpoint.store",
        "qloop.errors",
    },
    "qloop.checkpoint.store": {"qloop.checkpoint.filesystem"},
    "qloop.checkpoint.tensors": {"qloop.errors"},
    "qloop.run_directory": {
        "qloop.checkpoint.filesystem",
        "qloop.config",
        "qloop.config_file",
        "qloop.errors",
    },
    "qloop.checkpoint.filesystem": set(),
    "qloop.peers": {"qloop.errors"},
    "qloop.ranks": {"qloop.errors"},
    "qloop.lock": {"qloop.errors"},
    "qloop.stops": {"qloop.errors"},
    "qloop.config_file": {"qloop.config", "qloop.errors"},
    "qloop.config": set(),
    # The ground: these know nothing of qloop.
    "qloop.progress": set(),
    "qloop.schedule": set(),
    "qloop.seeds": set(),
    "qloop.errors": set(),
    "qloop.checkpoint": set(),
    "qloop.data": set(),
    "qloop.engines": set(),
    "qloop.demo": set(),
    "qloop.model": set(),
    "qloop.report": set(),
    "qloop": set(),
}

# All that these may import at all, of the standard library too.
ONLY = {
    "qloop.schedule": {"math"},
    "qloop.data.packing": {"dataclasses", "numpy"},
}


class Library(NamedTuple):
    """Where a library may be imported: below these names, and whether only inside functions."""

    rooms: tuple[str, ...]
    inside_functions: bool


LIBRARIES = {
    "deepspeed": Library(("qloop.engines.zero",), inside_functions=True),
    "peft": Library(("qloop.model",), inside_functions=True),
    "bitsandbytes": Library(("qloop.model", "qloop.optimizer"), inside_functions=True),
    "wandb": Library(("qloop.report.trackers",), inside_functions=True),
    "tensorboard": Library(("qloop.report.trackers",), inside_functions=True),
    "accelerate": Library(
        (
            *("qloop.train", "qloop.assembly", "qloop.evaluate", "qloop.stops"),
            *("qloop.ranks", "qloop.peers", "qloop.checkpoint", "qloop.engines", "qloop.warmup"),
        ),
        inside_functions=False,
    ),
}

NO_NAMES = {"utils", "util", "common", "helpers", "misc"}


class Import(NamedTuple):
    """A module imports a name; `inside_function` is false where it happens on import already."""

    module: str
    name: str
    inside_function: bool


# The checker


def find_modules(root: Path) -> dict[str, Path]:
    """The files of a folder's qloop/ by module; the embedded corpus holds no Python."""
    modules = {}
    for file in sorted((root / "qloop").rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


def find_imports(root: Path) -> list[Import]:
    modules = find_modules(root)
    return [
        Import(module, _name_module(name, modules), inside_function)
        for module, file in modules.items()
        for name, inside_function in _iterate_names(
            ast.parse(file.read_text(encoding="utf-8")),
            module if file.name == "__init__.py" else module.rpartition(".")[0],
            inside_function=False,
        )
    ]


def _iterate_names(
    node: ast.AST, package: str, inside_function: bool
) -> Iterator[tuple[str, bool]]:
    """Yields each imported name in full: `from a import b` is `a.b`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, inside_function) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - child.level + 1]
            start = [*(above if child.level else []), *([child.module] if child.module else [])]
            yield from ((".".join([*start, alias.name]), inside_function) for alias in child.names)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from _iterate_names(child, package, inside_function or is_function)


def _name_module(name: str, modules: dict[str, Path]) -> str:
    """Turns `qloop.errors.ConfigError` into `qloop.errors`; names of libraries stay."""
    while name.startswith("qloop.") and name not in modules:
        name = name.rpartition(".")[0]
    return name


def is_below(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def find_forbidden(imports: list[Import]) -> list[str]:
    """Imports of qloop by qloop that the table does not have."""
    return [
        f"{module} imports {name}"
        for module, name, _ in imports
        if is_below(name, "qloop") and name not in MAY_IMPORT.get(module, set())
    ]


def find_strangers(imports: list[Import]) -> list[str]:
    """Imports beyond the short list of a module that has one."""
    return [
        f"{module} imports {name}"
        for module, name, _ in imports
        if module in ONLY and name.split(".")[0] not in ONLY[module]
    ]


def find_misplaced(imports: list[Import]) -> list[str]:
    """Imports of a library outside its rooms, or too early."""
    found = []
    for module, name, inside_function in imports:
        for library in LIBRARIES.keys() & set(name.split(".")):
            if is_below(name, "qloop"):
                continue
            rooms, only_inside = LIBRARIES[library]
            if not any(is_below(module, room) for room in rooms):
                found.append(f"{module} imports {name}")
            elif only_inside and not inside_function:
                found.append(f"{module} imports {name} at module level")
    return found


def find_cycle(imports: list[Import]) -> list[str]:
    """A ring of modules that import each other, or nothing."""
    graph: dict[str, set[str]] = {}
    for module, name, _ in imports:
        if is_below(name, "qloop"):
            graph.setdefault(module, set()).add(name)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


# qloop


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return find_imports(ROOT)


def test_every_module_has_its_place_in_the_table():
    assert find_modules(ROOT).keys() == MAY_IMPORT.keys()


def test_the_table_goes_downwards_only():
    order = list(MAY_IMPORT)
    for module, below in MAY_IMPORT.items():
        for name in below:
            assert order.index(name) > order.index(module), f"{module} stands below {name}"


def test_imports_are_those_of_the_table(imports):
    assert find_forbidden(imports) == []


def test_the_table_allows_nothing_that_nobody_needs(imports):
    used = {(module, name) for module, name, _ in imports}
    allowed = {(module, name) for module, below in MAY_IMPORT.items() for name in below}
    assert allowed - used == set()


def test_no_modules_import_each_other(imports):
    assert find_cycle(imports) == []


def test_errors_knows_nothing_of_qloop(imports):
    names = [name for module, name, _ in imports if module == "qloop.errors"]
    assert [name for name in names if name.split(".")[0] not in sys.stdlib_module_names] == []


def test_nothing_but_the_entry_knows_the_command_line(imports):
    assert {module for module, name, _ in imports if name == "qloop.cli"} == {"qloop.__main__"}


@pytest.mark.parametrize("name", ["qloop.assembly", "qloop.train"])
def test_only_the_top_knows_the_whole_run(imports, name):
    top = {"qloop.train", "qloop.profiling", "qloop.cli"}
    assert {module for module, imported, _ in imports if imported == name} <= top


def test_schedule_and_packing_import_no_more_than_they_say(imports):
    assert find_strangers(imports) == []


def test_each_library_is_imported_in_its_rooms_only(imports):
    assert find_misplaced(imports) == []


def test_a_test_of_a_library_would_notice_it(imports):
    """The libraries of the table are really imported, so that the test above has work to do."""
    names = {part for _, name, _ in imports for part in name.split(".")}
    assert {"peft", "wandb", "tensorboard", "accelerate"} <= names


def test_the_command_line_imports_nothing_heavy_before_a_command_runs(imports):
    """`qloop --help` answers at once."""
    light = {*sys.stdlib_module_names, "click"}
    early = {
        name
        for module, name, inside_function in imports
        if module in ("qloop.cli", "qloop.errors", "qloop") and not inside_function
    }
    assert {name for name in early if name.split(".")[0] not in light} == {"qloop", "qloop.errors"}


def test_no_module_is_named_for_having_no_subject():
    parts = {part for module in find_modules(ROOT) for part in module.split(".")}
    assert not parts & NO_NAMES


# The checker itself, on modules that do what it should find


def plant(folder: Path, sources: dict[str, str]) -> list[Import]:
    """Writes a qloop/ of such files, and reads its imports."""
    for name, source in sources.items():
        file = folder / "qloop" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(source)
    return find_imports(folder)


@pytest.mark.parametrize(
    "statement",
    [
        "import qloop.cli",
        "import json, qloop.cli",
        "from qloop import cli",
        "from qloop.cli import main",
        "from . import cli",
        "from .cli import main",
        "def load():\n    from qloop.cli import main",
        "class Loader:\n    import qloop.cli",
        "if True:\n    try:\n        import qloop.cli\n    except ImportError:\n        pass",
    ],
)
def test_an_import_upwards_is_found_however_it_is_written(tmp_path, statement):
    imports = plant(tmp_path, {"cli.py": "", "errors.py": statement})
    assert find_forbidden(imports) == ["qloop.errors imports qloop.cli"]


@pytest.mark.parametrize("statement", ["from ..cli import main", "from .. import cli"])
def test_a_relative_import_upwards_is_found(tmp_path, statement):
    imports = plant(tmp_path, {"cli.py": "", "data/tokens.py": statement})
    assert find_forbidden(imports) == ["qloop.data.tokens imports qloop.cli"]


def test_a_module_that_the_table_lacks_may_import_nothing_of_qloop(tmp_path):
    imports = plant(tmp_path, {"errors.py": "", "helpers.py": "import qloop.errors"})
    assert find_forbidden(imports) == ["qloop.helpers imports qloop.errors"]


def test_what_the_table_has_is_let_pass(tmp_path):
    imports = plant(tmp_path, {"errors.py": "", "lock.py": "from qloop.errors import LockedError"})
    assert imports == [Import("qloop.lock", "qloop.errors", inside_function=False)]
    assert find_forbidden(imports) == []


def test_a_library_beyond_the_short_list_is_found(tmp_path):
    sources = {
        "schedule.py": "import math, torch",
        "data/packing.py": "import numpy.typing, os.path",
    }
    assert sorted(find_strangers(plant(tmp_path, sources))) == [
        "qloop.data.packing imports os.path",
        "qloop.schedule imports torch",
    ]


@pytest.mark.parametrize(
    ("file", "statement", "found"),
    [
        ("train.py", "import peft", "train imports peft"),
        ("train.py", "def f():\n    import bitsandbytes", "train imports bitsandbytes"),
        ("model/build.py", "import peft", "model.build imports peft at module level"),
        ("model/build.py", "class A:\n    import peft", "model.build imports peft at module level"),
        ("report/reporter.py", "def f():\n    import wandb", "report.reporter imports wandb"),
        ("report/trackers.py", "import wandb", "report.trackers imports wandb at module level"),
        ("seeds.py", "import torch.utils.tensorboard", "seeds imports torch.utils.tensorboard"),
        ("data/batches.py", "import accelerate.utils", "data.batches imports accelerate.utils"),
        ("model/loss.py", "import accelerate", "model.loss imports accelerate"),
    ],
)
def test_a_library_outside_its_room_or_too_early_is_found(tmp_path, file, statement, found):
    assert find_misplaced(plant(tmp_path, {file: statement})) == [f"qloop.{found}"]


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("model/build.py", "def f():\n    import peft"),
        ("report/trackers.py", "def f():\n    from torch.utils.tensorboard import SummaryWriter"),
        ("train.py", "from accelerate import Accelerator"),
    ],
)
def test_a_library_in_its_room_is_let_pass(tmp_path, file, statement):
    assert find_misplaced(plant(tmp_path, {file: statement})) == []


def test_a_ring_of_imports_is_found(tmp_path):
    sources = {"seeds.py": "import qloop.stops", "stops.py": "def f():\n    import qloop.seeds"}
    imports = plant(tmp_path, sources)
    assert set(find_cycle(imports)) == {"qloop.seeds", "qloop.stops"}
