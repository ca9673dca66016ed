"""Computes the memory and traffic of many GPUs on paper: nothing here is measured.

python tests/benchmarks/arithmetic.py

The model has P parameters. A rank runs forward and backward over T tokens in a micro-batch, a times
a step, on n GPUs, 8 to a machine. Bytes per parameter:

    one GPU, DDP   fp32 weights 4, gradients 4, AdamW's moments 8: all on every rank. Autocast casts
                   the layers to bf16 when they are used.
    FSDP2          the same 16, divided by n; and the largest unit gathered in bf16 (2), twice,
                   since the next one is fetched while this one computes
    ZeRO-2         bf16 weights 2 on every rank; fp32 gradients 4, weights 4 and moments 8 divided
                   by n
    ZeRO-3         those 18 divided by n, and the largest unit in bf16, twice

Bytes a rank sends in a step, with the usual rings (a gather or a reduce-scatter of S bytes sends
(n-1)/n S, an all-reduce twice that); gradients are summed in fp32 everywhere:

    DDP            one all-reduce of the gradients: 2 x 4 P
    FSDP2, ZeRO-3  each micro-batch gathers bf16 weights for forward and for backward (2 x 2 P), and
                   reduce-scatters the gradients (4 P)
    ZeRO-2         each micro-batch reduce-scatters the gradients (4 P), and each step gathers bf16
                   weights (2 P)

Computing takes 8 P T FLOPs a micro-batch (2 forward, 4 backward, 2 for the forward pass that
gradient checkpointing repeats) at 40 % of an H100's 989 TFLOP/s in bf16. A ring over several
machines runs at the speed of the link between them: 50 GB/s a GPU (400 Gbit/s); within one machine
450 GB/s (NVLink 4, one direction). The share is sending / (sending + computing), as if nothing
overlapped. All of these engines send while they compute, so the share is an upper limit, and a step
is bound by the network where it is above one half.

Activations are not included: with gradient checkpointing they are about 2 bytes x T x hidden size x
layers, and the logits 4 bytes x T x vocabulary.
"""

import itertools
from typing import NamedTuple

GPUS_PER_MACHINE = 8
WITHIN_MACHINE, BETWEEN_MACHINES = 450e9, 50e9  # bytes a second
FLOPS = 0.4 * 989e12
MICRO_BATCH_TOKENS = 8192
STEP_MICRO_BATCHES = 512  # over all ranks: 4.2 million tokens a step


class Model(NamedTuple):
    """Sizes as in the config.json of the published model."""

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int

    @property
    def layer_parameters(self) -> int:
        """One decoder layer of Qwen2: attention with biases, a gated MLP, two norms."""
        head = self.hidden // self.heads
        key_value = 2 * self.key_value_heads * head
        attention = self.hidden * (2 * self.hidden + key_value) + self.hidden + key_value
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Input and output embeddings are not tied in these sizes."""
        layers = self.layers * self.layer_parameters
        return layers + 2 * self.embedding_parameters + self.hidden


MODELS = [
    Model("Qwen2.5-7B", 3584, 28, 18944, 28, 4, 152064),
    Model("Qwen2.5-32B", 5120, 64, 27648, 40, 8, 152064),
]
ENGINES = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")


def state_bytes(model: Model, engine: str, num_gpus: int) -> float:
    """Returns the bytes of weights, gradients and moments that a rank holds."""
    p = model.parameters
    unit = 2 * 2 * max(model.layer_parameters, model.embedding_parameters)
    return {
        "DDP": 16 * p,
        "FSDP2": 16 * p / num_gpus + unit,
        "ZeRO-2": 2 * p + 16 * p / num_gpus,
        "ZeRO-3": 18 * p / num_gpus + unit,
    }[engine]


def sent_bytes(model: Model, engine: str, num_gpus: int, accumulation: int) -> float:
    """Returns the bytes that a rank sends in a step."""
    p, share = model.parameters, (num_gpus - 1) / num_gpus
    return (
        share
        * {
            "DDP": 2 * 4 * p,
            "FSDP2": accumulation * (2 * 2 * p + 4 * p),
            "ZeRO-2": accumulation * 4 * p + 2 * p,
            "ZeRO-3": accumulation * (2 * 2 * p + 4 * p),
        }[engine]
    )


def compute_seconds(model: Model, accumulation: int) -> float:
    """Returns the seconds of forward and backward of a step on a rank."""
    return 8 * model.parameters * MICRO_BATCH_TOKENS * accumulation / FLOPS


def send_seconds(sent: float, num_gpus: int) -> float:
    """Returns the seconds that sending takes at the speed of the slowest link."""
    return sent / (WITHIN_MACHINE if num_gpus <= GPUS_PER_MACHINE else BETWEEN_MACHINES)


def format_table() -> str:
    """Returns the table in Markdown."""
    lines = [
        "| model | GPUs | micro-batches a rank | engine | state a GPU | sent a step | share |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, num_gpus, engine in itertools.product(MODELS, (8, 64, 512), ENGINES):
        accumulation = STEP_MICRO_BATCHES // num_gpus
        state = state_bytes(model, engine, num_gpus)
        sent = sent_bytes(model, engine, num_gpus, accumulation)
        sending = send_seconds(sent, num_gpus)
        share = sending / (sending + compute_seconds(model, accumulation))
        fits = "" if state < 80e9 else " (does not fit in 80 GB)"
        lines.append(
            f"| {model.name}, {model.parameters / 1e9:.2f} B | {num_gpus} | {accumulation} "
            f"| {engine} | {state / 1e9:,.1f} GB{fits} | {sent / 1e9:,.0f} GB | {share:.0%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(format_table())
