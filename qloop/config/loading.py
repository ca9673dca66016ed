"""Builds a config from a file and flags, checks it as a whole, and writes it.

One message reports every problem found, by the file or command line that it is in.

    >>> load_config(None, {"learning_rate": "3e-4"}).config.schedule.learning_rate
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
    FOLDER_OR_NAME_KEYS,
    KEYS,
    PATH_KEYS,
    PROVENANCE,
    RESUME_WORDS,
    Config,
    LoraConfig,
    ModelConfig,
    dump_config,
    join_path,
    show_value,
)
from qloop.errors import ConfigError, join_names


class LoadedConfig(NamedTuple):
    """A config, and where each of its given keys was typed: a file's name or COMMAND_LINE."""

    config: Config
    given_in: dict[str, str]


class _Entry(NamedTuple):
    """A key's value or the problem with it, and where it was typed."""

    source: str
    key: str
    value: Any = None
    problem: str = ""


COMMAND_LINE = "command line"
ALIASES = {"base_model": "model_name"}


def load_config(
    file: Path | None, flags: Mapping[str, str], relative_to: Path | None = None
) -> LoadedConfig:
    """Loads a TOML or YAML file, lets flags replace its keys, and checks the whole.

    Args:
        file: A `.toml`, `.yaml` or `.yml` file; None to start from the defaults.
        flags: Values as typed on the command line, by key; an unknown name is reported like a wrong
            value. Their paths are relative to the working directory.
        relative_to: Folder that the file's paths are relative to; the file's own if None.

    Raises:
        ConfigError: With every problem found.
    """
    entries = [*(_read_file(file, relative_to) if file else ()), *_read_flags(flags)]
    problems = [entry for entry in entries if entry.problem]
    values = {entry.key: entry.value for entry in entries if not entry.problem}
    given_in = {entry.key: entry.source for entry in entries if not entry.problem}
    config = _validate(values, given_in, problems)
    wrong = {problem.key for problem in problems}
    for keys, text in _find_contradictions(config, given_in):
        if not wrong & set(keys):
            source = next((given_in[key] for key in keys if key in given_in), COMMAND_LINE)
            problems.append(_Entry(source, keys[0], problem=text))
    if problems:
        raise ConfigError(_format_problems(problems))
    return LoadedConfig(config, given_in)


def describe_unused(config: Config, given_in: Mapping[str, str]) -> list[str]:
    """Describes the given keys that have no effect on this run, for its opening lines."""
    lines = []
    for keys, reason in iterate_unused(config):
        given = [key for key in keys if key in given_in]
        if given:
            more = f" and {len(given) - 1} more" if given[1:] else ""
            lines.append(f"{given_in[given[0]]}: {given[0]}{more}: not used, {reason}")
    return lines


def dump_yaml(config: Config) -> str:
    """Writes every key that has a value, by section, with absolute paths, for `load_config`."""
    content = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in dump_config(config).items()
    }
    return yaml.dump(content, Dumper=_YamlDumper, sort_keys=False)


class _YamlLoader(yaml.SafeLoader):
    """YAML as people mean it: 1e-5 is a number, and a repeated key is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses repeated keys; PyYAML drops all but the last without a word."""
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is given twice")
        return super().construct_mapping(node, deep)


class _YamlDumper(yaml.SafeDumper):
    """Puts quotes around a name such as 1e-5, which the loader would take for a number."""


_NUMBER = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))
_YamlDumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))


def _read_file(file: Path, relative_to: Path | None) -> Iterator[_Entry]:
    entries = list(_iterate_entries(file))
    folder = _find_base(file, dict(entries)) if relative_to is None else relative_to
    seen: set[str] = set()
    for written, value in entries:
        key = ALIASES.get(written, str(written))
        if key in seen:
            yield _Entry(str(file), key, problem="given twice")
        elif key not in KEYS:
            yield _Entry(str(file), key, problem=f"unknown key{_suggest(key)}")
        elif value is None or value == "":
            yield _Entry(str(file), key, problem="has no value; leave the line out")
        else:
            yield _Entry(str(file), key, _resolve(key, value, folder))
        seen.add(key)


def _find_base(file: Path, values: Mapping[str, Any]) -> Path:
    """Returns the folder that a file's paths are relative to.

    That is its own, except for a config.yaml in the folder of a run: older versions wrote there
    what had been typed, relative to the working directory; this one writes absolute paths.
    """
    output_dir = Path(str(values.get("output_dir", "/")))
    is_in_it = file.resolve().parent.parent == output_dir.resolve()
    return Path() if is_in_it and not output_dir.is_absolute() else file.parent


def _resolve(key: str, value: Any, folder: Path) -> Any:
    """Returns a file's value, relative to the working directory or absolute if it is a path."""
    if not isinstance(value, str):
        return value
    if key in PATH_KEYS:
        return join_path(folder, value)
    if key not in FOLDER_OR_NAME_KEYS or value in RESUME_WORDS:
        return value
    path = join_path(folder, value)
    if Path(path).is_dir():
        return path
    if value.startswith(("./", "../")):
        # Without the ./ a folder that is missing would be taken for a model of the hub.
        return path if Path(path).is_absolute() else f"./{path}"
    return value


def _iterate_entries(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields keys and values, those under the heading of any section and those under none."""
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


def _read_flags(flags: Mapping[str, str]) -> Iterator[_Entry]:
    for key, text in flags.items():
        if key not in KEYS:
            problem = f"unknown flag{_suggest(key, '--')}"
            yield _Entry(COMMAND_LINE, f"--{key}", problem=problem)
            continue
        annotation: Any = KEYS[key].field.annotation
        if annotation == tuple[str, ...]:
            names = [name.strip() for name in text.split(",") if name.strip()]
            yield _Entry(COMMAND_LINE, key, names)
        elif text == "":
            yield _Entry(COMMAND_LINE, key, problem="has no value; leave the flag out")
        else:
            try:
                # Only the type: the limits are checked with all other keys.
                adapter: TypeAdapter[Any] = TypeAdapter(annotation)
                yield _Entry(COMMAND_LINE, key, adapter.validate_strings(text))
            except ValidationError as error:
                yield _Entry(COMMAND_LINE, key, problem=_describe(error.errors()))


def _validate(
    values: dict[str, Any], given_in: Mapping[str, str], problems: list[_Entry]
) -> Config:
    """Builds a config from the values that can be used; adds the others to the problems."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        sections.setdefault(KEYS[key].section, {})[key] = value
    try:
        return Config.model_validate(sections)
    except ValidationError as error:
        found: dict[str, list[ErrorDetails]] = {}
        for detail in error.errors():
            found.setdefault(str(detail["loc"][1]), []).append(detail)
    problems += [
        _Entry(given_in[key], key, problem=_describe(details)) for key, details in found.items()
    ]
    # Again without the wrong values, so that the same message can report contradictions.
    rest = {key: value for key, value in values.items() if key not in found}
    return _validate(rest, given_in, problems)


def _find_contradictions(
    config: Config, given_in: Mapping[str, str]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields keys that contradict each other, first the one to report, and the problem."""
    model, data, schedule = config.model, config.data, config.schedule
    for keys, reason in iterate_unused(config):
        for key in keys:
            if given_in.get(key) == COMMAND_LINE:
                yield (key,), f"has no effect, {reason}; leave it out"
    for name in config.run.allow_change:
        if name not in KEYS and name not in PROVENANCE:
            yield ("allow_change",), f'names "{name}", which is no key{_suggest(name)}'
    every, saves = config.checkpoint.keep_every, config.checkpoint.save_steps
    if every % saves:
        problem = f"must be a multiple of save_steps = {saves}, got {every}"
        yield ("keep_every", "save_steps"), problem
    yield from _find_contradictions_of_model(model, config.optimizer.optimizer)
    if data.train_file and data.dataset_name:
        yield ("train_file", "dataset_name"), "contradicts dataset_name; give one of the two"
    peak, end = schedule.learning_rate, schedule.min_learning_rate
    if end > peak:
        problem = f"must not be above learning_rate = {peak:g}, got {end:g}"
        yield ("min_learning_rate", "learning_rate"), problem
    steps, warmup = schedule.max_steps, schedule.warmup_steps
    if steps is not None and warmup >= steps:
        default = "" if "warmup_steps" in given_in else " (the default)"
        problem = f"must be below max_steps = {steps}, got {warmup}{default}"
        yield ("warmup_steps", "max_steps"), problem


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
            "keeps the inputs of recomputed layers, but gradient_checkpointing is "
            f"{model.gradient_checkpointing}; use full",
        )
    if model.offload_activations and model.compile is True:
        yield ("offload_activations", "compile"), "cannot be compiled; leave out one of the two"
    if optimizer == "muon" and model.training_method != "full":
        yield (
            ("optimizer", "training_method"),
            f"muon updates whole matrices, but {model.training_method} trains two thin factors of "
            "each, to whose product its update does not apply; use adamw or adamw_8bit",
        )
    if model.model_config_file and model.tokenizer_name is None:
        yield ("model_config_file", "tokenizer_name"), "needs tokenizer_name too"


def iterate_unused(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields groups of keys that have no effect with this config, and the reason."""
    if config.model.training_method == "full":
        yield tuple(LoraConfig.model_fields), "training_method is full"
    if config.data.train_file or config.data.dataset_name:
        name = "train_file" if config.data.train_file else "dataset_name"
        yield ("data_dir", "data_type"), f"the corpus comes from {name}"
    if not config.data.dataset_name:
        yield ("dataset_config_name",), "there is no dataset_name"
    if not config.report.wandb:
        yield ("wandb_project",), "wandb is off"
    if config.data.eval_file:
        yield ("held_out_share",), "eval_file holds the held-out documents"
    if config.model.model_config_file:
        yield ("model_name", "model_revision"), "model_config_file starts from random weights"


def _suggest(key: str, prefix: str = "") -> str:
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
    """Words what pydantic finds wrong with one key: what its value must be, and what it is.

    There is an error for each type of the key, and for each wrong item of a list. The first says
    enough, except that it does not list true and false where a key takes a name or a boolean.
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
    words = next((f"must be {_TYPES[name]}" for name in _TYPES if kind.startswith(name)), None)
    return f"{words or detail['msg']}, got {given}"


def _format_problems(problems: list[_Entry]) -> str:
    lines = []
    for source in dict.fromkeys(problem.source for problem in problems):
        here = [f"  {key}: {text}" for where, key, _, text in problems if where == source]
        lines += [f"{source}: {len(here)} problem{'s' if len(here) > 1 else ''}", *here]
    return "\n".join(lines)
