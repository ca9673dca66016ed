"""The files in configs/: each is what its recipe says, loads, and holds every key."""

import re
from pathlib import Path

import pytest
import tomli
from recipes import RECIPES, format_recipe, write_recipes

from qloop.config.keys import KEYS
from qloop.config.loading import load_config
from qloop.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"

recipes = pytest.mark.parametrize("name", RECIPES)


def values_of(name: str) -> dict[str, object]:
    config = load_config(CONFIGS / f"{name}.toml", {}).config
    return {key.name: getattr(getattr(config, key.section), key.name) for key in KEYS.values()}


@recipes
def test_a_file_is_what_its_recipe_says(name):
    file = CONFIGS / f"{name}.toml"
    is_current = file.exists() and file.read_text(encoding="utf-8") == format_recipe(name)
    assert is_current, f"run `python tests/config/recipes.py` to write configs/{name}.toml anew"


def test_there_is_a_recipe_for_each_file():
    stray = {file.stem for file in CONFIGS.iterdir()} - RECIPES.keys()
    assert not stray, f"add {stray} to RECIPES in tests/config/recipes.py, or delete the files"


def test_recipes_are_written_to_a_folder(tmp_path):
    write_recipes(tmp_path)
    assert (tmp_path / "demo.toml").read_text(encoding="utf-8") == format_recipe("demo")


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_every_key_without_a_default_has_an_example(key):
    has_value = key.field.default is not None or key.field.examples
    assert has_value, f"give {key.name} examples=[...] in keys.py, for the files in configs/"


@recipes
def test_every_line_fits_and_has_a_comment(name):
    for line in format_recipe(name).splitlines():
        assert len(line) <= 110, f"shorten the description in keys.py that makes this line: {line}"
        assert not line or "# " in line or line == "#", f"give a comment to this line: {line}"


@recipes
def test_an_example_behind_a_mark_is_a_value_that_the_key_takes(name, tmp_path):
    """Brought back alone it may need another key or contradict one, but is never malformed."""
    text, file = format_recipe(name), tmp_path / "config.toml"
    for line in text.splitlines():
        if re.match("# [a-z_]+ = ", line):
            file.write_text(text.replace(line, line[2:]))
            try:
                load_config(file, {})
            except ConfigError as error:
                problems = str(error).splitlines()[1:]
                assert all(re.search("contradicts|needs|adapts", text) for text in problems), line


@recipes
def test_a_file_has_the_values_of_its_recipe_and_else_the_defaults(name):
    sections = tomli.loads(format_recipe(name)).values()
    written = {key: value for section in sections for key, value in section.items()}
    recipe = RECIPES[name].values
    assert {key: written.get(key) for key in recipe} == recipe
    others = {key.name: key.field.default for key in KEYS.values() if key.name not in recipe}
    assert others.items() <= values_of(name).items()


def test_each_method_has_a_recipe():
    methods = {"demo": "full", "full": "full", "lora": "lora", "qlora": "qlora"}
    assert {name: values_of(name)["training_method"] for name in RECIPES} == methods


def test_full_is_the_published_recipe():
    published = {
        "training_method": "full",
        "learning_rate": 1e-5,
        "max_steps": 800,
        "save_steps": 100,
    }
    assert published.items() <= values_of("full").items()


def test_the_demo_names_its_files_as_seen_from_the_repository(monkeypatch):
    """The values that checkpoints of the demo have always held."""
    monkeypatch.chdir(CONFIGS.parent)
    config = load_config(Path("configs/demo.toml"), {}).config
    assert config.data.train_file == Path("qloop/demo/corpus")
    assert config.model.tokenizer_name == "qloop/demo/tokenizer"
