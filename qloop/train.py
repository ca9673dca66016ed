"""The loop: read this first.

Every step is a pure function of its number: which blocks it reads, its learning rate and its random
numbers follow from (config, step). So there is no loader, no scheduler and no random state here,
and nothing to restore but tensors and three counters.
"""

import math
import time
from pathlib import Path

import torch

from qloop.config.keys import Config
from qloop.distributed.stops import StopRequest
from qloop.errors import DivergenceError, StoppedError
from qloop.evaluation.completions import sample_completions
from qloop.evaluation.held_out import evaluate
from qloop.planning.advice import explain_out_of_memory
from qloop.report.metrics import build_step_record
from qloop.run import Assembly, assemble
from qloop.schedule import learning_rate_at
from qloop.steps import seed_at, seed_forward_pass
from qloop.storage.folders import show_bytes


def train(config: Config, notes: list[str]) -> None:
    """Trains until the last step, going on from a checkpoint if there is one.

    Args:
        config: The whole config.
        notes: Lines that the person should see at the start.

    Raises:
        QloopError: Something that the config names cannot be used.
        DivergenceError: A step's loss or gradient norm is not finite; its update was not made.
        StoppedError: A signal asked for it; the run is saved.
        LockedError: Another process uses the run's folder.
        PeerError: Another process of this run has ended.
    """
    with StopRequest() as stop:
        parts = assemble(config, notes)
        try:
            run_steps(parts, stop)
            finish(parts)
            parts.accelerator.wait_for_everyone()
        except BaseException as raised:
            error = parts.peers.explain(explain_memory(parts, raised))
            parts.peers.stop()
            if not isinstance(error, KeyboardInterrupt):  # that means now
                parts.checkpoints.close()
            state = getattr(error, "state", "failed")
            parts.report.write_status(state, parts.progress.step, str(error) or repr(error))
            if error is raised:
                raise
            raise error from raised
        finally:
            parts.close()


def explain_memory(parts: Assembly, error: BaseException) -> BaseException:
    """Gives what was raised; in place of torch's lack of memory, an error that says what to do."""
    is_full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    if not is_full or parts.plan is None:
        return error
    return explain_out_of_memory(parts.plan, parts.progress.step + 1, parts.meter.measure_peak())


def run_steps(parts: Assembly, stop: StopRequest) -> None:
    """Makes every step that is still to make."""
    config, accelerator, device = parts.config, parts.accelerator, parts.accelerator.device
    model, engine, progress, report = parts.model, parts.engine, parts.progress, parts.report
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    accumulation = parts.step.accumulation
    schedule, max_grad_norm = config.schedule, config.optimizer.max_grad_norm

    report.write_status("running", progress.step)
    if progress.step == 0:
        measure_held_out(parts)
    model.train()
    stop.is_running = True
    parts.peers.expect_signs_of_life()
    while progress.step < parts.last_step:
        started = time.perf_counter()

        # 1. Fetch the whole step first, so that its loss can be divided by its true number of
        # targets, over all ranks.
        block_ids, micro_batches, target_tokens = parts.reader.read(progress.blocks_seen)
        divisor = max(1, target_tokens)  # blocks in the middle of long prompts have no target
        fetched = time.perf_counter()

        # 2. Forward and backward. backward divides by the accumulation and ranks average their
        # gradients; both are undone here, so that the gradient is that of the mean over all
        # targets of the step.
        loss_sum = torch.zeros((), device=device)
        for number, micro_batch in enumerate(micro_batches):
            seed_forward_pass(seed_at(config.run.seed, progress.step, number * num_ranks + rank))
            with accelerator.accumulate(model):
                micro_loss = parts.loss.sum(model, micro_batch.to(device))
                engine.backward(micro_loss * (accumulation * num_ranks / divisor))
            loss_sum += micro_loss.detach()
        grad_norm = engine.measure_grad_norm()
        # The step's one wait for a GPU.
        loss, norm = torch.stack(
            [accelerator.reduce(loss_sum, "sum") / divisor, grad_norm]
        ).tolist()
        computed = time.perf_counter()

        # 3. Refuse, clip, update: a bad step never reaches the weights. Clipping comes after the
        # check, since it spreads one NaN over every gradient.
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergenceError(progress.step + 1, loss, norm, block_ids.tolist())
        engine.clip_gradients(max_grad_norm, grad_norm)
        learning_rate = learning_rate_at(
            progress.step, schedule.learning_rate, schedule.min_learning_rate,
            schedule.warmup_steps, parts.last_step,
        )  # fmt: skip
        engine.step(learning_rate)
        updated = time.perf_counter()

        # 4. Account for the step; then report, evaluate and save, each when it is due.
        progress.advance(len(block_ids), target_tokens)
        record = build_step_record(
            progress, loss, learning_rate, norm, target_tokens, block_ids, parts.meter,
            times=(started, fetched, computed, updated),
        )  # fmt: skip
        report.write_step(record)
        held_out_loss = None
        if progress.is_due(config.evaluate.eval_steps, parts.last_step):
            held_out_loss = measure_held_out(parts)
        parts.checkpoints.poll()  # how a save behind the loop went, if one has ended
        request = stop.agreed(accelerator)
        is_end = progress.step == parts.last_step or (request is not None and request.stops)
        if request or progress.is_due(config.checkpoint.save_steps, parts.last_step):
            report.flush()
            parts.checkpoints.save(engine, progress, loss, held_out_loss, is_end)
            report.write_status("running", progress.step)
        if request and request.stops and progress.step < parts.last_step:
            raise StoppedError(
                f"{request.signal_name}: stopped and saved after step {progress.step} of "
                f"{parts.last_step}; the same command goes on from there"
            )


def measure_held_out(parts: Assembly) -> float | None:
    """Measures on the held-out documents, if there are any, reports it, and gives the loss."""
    if parts.held_out is None:
        return None
    evaluation = evaluate(
        parts.engine.unwrapped,
        parts.loss,
        parts.held_out.store,
        parts.held_out.index,
        parts.config.evaluate.eval_batch_size,
        parts.accelerator,
    )
    parts.report.write_evaluation(parts.progress.step, evaluation)
    return evaluation.loss


def finish(parts: Assembly) -> None:
    """Writes the results, and tells the person where everything is and what to type next."""
    samples = []
    if parts.held_out and parts.config.evaluate.num_samples:
        samples = sample_completions(
            parts.engine.unwrapped,
            parts.tokenizer,
            parts.held_out.store,
            parts.config.evaluate.num_samples,
            parts.config.evaluate.sample_tokens,
            parts.config.run.seed,
            parts.accelerator,
        )
    parts.report.write_results(samples)
    if parts.plan is not None:
        # A CPU's allocator keeps no account, so that mapped files and what it wastes are in it.
        on_cpu = parts.meter.device.type == "cpu"
        extra = ", beside what the process had without a model" if on_cpu else ""
        parts.report.say(
            f"memory     {show_bytes(parts.meter.measure_peak())} at the peak{extra}; "
            f"{show_bytes(parts.plan.peak_bytes)} of tensors planned for a step"
        )
    parts.report.write_status("finished", parts.progress.step)
    checkpoint = parts.run.checkpoint_path(parts.progress.step)
    if not checkpoint.exists():  # a branch that had no step left to make
        checkpoint = Path(parts.config.run.resume)
    parts.report.say_farewell(parts.progress.step, checkpoint)
