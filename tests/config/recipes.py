"""Writes the files in configs/, which hold every key with its value and its description.

Run it after every change of a key:

    python tests/config/recipes.py
"""

import inspect
import json
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from qloop.config.keys import KEYS, PATH_KEYS, Config, Key

_WIDTH = 110
_COMMENT_COLUMN = 38
_EXPLANATION = """\
Every key is a flag too (--learning_rate 1e-5), and a flag replaces the value here. Relative paths
start at the folder of this file. A key behind a # has no value, or its default. Section names are
for the reader only: the name of a key is unique."""


class Recipe(NamedTuple):
    """The values of a file that differ from the defaults; None leaves a key at its default."""

    heading: str
    values: dict[str, Any]
    more_flags: str = ""


RECIPES = {
    "demo": Recipe(
        "A tiny model on the embedded corpus: two minutes on two CPU cores, no network.",
        {
            "experiment_name": "demo",
            "model_name": None,
            "model_config_file": "../qloop/demo/model/config.json",
            "tokenizer_name": "../qloop/demo/tokenizer",
            "gradient_checkpointing": "off",
            "data_type": None,
            "train_file": "../qloop/demo/corpus",
            "held_out_share": 0.1,
            "max_seq_length": 512,
            "batch_size": 4,
            "gradient_accumulation_steps": 1,
            "max_steps": 120,
            "warmup_steps": 10,
            "learning_rate": 2e-3,
            "min_learning_rate": 2e-4,
            "weight_decay": 0.1,
            "eval_steps": 40,
            "eval_batch_size": 4,
            "save_steps": 40,
        },
    ),
    "full": Recipe(
        "All weights: the recipe published for Qwen2.5 on Q (learning rate 1e-5, 800 steps, a "
        "checkpoint every 100).",
        {"learning_rate": 1e-5, "max_steps": 800, "save_steps": 100},
        " --model_name Qwen/Qwen2.5-1.5B-Instruct",
    ),
    "lora": Recipe(
        "Adapters on a frozen base: less memory, and checkpoints of megabytes.",
        {"training_method": "lora", "learning_rate": 2e-4, "max_steps": 1000},
    ),
    "qlora": Recipe(
        "Adapters on a 4-bit base: the least memory; a 7B base on one 24 GB card.",
        {"training_method": "qlora", "learning_rate": 2e-4, "max_steps": 1000},
    ),
}


def format_recipe(name: str) -> str:
    """Returns the text of `<name>.toml`: every key, under its section, with a comment."""
    heading, values, more_flags = RECIPES[name]
    lines = [
        *_wrap(heading, "# ", "# "),
        *("#", f"#   qloop train --config configs/{name}.toml{more_flags}", "#"),
        *_wrap(_EXPLANATION, "# ", "# "),
    ]
    section = None
    for key in KEYS.values():
        if key.section != section:
            section = key.section
            note = (inspect.getdoc(Config.model_fields[section].annotation) or "").rstrip(".")
            lines += ["", *_comment(f"[{section}]", note[:1].lower() + note[1:])]
        # The default of a path is relative to the working directory, so no value can stand for it.
        default = None if key.name in PATH_KEYS else key.field.default
        lines += _format_key(key, values.get(key.name, default))
    return "\n".join(lines) + "\n"


def write_recipes(folder: Path) -> None:
    """Writes the file of every recipe."""
    for name in RECIPES:
        (folder / f"{name}.toml").write_text(format_recipe(name), encoding="utf-8")


def _format_key(key: Key, value: Any) -> list[str]:
    mark = ""
    if value is None:
        # The value behind the mark is an example, or the default.
        mark, value = "# ", (key.field.examples or [key.field.default])[0]
    extra = key.field.json_schema_extra
    more = f"; {extra['more']}" if isinstance(extra, dict) else ""
    line = f"{mark}{key.name} = {_format_value(value)}"
    return _comment(line, f"{key.field.description}{more}")


def _format_value(value: Any) -> str:
    """Formats a value as TOML, small numbers as 2e-5."""
    if isinstance(value, float) and 0 < value < 1e-2:
        digits, exponent = f"{value:e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return json.dumps(str(value) if isinstance(value, Path) else value)


def _comment(line: str, comment: str) -> list[str]:
    first = f"{line} ".ljust(_COMMENT_COLUMN)
    return _wrap(comment, f"{first}# ", f"{' ' * _COMMENT_COLUMN}# ")


def _wrap(text: str, first: str, rest: str) -> list[str]:
    return textwrap.TextWrapper(
        width=_WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    ).wrap(text)


if __name__ == "__main__":
    write_recipes(Path(__file__).parents[2] / "configs")
