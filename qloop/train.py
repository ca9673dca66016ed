"""The loop: read this first.

Every step is a pure function of its number: its blocks, learning rate and random numbers follow
from (config, step). So there is no loader, scheduler or random state here, and nothing to restore
but tensors and three counters.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from qloop.config.keys import Config
from qloop.distributed.stops import StopRequest
from qloop.errors import DivergenceError, StoppedError
from qloop.evaluation.completions import sample_completions
from qloop.evaluation.held_out import evaluate
from qloop.opening import describe_next, describe_run
from qloop.planning.advice import explain_out_of_memory
from qloop.planning.plan import Plan
from qloop.report.metrics import StepRecord
from qloop.run import Run, build_run
from qloop.schedule import learning_rate_at
from qloop.steps import seed_at, seed_forward_pass
from qloop.storage.folders import show_bytes


def train(config: Config, notes: Sequence[str] = ()) -> None:
    """Trains to the last step, from the newest checkpoint if there is one.

    Args:
        config: The whole config.
        notes: Lines for the opening of the log.

    Raises:
        QloopError: Something that the config names cannot be used.
        DivergenceError: A step's loss or gradient norm is not finite; its update was not made.
        StoppedError: A signal asked for it; the run is saved.
        LockedError: Another process uses the run's folder.
        PeerError: Another process of this run has ended.
    """
    with StopRequest() as stop:
        run = build_run(config, notes)
        try:
            run.report.say("\n".join(describe_run(run)))
            run_steps(run, stop)
            finish(run)
            run.accelerator.wait_for_everyone()
        except BaseException as raised:
            error = run.peers.explain(explain_memory(run, raised))
            run.peers.stop()
            if not isinstance(error, KeyboardInterrupt):  # which means: leave now
                run.checkpoints.close()
            state = getattr(error, "state", "failed")
            run.report.write_status(state, run.progress.step, str(error) or repr(error))
            if error is raised:
                raise
            raise error from raised
        finally:
            run.close()


def make_step(run: Run) -> StepRecord:
    """Makes one optimizer update; every quantity of it is a local of this function.

    Raises:
        DivergenceError: Loss or gradient norm is not finite; nothing was updated.
    """
    accelerator, engine, model, progress = run.accelerator, run.engine, run.model, run.progress
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    started = time.perf_counter()

    # 1. Fetch: the blocks and targets of all ranks, and this rank's micro-batches.
    block_ids, micro_batches, target_tokens = run.batches.read(progress.blocks_seen)
    divisor = max(1, target_tokens)  # blocks in the middle of a long prompt have no target
    fetched = time.perf_counter()

    # 2. Forward and backward: the gradient is that of the mean over all targets of all ranks.
    loss_sum = torch.zeros((), device=accelerator.device)
    for number, micro_batch in enumerate(micro_batches):
        seed_forward_pass(seed_at(run.config.run.seed, progress.step, number * num_ranks + rank))
        with accelerator.accumulate(model):
            micro_loss_sum = run.target_loss.sum(model, micro_batch.to(accelerator.device))
            engine.backward(micro_loss_sum, divisor)
        loss_sum += micro_loss_sum.detach()
    mean_loss = accelerator.reduce(loss_sum, "sum") / divisor
    grad_norm = engine.measure_grad_norm()
    loss, norm = torch.stack([mean_loss, grad_norm]).tolist()  # the only wait for a GPU
    computed = time.perf_counter()

    # 3. Refuse, clip, update: a bad step never reaches the weights. All ranks see the same numbers.
    # Clipping comes after the check, since it spreads one NaN over every gradient.
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise DivergenceError(progress.step + 1, loss, norm, block_ids.tolist())
    engine.clip_gradients(run.config.optimizer.max_grad_norm, grad_norm)
    schedule = run.config.schedule
    learning_rate = learning_rate_at(
        progress.step, schedule.learning_rate, schedule.min_learning_rate,
        schedule.warmup_steps, run.last_step,
    )  # fmt: skip
    engine.step(learning_rate)  # also clears the gradients
    updated = time.perf_counter()

    # 4. Account for it.
    progress.advance(len(block_ids), target_tokens)
    return run.meter.build_record(
        progress, loss, learning_rate, norm, target_tokens, block_ids,
        times=(started, fetched, computed, updated),
    )  # fmt: skip


def run_steps(run: Run, stop: StopRequest) -> None:
    """Makes the remaining steps; after each, reports, evaluates and saves where that is due."""
    config, progress, report, last_step = run.config, run.progress, run.report, run.last_step
    report.write_status("running", progress.step)
    if progress.step == 0:
        measure_held_out(run)
    run.model.train()
    stop.is_running = True  # from here on, a signal waits for the end of its step
    run.peers.expect_signs_of_life()
    while progress.step < last_step:
        record = make_step(run)
        report.write_step(record)
        held_out_loss = None
        if progress.is_due(config.evaluate.eval_steps, last_step):
            held_out_loss = measure_held_out(run)
        run.checkpoints.poll()  # commits a background save whose files are written
        request = stop.agreed(run.accelerator)  # the same on every rank
        ends = progress.step == last_step or (request is not None and request.stops)
        if request or progress.is_due(config.checkpoint.save_steps, last_step):
            report.flush()
            run.checkpoints.save(run.engine, progress, record.loss, held_out_loss, ends)
            report.write_status("running", progress.step)
        if request and request.stops and progress.step < last_step:
            raise StoppedError(
                f"{request.signal_name}: stopped and saved after step {progress.step} of "
                f"{last_step}; the same command goes on from there"
            )


def measure_held_out(run: Run) -> float | None:
    """Evaluates on the held-out documents and reports it; returns the loss, or None without any."""
    held_out = run.data.held_out
    if held_out is None:
        return None
    evaluation = evaluate(
        run.engine.unwrapped,
        run.target_loss,
        held_out.store,
        held_out.index,
        run.config.evaluate.eval_batch_size,
        run.accelerator,
    )
    run.report.write_evaluation(run.progress.step, evaluation)
    return evaluation.loss


def finish(run: Run) -> None:
    """Writes the results, and tells the user where everything is and what to type next."""
    samples = []
    if run.data.held_out and run.config.evaluate.num_samples:
        samples = sample_completions(
            run.engine.unwrapped,
            run.data.tokenizer,
            run.data.held_out.store,
            run.config.evaluate.num_samples,
            run.config.evaluate.sample_tokens,
            run.config.run.seed,
            run.accelerator,
        )
    run.report.write_results(samples)
    plan = run.built.plan
    if isinstance(plan, Plan):
        # A CPU's allocator keeps no statistics: mapped files and waste are in the measured peak.
        on_cpu = run.accelerator.device.type == "cpu"
        extra = ", besides the process without a model" if on_cpu else ""
        run.report.say(
            f"memory     {show_bytes(run.meter.measure_peak())} at the peak{extra}; "
            f"{show_bytes(plan.peak_bytes)} of tensors planned for a step"
        )
    run.report.write_status("finished", run.progress.step)
    checkpoint = run.folder.directory.checkpoint_path(run.progress.step)
    if not checkpoint.exists():  # a branch without a step of its own
        checkpoint = Path(run.config.run.resume)
    run.report.say_farewell(run.progress.step, checkpoint, describe_next(run, checkpoint))


def explain_memory(run: Run, error: BaseException) -> BaseException:
    """Returns the error; instead of torch's out of memory, one that says what to change."""
    is_full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    if not is_full or not isinstance(run.built.plan, Plan):
        return error
    return explain_out_of_memory(run.built.plan, run.progress.step + 1, run.meter.measure_peak())
