"""The config: one strict, frozen model per section; defaults < file < command line.

Every key's name is unique over all sections, so a section is a heading for the reader and nothing
else: a file may hold its keys under any known section, or under none. That is how a YAML file with
everything under `model:` loads, and why every key can be a flag of the same name.

    >>> load_config(None, {"learning_rate": "3e-4"}).config.optimizer.learning_rate
    0.0003
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tomli
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from qloop.errors import ConfigError, join_names

# Files hold paths as text and tuples as lists; these two kinds are converted, all others are
# strict.
FilePath = Annotated[Path, Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False)]


class Section(BaseModel):
    """A group of keys; unknown keys, wrong types and later changes are errors."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )


class RunConfig(Section):
    """Where the run lives and how it starts."""

    experiment_name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="name of the run's folder in output_dir; the model's short name if not given",
    )
    output_dir: FilePath = Field(Path("output"), description="folder that holds all runs")
    seed: int = Field(42, ge=0, lt=2**32, description="decides data order, dropout and new weights")
    resume: str = Field(
        "auto",
        description="auto: go on from the newest good checkpoint; never: start only where no run "
        "is; restart: start at step 0 where all checkpoints are damaged; or a checkpoint's path",
    )
    allow_change: Names = Field(
        (),
        description="keys that may differ from the run's so far, and corpus, tokenizer, "
        "frozen_weights or step_blocks",
    )
    deterministic: bool = Field(
        False, description="only deterministic GPU kernels, slower; a CPU run always repeats itself"
    )


class ModelConfig(Section):
    """The base model and what of it is trained."""

    model_name: str = Field(
        "Qwen/Qwen2.5-7B-Instruct", min_length=1, description="hub name or local folder of the base"
    )
    model_revision: str | None = Field(
        None, description="branch, tag or commit of the base on the hub"
    )
    model_config_file: FilePath | None = Field(
        None, description="config.json of a model to start from random weights, instead of a base"
    )
    tokenizer_name: str | None = Field(
        None, description="hub name or local folder of the tokenizer; the base's if not given"
    )
    training_method: Literal["full", "lora", "qlora"] = Field(
        "full", description="all weights, adapters, or adapters on a 4-bit base"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 on GPUs that have it, else fp32; trained weights stay fp32"
    )
    attention: Literal[
        "auto", "documents", "sdpa", "eager", "flash_attention_2", "flash_attention_3"
    ] = Field(
        "auto",
        description="documents: without a mask, each document for itself; the others are "
        "transformers' own; auto: documents where the model allows it",
    )
    loss: Literal["auto", "logits", "chunked", "torch", "liger"] = Field(
        "auto",
        description="logits: all at once; the others never hold all: chunked: some rows at a time, "
        "torch: linear_cross_entropy, liger: liger-kernel; auto: by device and size",
    )
    gradient_checkpointing: Literal["auto", "full", "selective", "off"] | bool = Field(
        "auto",
        description="computed again in the backward pass: full: whole layers, a third slower; "
        "selective: all but matrix products; off: nothing; auto: what the memory asks for",
    )
    offload_activations: bool = Field(
        False, description="with gradient_checkpointing full: layers' inputs wait in host memory"
    )
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="compile the decoder layers before the first step; auto: on a GPU, for runs of "
        "more than a few steps",
    )
    trust_remote_code: bool = Field(
        False, description="run Python code that the model's repository brings along"
    )

    @field_validator("gradient_checkpointing")
    @classmethod
    def _name_switch(cls, value: str | bool) -> str:
        return value if isinstance(value, str) else "full" if value else "off"


class LoraConfig(Section):
    """Adapters, for lora and qlora."""

    lora_rank: int = Field(16, gt=0, description="rank of each adapter")
    lora_alpha: float = Field(32, gt=0, description="adapters are scaled by alpha / rank")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="dropout before each adapter")
    lora_target_modules: Names = Field(
        ("all-linear",), min_length=1, description="layers that get an adapter, by name"
    )
    modules_to_save: Names = Field(
        (), description="layers trained whole beside the adapters, by name"
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead (rsLoRA)")
    use_dora: bool = Field(False, description="train magnitude and direction apart (DoRA)")


class DataConfig(Section):
    """The corpus: one of dataset_name, train_file, or data_dir with data_type."""

    data_dir: FilePath = Field(
        Path("data"), description="folder with <data_type>_train.jsonl and <data_type>_test.jsonl"
    )
    data_type: str = Field(
        "filtered",
        pattern=r"^[A-Za-z0-9._-]+$",
        description="raw, filtered, described_filtered, or any name that data_dir has files of",
    )
    train_file: FilePath | None = Field(
        None, description="JSONL, Parquet, or a folder of .q and .k files, instead of data_dir"
    )
    eval_file: FilePath | None = Field(
        None, description="the held-out documents, in the same formats as train_file"
    )
    dataset_name: str | None = Field(
        None, description="a dataset of the Hugging Face hub, instead of data_dir"
    )
    dataset_config_name: str | None = Field(None, description="the hub dataset's configuration")
    text_field: str = Field(
        "text", min_length=1, description="name of the field or column that holds the text"
    )
    train_on_prompt: bool = Field(
        False, description="with prompt and completion: learn the prompt's tokens too"
    )
    deduplicate: bool = Field(True, description="leave out exact copies of a document; all counted")
    held_out_share: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="share of documents never trained on, chosen by content, where no eval file is",
    )
    max_seq_length: int = Field(2048, ge=8, description="tokens in a block")
    packing: Literal["best_fit", "wrapped"] = Field(
        "best_fit", description="best_fit: short documents stay whole; wrapped: one after another"
    )
    cache_dir: FilePath | None = Field(
        None, description="folder for tokenised corpora; <output_dir>/.cache if not given"
    )


class BatchConfig(Section):
    """The size of a step."""

    batch_size: int = Field(1, gt=0, description="blocks in a micro-batch, per GPU")
    gradient_accumulation_steps: int = Field(
        8, gt=0, description="micro-batches in a step, per GPU"
    )


class ScheduleConfig(Section):
    """The length of the run and its learning rate over time."""

    max_steps: int | None = Field(
        None, gt=0, description="steps of the run; 1000 if neither this nor num_epochs is given"
    )
    num_epochs: float | None = Field(
        None, gt=0, description="passes over the corpus; with max_steps, the earlier end counts"
    )
    warmup_steps: int = Field(100, ge=0, description="steps of linear rise to learning_rate")
    learning_rate: float = Field(2e-5, gt=0, description="the peak, reached after the warm-up")
    min_learning_rate: float = Field(0.0, ge=0, description="where the cosine ends")


class OptimizerConfig(Section):
    """The update of the weights; norms, biases and embeddings never decay."""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon"] = Field(
        "adamw",
        description="adamw keeps 8 bytes a trained parameter, adamw_8bit 2, paged ones in memory "
        "that yields to others; muon, with full only, 4 for the layers' matrices",
    )
    weight_decay: float = Field(0.01, ge=0, description="decoupled decay of the weight matrices")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to the denominator")
    max_grad_norm: float = Field(
        1.0, gt=0, description="limit of the gradient's global L2 norm; 1e9 never clips"
    )


class EvaluateConfig(Section):
    """Measuring on the held-out documents; it happens before step 1 and at the end in any case."""

    eval_steps: int = Field(100, ge=0, description="steps between evaluations; 0: none in between")
    eval_batch_size: int = Field(
        1, gt=0, description="blocks in a forward pass; never changes results"
    )
    num_samples: int = Field(3, ge=0, description="completions of held-out prefixes at the end")
    sample_tokens: int = Field(64, gt=0, description="length of such a completion")


class CheckpointConfig(Section):
    """Saving; the end of the run is always saved."""

    save_steps: int = Field(50, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(
        3, ge=2, description="newest good checkpoints to keep; at least 2, as one may get damaged"
    )
    keep_every: int = Field(
        0, ge=0, description="keep those of every so many steps too, for good; 0: none"
    )
    keep_best: bool = Field(True, description="keep the one of the lowest held-out loss too")
    async_checkpoint: bool = Field(
        True, description="write behind the loop, from a copy in host memory, where that fits"
    )
    share_above_gb: float = Field(
        20, ge=0, description="with several processes, each writes a part of a checkpoint this big"
    )
    max_failed_saves: int = Field(
        3, gt=0, description="saves that may fail in a row, on a full disk, before the run ends"
    )


class ReportConfig(Section):
    """What a person sees while it runs."""

    log_steps: int = Field(10, gt=0, description="steps between lines where there is no terminal")
    wandb: bool = Field(False, description="report to Weights & Biases too")
    wandb_project: str = Field("qloop", min_length=1, description="the project's name there")
    tensorboard: bool = Field(False, description="write logs/tensorboard too")


class Config(Section):
    """All sections; what `train` gets."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    report: ReportConfig = ReportConfig()


class Key(NamedTuple):
    """A key with the section it belongs to."""

    section: str
    name: str
    field: FieldInfo


class LoadedConfig(NamedTuple):
    """A config, and for each key that was given the place it came from."""

    config: Config
    origins: dict[str, str]


COMMAND_LINE = "command line"
ALIASES = {"base_model": "model_name"}

# Keys that may differ between the parts of one run: where it lies, what it reports and saves, when
# it ends, and how much memory the same numbers take. A new end bends the cosine of the steps to
# come, which is what making a run longer means.
MAY_CHANGE = frozenset(
    {
        *("loss", "gradient_checkpointing", "offload_activations"),
        *("experiment_name", "output_dir", "resume", "cache_dir", "max_steps", "num_epochs"),
        *("eval_steps", "eval_batch_size", "num_samples", "sample_tokens", "allow_change"),
        *CheckpointConfig.model_fields,
        *ReportConfig.model_fields,
    }
)

# What else a run is made of, as a checkpoint holds it; allow_change takes these names too.
ORIGINS = ("corpus", "tokenizer", "frozen_weights", "step_blocks")

WANDB_KEYS = ("wandb_project",)
DATA_DIR_KEYS = ("data_dir", "data_type")


def iterate_keys() -> Iterator[Key]:
    """Yields every key of every section, in the order of the sections."""
    for section, section_field in Config.model_fields.items():
        section_model = section_field.annotation
        assert isinstance(section_model, type)
        assert issubclass(section_model, Section)
        for name, field in section_model.model_fields.items():
            yield Key(section, name, field)


KEYS = {key.name: key for key in iterate_keys()}


def load_config(file: Path | None, flags: Mapping[str, str]) -> LoadedConfig:
    """Loads a TOML or YAML file, lets flags replace its keys, and checks the whole.

    Args:
        file: A `.toml`, `.yaml` or `.yml` file; none to start from the defaults.
        flags: Values as typed on the command line, by key; an unknown name is reported like a wrong
            value.

    Raises:
        ConfigError: With every problem found, by the place it stands in.
    """
    problems: list[tuple[str, str, str]] = []  # origin, key, what is wrong
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, key, value in [*_read_file(file, problems), *_read_flags(flags, problems)]:
        values[key], origins[key] = value, origin

    while (
        True
    ):  # once more without the wrong values, so that contradictions show in the same message
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
                problems.append((origins[key], key, _describe(details)))
                del values[key]
    wrong = {key for _, key, _ in problems}
    for keys, text in _find_contradictions(config, origins):
        if not wrong & set(keys):
            origin = next((origins[key] for key in keys if key in origins), COMMAND_LINE)
            problems.append((origin, keys[0], text))
    if problems:
        raise ConfigError(_format_problems(problems))
    return LoadedConfig(config, origins)


def describe_unused(config: Config, origins: Mapping[str, str]) -> list[str]:
    """Says which keys of the file this run makes no use of, for its opening lines."""
    lines = []
    for keys, reason in _unused(config):
        given = [key for key in keys if key in origins]
        if given:
            more = f" and {len(given) - 1} more" if given[1:] else ""
            lines.append(f"{origins[given[0]]}: {given[0]}{more}: not used, {reason}")
    return lines


def find_changes(before: Config, after: Config) -> list[str]:
    """Lists the keys whose change would make a run another run, as `key: before -> after`.

    What `after` allows to change is not listed.
    """
    changes = []
    for key in KEYS.values():
        if key.name not in MAY_CHANGE and key.name not in after.run.allow_change:
            old, new = (
                getattr(getattr(config, key.section), key.name) for config in (before, after)
            )
            if old != new:
                changes.append(f"{key.name}: {_show(old)} -> {_show(new)}")
    return changes


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
    config: Config, origins: Mapping[str, str]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the keys that contradict each other, the one to name first, and what to do."""
    model, data, schedule = config.model, config.data, config.schedule
    for keys, reason in _unused(config):
        for key in keys:
            if origins.get(key) == COMMAND_LINE:
                yield (key,), f"has no effect, {reason}; leave it out"
    for name in config.run.allow_change:
        if name not in KEYS and name not in ORIGINS:
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
        default = "" if "warmup_steps" in origins else " (the default)"
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


def _show(value: object) -> str:
    return f'"{value}"' if isinstance(value, str | Path) else f"{value}"


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
    kind, context, given = detail["type"], detail.get("ctx", {}), _show(detail["input"])
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
    for origin in dict.fromkeys(origin for origin, _, _ in problems):
        here = [f"  {key}: {text}" for place, key, text in problems if place == origin]
        lines += [f"{origin}: {len(here)} problem{'s' if len(here) > 1 else ''}", *here]
    return "\n".join(lines)
