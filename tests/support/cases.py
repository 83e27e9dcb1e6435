"""What the ranks of `ranks.py` can be asked to do; runs in their processes."""

import ctypes
import gc
import os
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from launcher.checkpoints import folders
from launcher.data.store import PreparedData
from launcher.errors import RecipeError
from launcher.models.parallel import whole_logits
from launcher.models.sequence import whole_sequences
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory
from launcher.training.context import Heartbeat, Phase, WorkerContext
from launcher.training.engine import check_precision
from launcher.training.export import export_checkpoint
from launcher.training.loop import train
from launcher.training.session import open_session


def _context(run_directory: str) -> WorkerContext:
    rank = int(os.environ["RANK"])
    return WorkerContext(RunDirectory.at(run_directory), rank, int(os.environ["WORLD_SIZE"]), rank, Heartbeat(rank))


def run(run_directory: str, data: str, stop_after: int | None = None) -> dict[str, Any]:
    """Train the plan in a run directory; `stop_after` asks to stop during that step's successor.

    The result has the rank's notices besides.
    """
    plan = Plan.model_validate_json((Path(run_directory) / "plan.json").read_bytes())
    context = _context(run_directory)
    if stop_after is not None:
        _stop_at(context, stop_after)
    try:
        result = train(plan, context, PreparedData.load(Path(data)), torch.device("cpu"))
        return {**asdict(result), "notices": context.heartbeat.read().notices}
    finally:
        forget_groups()


def pretend_fp16(supported: bool | None) -> None:
    """Let DeepSpeed believe that this processor computes in fp16, or that it does not; `None`: let it ask again."""
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    asks = kind.__dict__.get("_asks") or kind.is_fp16_supported
    kind._asks = asks
    kind.is_fp16_supported = asks if supported is None else lambda self: supported


def refusal_of_precision(precision: str, supported: bool) -> str | None:
    """What `check_precision` says of a processor that computes in 16 bit of that kind or does not."""
    from deepspeed.accelerator import get_accelerator

    kind, name = type(get_accelerator()), f"is_{precision}_supported"
    asks = getattr(kind, name)
    setattr(kind, name, lambda self: supported)
    try:
        check_precision(precision)
    except RecipeError as error:
        return str(error)
    finally:
        setattr(kind, name, asks)
    return None


def forget_groups() -> None:
    """Let the next case make other groups: DeepSpeed keeps those of a process in module globals.

    And end them: each of gloo's has a thread that wakes ten times a second, and ranks live through hundreds of cases.
    """
    from deepspeed.module_inject.layers import set_autotp_mode
    from deepspeed.utils import groups

    groups._release_process_group_references()
    ALL_ATTENTION_FUNCTIONS._local_mapping.pop("sdpa", None)
    set_autotp_mode(training=False)
    for group in list(c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


def compiled_graphs() -> int:
    """How many graphs torch's compiler has made in this process."""
    counted: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return counted


def compile_no_more() -> None:
    """Turn torch's compiler off again, as it is in these processes from the start."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch._dynamo.config.disable = True
    torch._dynamo.reset()


def _stop_at(context: WorkerContext, step: int) -> None:
    heartbeat = context.heartbeat
    enter = heartbeat.enter

    def watching(phase: Any) -> None:
        if heartbeat.step >= step:
            context.stop.set()
        enter(phase)

    heartbeat.enter = watching  # type: ignore[method-assign]  # watched on purpose


def run_hidden(run_directory: str, data: str, rank: int, folder: str) -> dict[str, Any]:
    """Train, but one rank sees an empty disk of its own in the place of a folder, as a node without the mount would."""
    if int(os.environ["RANK"]) == rank:
        hide(folder)
    return run(run_directory, data)


def hide(folder: str) -> None:
    """Mount an empty tmpfs over a folder, for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    private, recursive, new_mounts = 1 << 18, 1 << 14, 0x20000
    calls = (
        lambda: libc.unshare(new_mounts),
        lambda: libc.mount(b"none", b"/", None, private | recursive, None),
        lambda: libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, b"size=1m"),
    )
    for call in calls:
        if call() != 0:
            raise OSError(ctypes.get_errno(), "cannot mount")


def logits(run_directory: str, data: str, input_ids: list[list[int]]) -> list[Any]:
    """Logits of the engine resumed from the newest checkpoint.

    With a pipeline, the last stage's ranks have them, each for its part of the vocabulary.
    """
    plan = Plan.model_validate_json((Path(run_directory) / "plan.json").read_bytes())
    session = open_session(plan, _context(run_directory), PreparedData.load(Path(data)), torch.device("cpu"))
    session.engine.eval()
    ids = torch.tensor(input_ids)
    if plan.layout.pipeline_parallel_size > 1:
        session.engine.reset_activation_shape()
        batch = (ids, torch.arange(ids.shape[1]).expand(ids.shape)), ids
        output = session.engine.eval_batch(
            iter([batch]), return_logits=True, compute_loss=False, reduce_output=None, bcast_loss=False,
            num_micro_batches=1,
        )[1]  # fmt: skip
    else:
        with torch.no_grad(), whole_logits(session.engine), whole_sequences(session.engine):
            output = session.engine(input_ids=ids, use_cache=False).logits
    if session.monitor is not None:
        session.monitor.close()
    session.engine.destroy()
    forget_groups()
    result: list[Any] = [] if output is None else output.float().tolist()
    return result


def initial_weights(run_directory: str, data: str) -> dict[str, Any]:
    """Checksums of the freshly built model's parameters, gathered, by name."""
    import deepspeed

    plan = Plan.model_validate_json((Path(run_directory) / "plan.json").read_bytes())
    session = open_session(plan, _context(run_directory), PreparedData.load(Path(data)), torch.device("cpu"))
    sums = {}
    for name, parameter in session.engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=plan.zero_stage == 3):
            weights = parameter.detach().double()
            sums[name] = [float(weights.sum()), float(weights.abs().sum())]
    if session.monitor is not None:
        session.monitor.close()
    session.engine.destroy()
    forget_groups()
    return sums


def watch_losses(run_directory: str, losses: list[float], **settings: Any) -> dict[str, Any]:
    """Let every rank note these losses, one a step of 4 samples and 2 targets; returns at which step it was stopped."""
    from launcher.errors import NumericError
    from launcher.recipe.run_sections import FaultToleranceSection
    from launcher.training.numeric import LossWatch, Observed

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    watch = LossWatch(FaultToleranceSection(**settings), RunDirectory.at(run_directory), rank)
    for step, loss in enumerate(losses, start=1):
        begin = 4 * (step - 1)
        if watch.is_skipped(begin, begin + 4):
            continue
        try:
            watch.check()
            # What is wrong on the last rank alone is wrong on all.
            own = loss if rank == world_size - 1 else losses[0]
            watch.note(torch.tensor(own * 2 / world_size), Observed(step, begin, begin + 4, 2))
        except NumericError as error:
            return {"step": step, "text": str(error)}
    try:
        watch.check()
    except NumericError as error:
        return {"step": len(losses) + 1, "text": str(error)}
    return {"step": None, "text": ""}


def run_with_held_writer(run_directory: str, data: str, hold_at: int, release_at: int | None) -> dict[str, Any]:
    """Train, and hold the process that writes checkpoints as a slow disk would.

    Args:
        run_directory: of the run.
        data: folder of the prepared data.
        hold_at: the process is stopped before the save of this step, when the one before it is committed: else
            the writer of one rank could be stopped with its part of that one still to write.
        release_at: it goes on before the save of this step; None: half a second later.
    """
    plan = Plan.model_validate_json((Path(run_directory) / "plan.json").read_bytes())
    context = _context(run_directory)
    heartbeat, enter = context.heartbeat, context.heartbeat.enter
    checkpoints = RunDirectory.at(run_directory).checkpoints

    def send(number: int) -> None:
        for child in psutil.Process().children():
            child.send_signal(number)

    def watching(phase: Any) -> None:
        if phase == Phase.SAVE and heartbeat.step == hold_at:
            while not (checkpoints / folders.folder_name(hold_at - 1)).is_dir():
                time.sleep(0.01)
            send(signal.SIGSTOP)
            if release_at is None:
                threading.Timer(0.5, send, [signal.SIGCONT]).start()
        if phase == Phase.SAVE and heartbeat.step == release_at:
            send(signal.SIGCONT)
        enter(phase)

    heartbeat.enter = watching  # type: ignore[method-assign]  # watched on purpose
    result = train(plan, context, PreparedData.load(Path(data)), torch.device("cpu"))
    return {**asdict(result), "notices": heartbeat.read().notices}


def memory_of_an_export(run_directory: str, data: str, target: str) -> int:
    """By how many bytes this process grew at most while it exported the newest checkpoint, files in memory left out.

    It exports twice and looks at the second time: the first one imports what it needs.
    """
    plan = Plan.model_validate_json((Path(run_directory) / "plan.json").read_bytes())
    checkpoint = folders.complete(RunDirectory.at(run_directory).checkpoints)[-1]
    tokenizer = PreparedData.load(Path(data)).tokenizer_directory

    def own_bytes() -> int:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024

    export_checkpoint(checkpoint, plan, tokenizer, Path(target))
    gc.collect()
    before = peak = own_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    export_checkpoint(checkpoint, plan, tokenizer, Path(target))
    done.set()
    watcher.join()
    return peak - before
