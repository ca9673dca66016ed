"""The command line: every config key is a flag of `qloop train`.

Commands import what is heavy themselves, so that `qloop --help` answers at once.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Any, get_args

import click

from qloop import __version__
from qloop.errors import QloopError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class TrainCommand(click.Command):
    """A command whose flags are the config's keys, listed by section in its help.

    Its function gets the config that they make, and notes on unused keys, next to its own options.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # load_config reports unknown flags, together with all other problems.
        settings = {"ignore_unknown_options": True, "allow_extra_args": True}
        super().__init__(*args, **kwargs)
        self.context_settings = {**settings, "max_content_width": 110}
        file = click.Path(path_type=Path)
        text = "TOML or YAML file with keys"
        self.params.insert(0, click.Option(["--config", "config_file"], type=file, help=text))

    def invoke(self, ctx: click.Context) -> Any:
        """Turns the flags into a config, and calls the function."""
        from qloop.config.keys import KEYS

        flags = {name: ctx.params.pop(name) for name in KEYS}
        config, notes = _prepare_run(ctx.args, ctx.params.pop("config_file"), flags)
        ctx.params.update(config=config, notes=notes)
        return super().invoke(ctx)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Adds a flag per key, once the command is used."""
        from qloop.config.keys import iterate_keys

        params = super().get_params(ctx)
        known = {param.name for param in params}
        return params + [
            _build_flag(key.name, key.field) for key in iterate_keys() if key.name not in known
        ]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the flags by section."""
        from qloop.config.keys import KEYS, Config

        rows: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record:
                section = KEYS[str(param.name)].section if param.name in KEYS else "options"
                rows.setdefault(section, []).append(record)
        for section in ("options", *Config.model_fields):
            with formatter.section(section):
                formatter.write_dl(rows[section])


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qloop")
def cli() -> None:
    """Continue the pretraining of causal language models on Q (kdb+) code."""


@cli.command(cls=TrainCommand)
def train(config: Any, notes: list[str]) -> None:
    """Train a model; the same command, typed again, continues where the run stopped.

    Every key of a config file is also a flag, which replaces the value in the file.
    """
    from qloop.report.console import quieten_libraries
    from qloop.train import train as run_training

    quieten_libraries()
    run_training(config, notes)


@cli.command(cls=TrainCommand)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="steps to time; as many more are traced",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    default="profile.json.gz",
    show_default=True,
    help="Chrome trace to write",
)
def profile(config: Any, notes: list[str], steps: int, trace: Path) -> None:
    """Measure where the time of a training step goes.

    Takes the flags of `qloop train`. Makes a few steps of that run in a temporary folder and writes
    a trace; the run itself is not touched.
    """
    from qloop.debug.profiling import profile as profile_steps
    from qloop.report.console import quieten_libraries

    quieten_libraries()
    profile_steps(config, notes, steps, trace, click.echo)


@cli.command(cls=TrainCommand)
@click.option(
    "--device",
    help="h200, h100, a100-80, l40s, rtx4090, cpu and others; default: the device of this machine",
)
@click.option(
    "--device_memory_gb",
    type=click.FloatRange(min=0, min_open=True),
    help="memory of a device in gigabytes; default: as its kind has",
)
@click.option(
    "--num_processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="number of devices, one for each process",
)
@click.option(
    "--engine",
    type=click.Choice(["ddp", "fsdp2", "zero2", "zero3"]),
    default="ddp",
    show_default=True,
    help="how several processes share the work",
)
@click.option(
    "--flops_use",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.4,
    show_default=True,
    help="share of the device's matrix-product FLOP/s that training reaches, to estimate the time",
)
def plan(
    config: Any,
    notes: list[str],
    device: str | None,
    device_memory_gb: float | None,
    num_processes: int,
    engine: str,
    flops_use: float,
) -> None:
    """Estimate memory, disk space and time of a run for each method, and what makes it fit.

    Takes the flags of `qloop train`. Uses shapes only: reads no weights and no corpus, and needs no
    GPU.
    """
    from qloop.planning.plan import find_placement
    from qloop.planning.table import show_plans
    from qloop.report.console import quieten_libraries

    quieten_libraries()
    placement = find_placement(config, device, device_memory_gb, num_processes, engine)
    click.echo(show_plans(config, placement, flops_use))


@cli.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    default="bf16",
    show_default=True,
    help="type of the weights",
)
@click.option("--base", help="hub name or folder of an adapter's base, if it has moved")
def export(checkpoint: Path, destination: Path, dtype: str, base: str | None) -> None:
    """Write CHECKPOINT as a plain model folder; adapters are merged into their base.

    CHECKPOINT is the folder of a checkpoint, or that of a run for its newest good checkpoint.
    """
    from qloop.checkpoint.export import export as export_model
    from qloop.report.console import quieten_libraries

    quieten_libraries()
    export_model(checkpoint, destination, dtype, base, click.echo)


@cli.group()
def checkpoint() -> None:
    """Inspect the checkpoints of a run; nothing is changed."""


run_argument = click.argument("run", type=click.Path(exists=True, path_type=Path))


@checkpoint.command("list")
@run_argument
@click.option("--fast", is_flag=True, help="check names and sizes only, read no file")
def list_(run: Path, fast: bool) -> None:
    """Show step, size, loss and state of each checkpoint of RUN, and how it is damaged if it is."""
    from qloop.checkpoint.listing import format_table, list_checkpoints

    click.echo(format_table(list_checkpoints(run, not fast), not fast))


@checkpoint.command()
@run_argument
def verify(run: Path) -> None:
    """Check every byte of each checkpoint of RUN, the folder of a run or of one checkpoint.

    The exit code is 74 if a checkpoint that the run could continue from is damaged.
    """
    from qloop.checkpoint.listing import list_checkpoints
    from qloop.errors import CheckpointError

    damaged = []
    for path, manifest, problem in list_checkpoints(run):
        click.echo(f"{path}: {f'good, {len(manifest.files)} files' if manifest else problem}")
        if manifest is None and not path.name.startswith("damaged-"):
            damaged.append(path.name)
    if damaged:
        raise CheckpointError(
            f"{run}: damaged: {', '.join(damaged)}; a run moves them aside and goes on from an "
            "older one"
        )


def main() -> None:
    """Runs a command; a mistake of the user ends in a message and exit code, not a traceback."""
    code = _run()
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        # Everything is written and closed. A normal exit of the interpreter ends the threads of
        # torch.distributed inside C++ code that cannot be unwound, which aborts the process now
        # and then.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _run() -> int:
    try:
        cli.main(standalone_mode=False)
    except QloopError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return 78
    except (KeyboardInterrupt, click.Abort):
        print("interrupted; nothing that was saved is lost", file=sys.stderr)
        return 130
    return 0


def _prepare_run(
    extra: list[str], config_file: Path | None, flags: dict[str, str | None]
) -> tuple[Any, list[str]]:
    """Returns the config that was typed, and notes on its unused keys; does not import torch."""
    from qloop.config.loading import describe_unused, load_config

    _stop_with_launcher()
    unknown = {text.lstrip("-").split("=")[0]: "" for text in extra if text.startswith("-")}
    stray = [text for text in extra if not text.startswith("-")]
    if stray and not unknown:
        raise click.UsageError(f"unexpected {' '.join(stray)}; every value follows its --flag")
    typed = {name: value for name, value in flags.items() if value is not None}
    config, given_in = load_config(config_file, {**typed, **unknown})
    # Threads that spin while they wait make a step several times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return config, describe_unused(config, given_in)


def _stop_with_launcher() -> None:
    """Asks Linux for a SIGTERM when `accelerate launch` ends before this process does.

    With one process, the launcher forwards no signals; with several, it forwards some and ends at
    others. Without a launcher there is nothing to follow: a run may outlive its shell.
    """
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if is_launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _build_flag(name: str, field: Any) -> click.Option:
    """Builds the flag of a key; load_config converts and checks its text."""
    default = field.default
    if isinstance(default, tuple):
        shown = ",".join(default) or "none"
    elif isinstance(default, bool):
        shown = str(default).lower()
    else:
        shown = "none" if default is None else str(default)
    is_switch = bool in (field.annotation, *get_args(field.annotation))
    # A switch may stand alone: --wandb. Any other flag takes what follows as its value.
    options: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if is_switch else {}
    return click.Option(
        [f"--{name}"],
        type=str,
        metavar="[true|false]" if is_switch else "VALUE",
        **options,
        help=f"{field.description}  [{shown}]",
    )
