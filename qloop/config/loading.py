"""Reads a config from a file and flags, checks the whole, and writes it: what a person types.

Every problem found is told in one message, each by its key and the place it stands in.

    >>> load_config(None, {"learning_rate": "3e-4"}).config.optimizer.learning_rate
    0.0003
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tomli
import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from qloop.config.keys import (
    KEYS,
    PROVENANCE,
    Config,
    LoraConfig,
    ModelConfig,
    show_value,
)
from qloop.errors import ConfigError, join_names


class LoadedConfig(NamedTuple):
    """A config, and for each key that was given the place it came from."""

    config: Config
    given_in: dict[str, str]


COMMAND_LINE = "command line"
ALIASES = {"base_model": "model_name"}
WANDB_KEYS = ("wandb_project",)
DATA_DIR_KEYS = ("data_dir", "data_type")


def load_config(file: Path | None, flags: Mapping[str, str]) -> LoadedConfig:
    """Loads a TOML or YAML file, lets flags replace its keys, and checks the whole.

    Args:
        file: A `.toml`, `.yaml` or `.yml` file; none to start from the defaults.
        flags: Values as typed on the command line, by key; an unknown name is reported like a wrong
            value.

    Raises:
        ConfigError: With every problem found, by the place it stands in.
    """
    problems: list[tuple[str, str, str]] = []  # place, key, what is wrong
    values: dict[str, Any] = {}
    given_in: dict[str, str] = {}
    for place, key, value in [*_read_file(file, problems), *_read_flags(flags, problems)]:
        values[key], given_in[key] = value, place

    # Once more without the wrong values, so that contradictions show in the same message.
    while True:
        sections: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            sections.setdefault(KEYS[key].section, {})[key] = value
        try:
            config = Config.model_validate(sections)
            break
        except ValidationError as error:
            found: dict[str, list[ErrorDetails]] = {}
            for detail in error.errors():
                found.setdefault(str(detail["loc"][1]), []).append(detail)
            for key, details in found.items():
                problems.append((given_in[key], key, _describe(details)))
                del values[key]
    wrong = {key for _, key, _ in problems}
    for keys, text in _find_contradictions(config, given_in):
        if not wrong & set(keys):
            place = next((given_in[key] for key in keys if key in given_in), COMMAND_LINE)
            problems.append((place, keys[0], text))
    if problems:
        raise ConfigError(_format_problems(problems))
    return LoadedConfig(config, given_in)


def describe_unused(config: Config, given_in: Mapping[str, str]) -> list[str]:
    """Says which keys of the file this run makes no use of, for its opening lines."""
    lines = []
    for keys, reason in _unused(config):
        given = [key for key in keys if key in given_in]
        if given:
            more = f" and {len(given) - 1} more" if given[1:] else ""
            lines.append(f"{given_in[given[0]]}: {given[0]}{more}: not used, {reason}")
    return lines


def dump_yaml(config: Config) -> str:
    """Writes every key that has a value, by section; `load_config` reads it back the same."""
    content = config.model_dump(mode="json", exclude_none=True)
    return yaml.dump(content, Dumper=_YamlDumper, sort_keys=False)


class _YamlLoader(yaml.SafeLoader):
    """YAML as people mean it: 1e-5 is a number, and a key that stands twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses what PyYAML would drop in silence: the first of two equal keys."""
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} stands twice")
        return super().construct_mapping(node, deep)


class _YamlDumper(yaml.SafeDumper):
    """Puts quotes around a name such as 1e-5, which our reader would take for a number."""


_NUMBER = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))
_YamlDumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))


def _read_file(
    file: Path | None, problems: list[tuple[str, str, str]]
) -> Iterator[tuple[str, str, Any]]:
    seen: set[str] = set()
    for written, value in _iterate_entries(file) if file else ():
        key = ALIASES.get(written, written)
        if key in seen:
            problems.append((str(file), key, "given twice"))
        elif key not in KEYS:
            problems.append((str(file), key, f"unknown key{_nearest(key)}"))
        elif value is None or value == "":
            problems.append((str(file), key, "has no value; leave the line out"))
        else:
            yield str(file), key, value
        seen.add(key)


def _iterate_entries(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields what stands under any section's heading, and what stands under none."""
    for heading, content in _parse(file).items():
        # An optimizer is a section if it is a table, and a key if it is text or nothing.
        is_table = isinstance(content, dict if heading in KEYS else dict | None)
        is_section = heading in Config.model_fields and is_table
        yield from ((content or {}) if is_section else {heading: content}).items()


def _parse(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".toml":
            content: Any = tomli.loads(text)
        elif file.suffix in (".yaml", ".yml"):
            content = yaml.load(text, Loader=_YamlLoader)
        else:
            raise ConfigError(f"{file}: config files end in .toml, .yaml or .yml")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except (tomli.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid {file.suffix[1:].upper()}: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{file}: holds no keys; it must hold lines such as max_steps = 500")
    return {str(key): value for key, value in content.items()}


def _read_flags(
    flags: Mapping[str, str], problems: list[tuple[str, str, str]]
) -> Iterator[tuple[str, str, Any]]:
    for key, text in flags.items():
        if key not in KEYS:
            problems.append((COMMAND_LINE, f"--{key}", f"unknown flag{_nearest(key, '--')}"))
            continue
        field = KEYS[key].field
        if text == "" and field.annotation != tuple[str, ...]:
            problems.append((COMMAND_LINE, key, "has no value; leave the flag out"))
            continue
        if field.annotation == tuple[str, ...]:
            yield COMMAND_LINE, key, [name.strip() for name in text.split(",") if name.strip()]
            continue
        try:
            # Only the type: the limits are checked with all other keys.
            annotation: Any = field.annotation
            adapter: TypeAdapter[Any] = TypeAdapter(annotation)
            yield COMMAND_LINE, key, adapter.validate_strings(text)
        except ValidationError as error:
            problems.append((COMMAND_LINE, key, _describe(error.errors())))


def _find_contradictions(
    config: Config, given_in: Mapping[str, str]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the keys that contradict each other, the one to name first, and what to do."""
    model, data, schedule = config.model, config.data, config.schedule
    for keys, reason in _unused(config):
        for key in keys:
            if given_in.get(key) == COMMAND_LINE:
                yield (key,), f"has no effect, {reason}; leave it out"
    for name in config.run.allow_change:
        if name not in KEYS and name not in PROVENANCE:
            yield ("allow_change",), f'names "{name}", which is no key{_nearest(name)}'
    every, save_steps = config.checkpoint.keep_every, config.checkpoint.save_steps
    if every % save_steps:
        yield (
            ("keep_every", "save_steps"),
            f"must be a multiple of save_steps = {save_steps}, got {every}",
        )
    yield from _find_contradictions_of_model(model, config.optimizer.optimizer)
    if data.train_file and data.dataset_name:
        yield ("train_file", "dataset_name"), "contradicts dataset_name; give one of the two"
    if schedule.min_learning_rate > schedule.learning_rate:
        yield (
            ("min_learning_rate", "learning_rate"),
            f"must not be above learning_rate = {schedule.learning_rate:g}, "
            f"got {schedule.min_learning_rate:g}",
        )
    if schedule.max_steps is not None and schedule.warmup_steps >= schedule.max_steps:
        default = "" if "warmup_steps" in given_in else " (the default)"
        yield (
            ("warmup_steps", "max_steps"),
            f"must be below max_steps = {schedule.max_steps}, got {schedule.warmup_steps}{default}",
        )


def _find_contradictions_of_model(
    model: ModelConfig, optimizer: str
) -> Iterator[tuple[tuple[str, ...], str]]:
    if model.model_config_file and model.training_method != "full":
        yield (
            ("training_method", "model_config_file"),
            f"{model.training_method} adapts a base, but model_config_file starts from random "
            "weights; use full, or give model_name instead",
        )
    if model.offload_activations and model.gradient_checkpointing not in ("auto", "full"):
        yield (
            ("offload_activations", "gradient_checkpointing"),
            "keeps the inputs of layers that are computed again, but gradient_checkpointing is "
            f"{model.gradient_checkpointing}; use full",
        )
    if model.offload_activations and model.compile is True:
        yield (
            ("offload_activations", "compile"),
            "cannot be compiled; leave one of the two out",
        )
    if optimizer == "muon" and model.training_method != "full":
        yield (
            ("optimizer", "training_method"),
            f"muon makes steps of whole matrices, but {model.training_method} trains two thin "
            "factors of each, whose product no such step fits; use adamw or adamw_8bit",
        )
    if model.model_config_file and model.tokenizer_name is None:
        yield ("model_config_file", "tokenizer_name"), "needs tokenizer_name beside it"


def _unused(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields groups of keys that this config never reads, with the reason."""
    if config.model.training_method == "full":
        yield tuple(LoraConfig.model_fields), "training_method is full"
    if config.data.train_file or config.data.dataset_name:
        name = "train_file" if config.data.train_file else "dataset_name"
        yield DATA_DIR_KEYS, f"the corpus comes from {name}"
    if not config.data.dataset_name:
        yield ("dataset_config_name",), "there is no dataset_name"
    if not config.report.wandb:
        yield WANDB_KEYS, "wandb is off"
    if config.data.eval_file:
        yield ("held_out_share",), "eval_file holds the held-out documents"
    if config.model.model_config_file:
        yield (
            ("model_name", "model_revision"),
            "model_config_file starts from random weights",
        )


def _nearest(key: str, prefix: str = "") -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), [*KEYS, *ALIASES], n=1, cutoff=0.6)
    if not near:
        return "; see `qloop train --help`"
    return f"; did you mean {prefix}{ALIASES.get(near[0], near[0])}?"


_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list of names",
    "path": "a path",
    "finite": "a finite number",
}
_LIMITS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _describe(details: list[ErrorDetails]) -> str:
    """Puts what pydantic finds of a key in our words: what must be, what was given.

    It has a finding for each type that a key may have, and for each wrong value of a list; the
    first says enough, but that a boolean is as good as a name.
    """
    detail = details[0]
    kind, context, given = detail["type"], detail.get("ctx", {}), show_value(detail["input"])
    if kind in _LIMITS:
        word, name = _LIMITS[kind]
        return f"must be {word} {context[name]:.15g}, got {given}"
    if kind == "literal_error":
        choices = str(context["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        if any(other["type"].startswith("bool") for other in details):
            choices += ["true", "false"]
        return f"unknown value {given}; choose {join_names(choices)}"
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}, got {given}"
    if kind in ("string_too_short", "too_short"):
        return "must not be empty"
    for prefix, words in _TYPES.items():
        if kind.startswith(prefix):
            return f"must be {words}, got {given}"
    return f"{detail['msg']}, got {given}"


def _format_problems(problems: list[tuple[str, str, str]]) -> str:
    lines = []
    for place in dict.fromkeys(place for place, _, _ in problems):
        here = [f"  {key}: {text}" for where, key, text in problems if where == place]
        lines += [f"{place}: {len(here)} problem{'s' if len(here) > 1 else ''}", *here]
    return "\n".join(lines)
