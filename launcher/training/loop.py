"""Training, as one rank does it: fetch, forward, backward, step, report, evaluate, save."""

import contextlib
import hashlib
from typing import Any

import torch
import torch.distributed as dist

from launcher.data.loader import BatchLoader, StepBatch
from launcher.data.sampler import GlobalOrder
from launcher.data.store import PreparedData
from launcher.planning.plan import Plan
from launcher.run_directory import append_json_line, read_json_lines
from launcher.tasks import Metrics
from launcher.training.batch_norm import share_running_statistics
from launcher.training.context import Phase, WorkerContext
from launcher.training.distributed import Agreement, max_over_ranks, sum_over_ranks
from launcher.training.evaluation import Evaluation, evaluate, generate
from launcher.training.export import checkpoint_to_export, export_checkpoint
from launcher.training.measuring import measure, watched_score, write_evaluation
from launcher.training.monitor import Throughput, memory_bytes
from launcher.training.numeric import Observed, StepJudge
from launcher.training.passes import StepOutcome, counts
from launcher.training.profiling import ProfilerWindow
from launcher.training.progress import TrainResult
from launcher.training.session import Session, open_session


def train(plan: Plan, context: WorkerContext, prepared: PreparedData, device: torch.device) -> TrainResult:
    """Train from the newest checkpoint (or the start) to the end, on this rank.

    Args:
        plan: of the run.
        context: this rank's place in it.
        prepared: the data, on a file system that this rank sees.
        device: where this rank computes; the process group has been joined.

    Returns:
        How it ended; the same on every rank but for the metrics, which only rank 0 has.
    """
    session = open_session(plan, context, prepared, device)
    progress, heartbeat = session.progress, context.heartbeat
    throughput = Throughput()
    loader = _train_loader(session)
    stop = False
    window = ProfilerWindow(plan.recipe.profiling, context.run_directory, context.rank)
    try:
        while not _finished(session) and not stop:
            heartbeat.enter(Phase.DATA)
            throughput.step_begins()
            window.step_begins(progress.step + 1)
            step_batch = _next_batch(session, loader)
            learning_rate = float(session.engine.get_lr()[0])
            outcome = train_step(session, step_batch)
            throughput.step_ends(plan.batch.global_batch_size)
            window.step_ends()
            if outcome.refused is not None:
                _tell_of_the_refused(session, outcome.refused)
                continue  # whoever asked to stop or to save asks again at the next step
            progress.step += 1
            session.around.after_step(progress.step, outcome.grad_norm)
            progress.consumed_samples = step_batch.consumed_samples
            heartbeat.stepped(progress.step)
            _watch_loss(session, outcome)
            stop = outcome.stop
            _after_step(session, step_batch, outcome, learning_rate, throughput)
    finally:
        window.close()
        loader.close()
        session.checkpoints.close()
        if session.swap is not None:
            session.swap.close()
    return _finish(session, stopped=not _finished(session))


def _tell_of_the_refused(session: Session, why: str) -> None:
    if session.context.rank == 0:
        session.context.heartbeat.notify(why)


def _watch_loss(session: Session, outcome: StepOutcome) -> None:
    """Judge the loss of the step before, and begin to sum this one's."""
    if session.skips_in_place:
        return
    session.losses.check()
    progress, size = session.progress, session.plan.batch.global_batch_size
    begin, end = progress.consumed_samples - size, progress.consumed_samples
    own = outcome.loss_sum if counts(session.plan, session.place) else torch.zeros_like(outcome.loss_sum)
    session.losses.note(own, Observed(progress.step, begin, end, outcome.num_targets))


def _next_batch(session: Session, loader: BatchLoader) -> StepBatch:
    """The next batch whose samples are not left out."""
    size = session.plan.batch.global_batch_size
    while True:
        batch = next(loader)
        if not session.losses.is_skipped(batch.consumed_samples - size, batch.consumed_samples):
            return batch


def _train_loader(session: Session) -> BatchLoader:
    plan = session.plan
    datasets = session.prepared.split("train")
    order = GlobalOrder(
        [len(dataset) for dataset in datasets],
        [source.weight for source in plan.recipe.data.sources],
        seed=plan.recipe.seed,
        shuffle=True,
    )
    return BatchLoader(
        datasets,
        order,
        plan.batch,
        data_parallel_rank=session.place.data,
        data_parallel_size=plan.layout.data_parallel_size,
        collate=session.collate,
        consumed_samples=session.progress.consumed_samples,
    )


def train_step(session: Session, step_batch: StepBatch) -> StepOutcome:
    """Make one optimizer step on this rank's part of a global batch."""
    plan, context, place = session.plan, session.context, session.place
    # Tensor-parallel ranks hold the same activations, so they must draw the same dropout.
    torch.manual_seed(
        _step_seed(plan.recipe.seed, session.progress.step, context.rank // plan.layout.tensor_parallel_size)
    )
    # Ranks of one sequence hold different targets; ranks of one tensor or pipeline group hold the same.
    own_targets = place.tensor == 0 and place.pipeline == 0
    targets = sum(map(session.task.num_targets, step_batch.micro_batches)) if own_targets else 0
    agreement = Agreement(
        targets,
        stop=context.stop.is_set(),
        save=session.triggers is not None and session.triggers.due(),
        device=session.device,
    )
    judge = None
    if session.skips_in_place:
        size = plan.batch.global_batch_size
        step, end = session.progress.step + 1, step_batch.consumed_samples
        judge = StepJudge(session.losses, step, end, size, counts=counts(plan, place))
    return session.passes.train(step_batch.micro_batches, agreement, judge)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of one rank's randomness (dropout) in one step: resuming needs no generator state, and ranks differ."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{step}:{rank}".encode(), digest_size=8).digest(), "big") >> 1


def _after_step(
    session: Session, step_batch: StepBatch, outcome: StepOutcome, learning_rate: float, throughput: Throughput
) -> None:
    recipe, progress, place = session.plan.recipe, session.progress, session.place
    if recipe.logging.sample_ids and (place.pipeline, place.sequence, place.tensor) == (0, 0, 0):
        path = session.context.run_directory.logs / f"samples_{session.context.rank:05d}.jsonl"
        append_json_line(path, {"step": progress.step, "sample_ids": step_batch.sample_ids.tolist()})
    if progress.step % recipe.logging.logging_steps == 0 or progress.step == 1 or _finished(session):
        _log(session, outcome, learning_rate, throughput)
    due = recipe.evaluation.eval_steps is not None and progress.step % recipe.evaluation.eval_steps == 0
    if due or progress.step >= session.max_steps:
        _evaluate(session)
    _keep_in_memory(session)
    reason = _reason_to_save(session, outcome)
    if reason is not None:
        session.losses.check()
        session.context.heartbeat.enter(Phase.SAVE)
        share_running_statistics(session.engine.module)
        session.checkpoints.save(session.engine, progress, reason)
        if session.triggers is not None:
            session.triggers.begun()
    for save in session.checkpoints.outcomes() if session.context.rank == 0 else []:
        record = {"step": save.step, "reason": save.reason, "saved": not save.errors}
        seconds = {"seconds": round(save.seconds, 4), "blocked_seconds": round(save.blocked_seconds, 4)}
        with contextlib.suppress(OSError):  # a full disk fails saves, which is what is being told here
            append_json_line(session.context.run_directory.saves, record | seconds)
        if not save.errors:
            session.context.heartbeat.saved(save.step)
        if session.triggers is not None:
            session.triggers.ended(save.step, save.reason, saved=not save.errors)


def _keep_in_memory(session: Session) -> None:
    section, progress = session.plan.recipe.fault_tolerance.memory_checkpoint, session.progress
    if section is None or progress.step % section.every_steps or _finished(session):
        return
    session.losses.check()
    session.context.heartbeat.enter(Phase.SAVE)
    share_running_statistics(session.engine.module)
    if session.checkpoints.keep_in_memory(session.engine, progress):
        session.context.heartbeat.kept(progress.step)


def _reason_to_save(session: Session, outcome: StepOutcome) -> str | None:
    save_steps = session.plan.recipe.checkpoint.save_steps
    if _finished(session):
        return "end"
    if outcome.stop:
        return "stop"
    if outcome.save:  # the ranks that do not know why are not asked: rank 0 writes the manifest
        return session.triggers.reason if session.triggers is not None else "interval"
    return "interval" if save_steps is not None and session.progress.step % save_steps == 0 else None


def _finished(session: Session) -> bool:
    patience = session.plan.recipe.evaluation.early_stopping_patience
    early = patience is not None and session.progress.evaluations_without_improvement >= patience
    return early or session.progress.step >= session.max_steps


def _log(session: Session, outcome: StepOutcome, learning_rate: float, throughput: Throughput) -> None:
    own = float(outcome.loss_sum) if counts(session.plan, session.place) else 0.0
    (loss_sum,) = sum_over_ranks(own, device=session.device)
    memory = max_over_ranks(memory_bytes(session.device), session.device)
    if session.monitor is None:
        return
    values: dict[str, Any] = {
        "loss": loss_sum / max(outcome.num_targets, 1),
        "learning_rate": learning_rate,
        "grad_norm": outcome.grad_norm,
        "consumed_samples": session.progress.consumed_samples,
        "memory_bytes": int(memory),
    }
    values |= session.monitor.rates(throughput, session.context.heartbeat.read())
    session.context.heartbeat.metrics = session.monitor.record(session.progress.step, values)


def _evaluate(session: Session) -> Evaluation | None:
    datasets = session.prepared.split("validation")
    if not any(len(dataset) for dataset in datasets):
        return None
    session.context.heartbeat.enter(Phase.EVALUATE)
    settings, progress = session.plan.recipe.evaluation, session.progress
    share_running_statistics(session.engine.module)
    average = session.around.average if session.plan.recipe.training.uses_average else None
    with contextlib.nullcontext() if average is None else average.in_use():
        result, metrics, texts = _measure(session, datasets)
    best, score = progress.best_eval_loss, watched_score(settings, result, metrics)
    progress.eval_loss, progress.eval_score, progress.eval_step = result.loss, score, progress.step
    if best is None or score < best - settings.early_stopping_threshold:
        progress.best_eval_loss, progress.evaluations_without_improvement = score, 0
    else:
        progress.evaluations_without_improvement += 1
    if session.monitor is not None:
        values = {"eval_loss": result.loss, "eval_perplexity": result.perplexity, "eval_targets": result.num_targets}
        values |= {f"eval_{name}": value for name, value in metrics.values.items()}
        record = session.monitor.record(progress.step, values)
        session.monitor.record_report(progress.step, metrics)
        write_evaluation(session.context.run_directory, progress.step, result, metrics)
        session.context.heartbeat.metrics = {**session.context.heartbeat.metrics, **record}
        session.monitor.record_texts(progress.step, texts)
    dist.barrier()
    return result


def _measure(session: Session, datasets: Any) -> tuple[Evaluation, Metrics, dict[str, str]]:
    """Loss, metrics and written texts of the model as it is now."""
    plan, metrics = session.plan, Metrics()
    if session.task.has_metrics:
        result, metrics = measure(session.engine, session.task, datasets, plan, session.place.data, session.device)
    else:
        result = evaluate(session.passes, session.collate, datasets, plan, session.place, session.device)
    tokenizer = session.prepared.tokenizer_directory
    texts = generate(session.engine, plan, tokenizer, session.progress.step, session.device, session.place)
    return result, metrics, texts


def _finish(session: Session, *, stopped: bool) -> TrainResult:
    plan, progress, run_directory = session.plan, session.progress, session.context.run_directory
    if session.context.rank == 0 and not stopped and plan.recipe.export.at_end:
        session.context.heartbeat.enter(Phase.EXPORT)
        chosen = checkpoint_to_export(run_directory.checkpoints, plan)
        export_checkpoint(chosen, plan, session.prepared.tokenizer_directory, run_directory.export)
    metrics: dict[str, Any] = {}
    if session.monitor is not None:
        session.monitor.close()
        for record in read_json_lines(run_directory.metrics):
            metrics |= record
    dist.barrier()
    session.context.heartbeat.enter(Phase.DONE)
    session.engine.destroy()
    return TrainResult(
        status="stopped" if stopped else "complete",
        step=progress.step,
        consumed_samples=progress.consumed_samples,
        early_stopped=not stopped and progress.step < session.max_steps,
        metrics=metrics,
    )
