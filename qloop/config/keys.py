"""The config: one strict, frozen model per section; defaults < file < command line.

Every key's name is unique over all sections, so a section is a heading for the reader and nothing
else: a file may hold its keys under any known section, or under none. That is how a YAML file with
everything under `model:` loads, and why every key can be a flag of the same name.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo

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
    loss: Literal["auto", "logits", "chunked", "fused"] = Field(
        "auto",
        description="logits: all at once; chunked: some rows at a time, never all of them; fused: "
        "the same with a compiled kernel; auto: by device and size",
    )
    gradient_checkpointing: Literal["auto", "full", "selective", "off"] | bool = Field(
        "auto",
        description="computed again in the backward pass: full: whole layers, a third slower; "
        "selective: all but large matrix products; off: nothing; auto: what the memory asks for",
    )
    offload_activations: bool = Field(
        False, description="with gradient_checkpointing full: layers' inputs wait in host memory"
    )
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="compile the decoder layers before the first step; auto: on a GPU, for runs of "
        "200 micro-batches and more; false: the fused loss of a GPU is not compiled either",
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
PROVENANCE = ("corpus", "tokenizer", "frozen_weights", "step_blocks")


def iterate_keys() -> Iterator[Key]:
    """Yields every key of every section, in the order of the sections."""
    for section, section_field in Config.model_fields.items():
        section_model = section_field.annotation
        assert isinstance(section_model, type)
        assert issubclass(section_model, Section)
        for name, field in section_model.model_fields.items():
            yield Key(section, name, field)


KEYS = {key.name: key for key in iterate_keys()}


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
                changes.append(f"{key.name}: {show_value(old)} -> {show_value(new)}")
    return changes


def show_value(value: object) -> str:
    """Shows a key's value in a message: text in quotes."""
    return f'"{value}"' if isinstance(value, str | Path) else f"{value}"
