"""The config: one strict, frozen model per section; defaults < file < command line.

The name of a key is unique over all sections, so sections are headings for the reader only: a file
may hold a key under any known section, or under none. That is how a YAML file with everything under
`model:` loads, and why every key can be a flag of the same name.

Each key is described once, here: `qloop train --help` prints its description, and the files in
configs/ have it as a comment, followed by the key's `more`; see `tests/config/recipes.py`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo

# Files hold paths as text and tuples as lists; these two types are converted, all others are
# strict.
FilePath = Annotated[Path, Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False)]


class Section(BaseModel):
    """A group of keys; unknown keys, wrong types and later changes are errors."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )


class RunConfig(Section):
    """Where the run is kept and how it starts."""

    experiment_name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="name of the run's folder; default: the model's short name",
        examples=["q-7b"],
    )
    output_dir: FilePath = Field(Path("output"), description="folder that holds all runs")
    seed: int = Field(
        42, ge=0, lt=2**32, description="determines data order, dropout and new weights"
    )
    resume: str = Field(
        "auto",
        description="auto: continue from the newest good checkpoint; never: start only where there "
        "is no run; restart: start at step 0 where all checkpoints are damaged; or the path of a "
        "checkpoint",
    )
    allow_change: Names = Field(
        (),
        description="keys that may differ from the run so far; also corpus, tokenizer, "
        "frozen_weights and step_blocks",
        json_schema_extra={"more": 'such as ["learning_rate"]'},
    )
    deterministic: bool = Field(
        False,
        description="use only deterministic GPU kernels, slower; a CPU repeats itself",
    )


class ModelConfig(Section):
    """The base model and which part of it is trained."""

    model_name: str = Field(
        "Qwen/Qwen2.5-7B-Instruct", min_length=1, description="hub name or local folder of the base"
    )
    model_revision: str | None = Field(
        None, description="branch, tag or commit of the base on the hub", examples=["main"]
    )
    model_config_file: FilePath | None = Field(
        None,
        description="config.json of a model to start from random weights, not from a base",
        examples=["config.json"],
    )
    tokenizer_name: str | None = Field(
        None,
        description="hub name or local folder of the tokenizer; default: the base's",
        examples=["folder"],
    )
    training_method: Literal["full", "lora", "qlora"] = Field(
        "full", description="full: all weights; lora: adapters; qlora: adapters on a 4-bit base"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 on GPUs that have it, else fp32; trained weights stay fp32"
    )
    attention: Literal[
        "auto", "documents", "sdpa", "eager", "flash_attention_2", "flash_attention_3"
    ] = Field(
        "auto",
        description="documents: each document on its own, without a mask; the others are those of "
        "transformers; auto: documents where the model allows it",
    )
    loss: Literal["auto", "logits", "chunked", "fused"] = Field(
        "auto",
        description="logits: all at once; chunked: some rows at a time, never all of them; fused: "
        "the same with a compiled kernel; auto: by device and size",
    )
    gradient_checkpointing: Literal["auto", "full", "selective", "off"] | bool = Field(
        "auto",
        description="recomputed in the backward pass: full: whole layers, a third slower; "
        "selective: everything but large matrix products; off: nothing; auto: as much as memory "
        "requires",
    )
    offload_activations: bool = Field(
        False, description="with gradient_checkpointing full: keep layer inputs in host memory"
    )
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="compile the decoder layers before the first step; auto: on a GPU, for runs of "
        "at least 200 micro-batches; false: do not compile the fused loss of a GPU either",
    )
    trust_remote_code: bool = Field(
        False, description="run Python code from the model's repository"
    )

    @field_validator("gradient_checkpointing")
    @classmethod
    def _name_switch(cls, value: str | bool) -> str:
        return value if isinstance(value, str) else "full" if value else "off"


class LoraConfig(Section):
    """Adapters; read by lora and qlora only."""

    lora_rank: int = Field(16, gt=0, description="rank of each adapter")
    lora_alpha: float = Field(32, gt=0, description="adapters are scaled by alpha / rank")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="dropout before each adapter")
    lora_target_modules: Names = Field(
        ("all-linear",),
        min_length=1,
        description="names of layers that get an adapter",
        json_schema_extra={"more": 'such as ["q_proj", "v_proj"]'},
    )
    modules_to_save: Names = Field(
        (), description="names of further layers, trained in full next to the adapters"
    )
    use_rslora: bool = Field(
        False,
        description="scale by alpha / sqrt(rank) instead (rsLoRA)",
        json_schema_extra={"more": "steadier at high ranks"},
    )
    use_dora: bool = Field(
        False,
        description="train magnitude and direction separately (DoRA)",
        json_schema_extra={"more": "slower, often better"},
    )


class DataConfig(Section):
    """The corpus: dataset_name, or train_file, or data_dir with data_type."""

    data_dir: FilePath = Field(
        Path("data"), description="folder with <data_type>_train.jsonl and <data_type>_test.jsonl"
    )
    data_type: str = Field(
        "filtered",
        pattern=r"^[A-Za-z0-9._-]+$",
        description="raw, filtered, described_filtered, or any name with files in data_dir",
    )
    train_file: FilePath | None = Field(
        None,
        description="JSONL, Parquet, or a folder of .q and .k files, instead of data_dir",
        examples=["corpus"],
    )
    eval_file: FilePath | None = Field(
        None,
        description="the held-out documents, in the same formats as train_file",
        examples=["held_out.jsonl"],
    )
    dataset_name: str | None = Field(
        None,
        description="a dataset of the Hugging Face hub, instead of data_dir",
        examples=["owner/name"],
        json_schema_extra={"more": "its test split is held out"},
    )
    dataset_config_name: str | None = Field(
        None, description="the configuration of dataset_name", examples=["default"]
    )
    text_field: str = Field(
        "text", min_length=1, description="name of the field or column that holds the text"
    )
    train_on_prompt: bool = Field(
        False, description="for prompts with completions: train on the prompt's tokens too"
    )
    deduplicate: bool = Field(
        True, description="leave out exact copies of a document; they are counted"
    )
    held_out_share: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="share of documents to hold out, by content, without eval_file; 0: none",
    )
    max_seq_length: int = Field(2048, ge=8, description="tokens in a block")
    packing: Literal["best_fit", "wrapped"] = Field(
        "best_fit", description="best_fit: short documents stay whole; wrapped: one after another"
    )
    cache_dir: FilePath | None = Field(
        None,
        description="folder for tokenised corpora; default: <output_dir>/.cache",
        examples=["output/.cache"],
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
        None,
        gt=0,
        description="steps of the run; 1000 if neither this nor num_epochs is given",
        examples=[1000],
    )
    num_epochs: float | None = Field(
        None,
        gt=0,
        description="passes over the corpus; with max_steps, the earlier end counts",
        examples=[3],
    )
    warmup_steps: int = Field(
        100, ge=0, description="steps of the linear rise to learning_rate; 0: none"
    )
    learning_rate: float = Field(2e-5, gt=0, description="the peak, reached after the warm-up")
    min_learning_rate: float = Field(0.0, ge=0, description="the end of the cosine")


class OptimizerConfig(Section):
    """The update of the weights; norms, biases and embeddings never decay."""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon"] = Field(
        "adamw",
        description="bytes of state per trained parameter: adamw 8; adamw_8bit 2 (embeddings 8); "
        "muon 4 for the layers' matrices, else 8 (full only)",
        json_schema_extra={
            "more": "paged_adamw, paged_adamw_8bit: the same, in memory that can be paged out "
            "(CUDA only); FSDP2 takes neither 8-bit nor paged; DeepSpeed takes adamw only"
        },
    )
    weight_decay: float = Field(0.01, ge=0, description="decoupled decay of the weight matrices")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to the denominator")
    max_grad_norm: float = Field(
        1.0, gt=0, description="limit of the gradient's global L2 norm; 1e9 never clips"
    )


class EvaluateConfig(Section):
    """Evaluation on held-out documents; always before step 1 and at the end."""

    eval_steps: int = Field(100, ge=0, description="steps between evaluations; 0: none in between")
    eval_batch_size: int = Field(
        1, gt=0, description="blocks in a forward pass; never changes results"
    )
    num_samples: int = Field(3, ge=0, description="completions of held-out prefixes at the end")
    sample_tokens: int = Field(64, gt=0, description="length of such a completion")


class CheckpointConfig(Section):
    """Checkpoints; the end of the run is always saved."""

    save_steps: int = Field(50, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(
        3, ge=2, description="newest good checkpoints to keep; at least 2, as one may be damaged"
    )
    keep_every: int = Field(
        0, ge=0, description="also keep every checkpoint at a multiple of this step; 0: none"
    )
    keep_best: bool = Field(True, description="also keep the one with the lowest held-out loss")
    async_checkpoint: bool = Field(
        True, description="write in the background, from a copy in host memory, where that fits"
    )
    share_above_gb: float = Field(
        20,
        ge=0,
        description="gigabytes of a checkpoint from which each process writes a part of it",
    )
    max_failed_saves: int = Field(
        3, gt=0, description="consecutive saves that may fail, on a full disk, before the run ends"
    )


class ReportConfig(Section):
    """What to report while the run goes on."""

    log_steps: int = Field(10, gt=0, description="steps between lines where there is no terminal")
    wandb: bool = Field(False, description="also report to Weights & Biases")
    wandb_project: str = Field("qloop", min_length=1, description="name of the project there")
    tensorboard: bool = Field(False, description="also write logs/tensorboard")


class Config(Section):
    """All sections; the argument of `train`."""

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


# Keys that may differ between the parts of one run: where it is kept, what it reports and saves,
# when it ends, and how much memory the same numbers take. A new end bends the cosine of the steps
# to come, which is the meaning of making a run longer.
MAY_CHANGE = frozenset(
    {
        *("loss", "gradient_checkpointing", "offload_activations"),
        *("experiment_name", "output_dir", "resume", "cache_dir", "max_steps", "num_epochs"),
        *("eval_steps", "eval_batch_size", "num_samples", "sample_tokens", "allow_change"),
        *CheckpointConfig.model_fields,
        *ReportConfig.model_fields,
    }
)

# What else a run is made of, as recorded in its checkpoints; allow_change takes these names too.
PROVENANCE = ("corpus", "tokenizer", "frozen_weights", "step_blocks")

RESUME_WORDS = ("auto", "never", "restart")


def iterate_keys() -> Iterator[Key]:
    """Yields every key of every section, in the order of the sections."""
    for section, section_field in Config.model_fields.items():
        section_model = section_field.annotation
        assert isinstance(section_model, type)
        assert issubclass(section_model, Section)
        for name, field in section_model.model_fields.items():
            yield Key(section, name, field)


KEYS = {key.name: key for key in iterate_keys()}
PATH_KEYS = frozenset(
    name
    for name, key in KEYS.items()
    if key.field.annotation is Path or FilePath in get_args(key.field.annotation)
)
# Their text is the path of a folder, or a name: on the hub, or one of RESUME_WORDS.
FOLDER_OR_NAME_KEYS = frozenset({"model_name", "tokenizer_name", "resume"})


def join_path(folder: Path, path: str | Path) -> str:
    """Joins a folder and a path relative to it (or absolute), and normalises the result.

    A `..` that follows a link stays: without it, the path would lead elsewhere.
    """
    joined = folder / path
    normal = os.path.normpath(joined)
    return normal if Path(normal).resolve() == joined.resolve() else str(joined)


def to_absolute(key: str, value: Any) -> Any:
    """Returns the value of a key; if it is the path of something local, as an absolute path."""
    is_path = key in PATH_KEYS and value is not None
    if key in FOLDER_OR_NAME_KEYS and value is not None and value not in RESUME_WORDS:
        is_path = Path(value).exists()
    return join_path(Path.cwd(), value) if is_path else value


def dump_config(config: Config) -> dict[str, dict[str, Any]]:
    """Returns all values by section, as JSON has them, with absolute paths.

    So they name the same files from any working directory.
    """
    return {
        section: {key: to_absolute(key, value) for key, value in values.items()}
        for section, values in config.model_dump(mode="json").items()
    }


def find_changes(before: Config, after: Config) -> list[str]:
    """Lists the keys whose change would make a run another run, as `key: before -> after`.

    Keys that `after` allows to change are left out. A relative path equals the absolute path of the
    same file, seen from the working directory.
    """
    changes = []
    for key in KEYS.values():
        if key.name in MAY_CHANGE or key.name in after.run.allow_change:
            continue
        old, new = (getattr(getattr(config, key.section), key.name) for config in (before, after))
        if old != new and to_absolute(key.name, old) != to_absolute(key.name, new):
            changes.append(f"{key.name}: {show_value(old)} -> {show_value(new)}")
    return changes


def show_value(value: object) -> str:
    """Formats a value for a message, text in quotes."""
    return f'"{value}"' if isinstance(value, str | Path) else f"{value}"


def as_flag(value: object) -> str:
    """Formats a value as it is typed on the command line: `true`, `q_proj,v_proj`."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
