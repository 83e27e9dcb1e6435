"""What a checkpoint costs: ours beside the training and in it, DeepSpeed's own, torch's distributed checkpoint.

All arms save the state of one DeepSpeed engine on two ranks (weights, their fp32 copies, both Adam moments), on one
disk, and every file is synced to it. Arms take turns; ratios are of one round. Then: loading at the same size and
resized, and verifying against reading.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import WORKERS, Setting, Spread, arm_environment, free_port, machine, no_process_left, rotated

ARMS = ("ours_asynchronous", "ours_synchronous", "deepspeed", "dcp", "dcp_asynchronous")
IDLE_STEPS = 8


def main() -> None:
    """Prepare, run the three groups of ranks, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=600, help="size of the state, about")
    parser.add_argument("--rounds", type=int, default=5, help="how often every arm saves, after one save that warms up")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure; default: the temporary folder")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="what saves; ratios are to dcp")
    parser.add_argument("--json", action="store_true", help="print everything measured")
    arguments = parser.parse_args()
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="zfb-", dir=arguments.folder) as temporary, no_process_left():
        folder = Path(temporary)
        (folder / "recipe.yaml").write_text(recipe_of(arguments.megabytes))
        environment = arm_environment(folder)
        arms = [arm for arm in ARMS if arm in {"ours_asynchronous", "dcp", *arguments.arms}]  # what the rest needs
        saves = ranks("save", WORKERS, folder, environment, arguments.rounds, *arms)
        loads = {
            "same_size": ranks("load", WORKERS, folder, environment),
            "resized": ranks("load", 1, folder, environment),
            "resized_again": ranks("load", 1, folder, environment),
        }
        verified = verification(folder, arguments.rounds)
    result = {"machine": facts, **summary(saves, loads, verified)}
    print(json.dumps(result, indent=1) if arguments.json else text_of(result))


def recipe_of(megabytes: int) -> str:
    """A model whose state has about so many megabytes: 16 bytes a parameter, in blocks of 12 x hidden squared."""
    hidden = max(64, round((megabytes * 1e6 / 16 / (12 * 4)) ** 0.5 / 64) * 64)
    setting = Setting(
        steps=1000, logging_steps=1000, hidden_size=hidden, num_hidden_layers=4, sequence_length=64, micro_batch_size=1,
        vocab_size=512,
    )  # fmt: skip
    return setting.recipe


def ranks(
    role: str, size: int, folder: Path, environment: dict[str, str], rounds: int = 1, *arms: str
) -> dict[str, Any]:
    """Start a group of ranks that play a role; returns what rank 0 measured."""
    port = free_port()
    commands = [sys.executable, str(Path(__file__).resolve()), "--rank-of", role, str(folder), str(rounds), *arms]
    processes = [
        subprocess.Popen(
            commands,
            env=environment
            | {
                "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.DEVNULL,
            stderr=None if rank == 0 else subprocess.DEVNULL,
        )
        for rank in range(size)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"the ranks that {role} failed")
    measured: dict[str, Any] = json.loads((folder / f"{role}-{size}.json").read_text())
    return measured


class Engine:
    """One rank's engine of the recipe, and a step to make with it."""

    def __init__(self, folder: Path) -> None:
        import torch

        from launcher.planning.layout import Resources
        from launcher.planning.plan import make_plan
        from launcher.recipe.loading import load_recipe
        from launcher.training.distributed import join_process_group
        from launcher.training.engine import build_engine

        join_process_group("cpu", 0)
        from transformers import AutoConfig, AutoModelForCausalLM

        self.folder = folder
        self.workers = int(os.environ["WORLD_SIZE"])
        self.rank = int(os.environ["RANK"])
        self.plan = make_plan(load_recipe(folder / "recipe.yaml"), Resources(workers_per_node=self.workers))
        fields = dict(self.plan.transformers_config or {})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
        self.engine = build_engine(self.plan, model, 1000)
        self.managers: list[Any] = []
        self.batch = torch.randint(0, 512, (1, 64), generator=torch.Generator().manual_seed(self.rank))

    def step(self) -> float:
        """Make a step; returns its seconds."""
        began = time.perf_counter()
        self.engine.backward(self.engine(input_ids=self.batch, labels=self.batch, use_cache=False).loss)
        self.engine.step()
        return time.perf_counter() - began

    def manager(self, name: str, *overrides: str) -> Any:
        """A checkpoint manager of ours, in a folder of its own."""
        from launcher.planning.layout import Resources
        from launcher.planning.plan import make_plan
        from launcher.recipe.loading import load_recipe
        from launcher.training.checkpoint import CheckpointManager

        recipe = load_recipe(self.folder / "recipe.yaml", ["save_total_limit=1", *overrides])
        plan = make_plan(recipe, Resources(workers_per_node=self.workers))
        return CheckpointManager(self.folder / name, plan, "0" * 32)

    def state(self) -> dict[str, Any]:
        """The same state as tensors by name, as torch's distributed checkpoint wants it: each rank's own."""
        optimizer = self.engine.optimizer
        state = {f"{self.rank}.fp32.{i}": tensor for i, tensor in enumerate(optimizer.single_partition_of_fp32_groups)}
        for index, values in enumerate(optimizer.optimizer.state.values()):
            state |= {f"{self.rank}.{key}.{index}": values[key] for key in ("exp_avg", "exp_avg_sq")}
        if self.rank == 0:
            state |= {f"model.{name}": tensor for name, tensor in self.engine.module.state_dict().items()}
        return state


def save_role(folder: Path, rounds: int, names: Sequence[str]) -> None:
    """Let every arm save in turn; record how long training waited, and its steps meanwhile."""
    import torch.distributed as dist

    me = Engine(folder)
    for _ in range(2):
        me.step()
    arms = _arms(me)
    measured: list[dict[str, Any]] = []
    for turn in range(rounds + 1):
        for arm in rotated(names, turn):
            idle = [me.step() for _ in range(IDLE_STEPS)]
            dist.barrier()
            began = time.perf_counter()
            is_written = arms[arm](turn + 1)
            blocked = time.perf_counter() - began
            meanwhile = []
            while not _everywhere(is_written()):
                meanwhile.append(me.step())
            seconds = time.perf_counter() - began
            figures = {"arm": arm, "round": turn, "blocked": blocked, "seconds": seconds}
            measured.append(figures | {"idle": idle, "meanwhile": meanwhile})
    for manager in me.managers:
        manager.close()
    if me.rank == 0:
        (folder / f"save-{me.workers}.json").write_text(json.dumps({"saves": measured}))


def _everywhere(done: bool) -> bool:
    import torch
    import torch.distributed as dist

    value = torch.tensor(int(done))
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return bool(value)


def _arms(me: Engine) -> dict[str, Callable[[int], Callable[[], bool]]]:
    """Each arm starts a save of the given step and returns what tells whether it is over."""
    from concurrent.futures import Future
    from typing import cast

    import torch.distributed as dist
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save, save

    from launcher.training.progress import Progress

    beside, within = me.manager("ours"), me.manager("within", "asynchronous=false")
    me.managers = [beside, within]
    own = dist.new_group()  # its thread's collectives would meet those of the steps in one group

    def over() -> bool:
        return True

    def ours(manager: Any, step: int) -> Callable[[], bool]:
        manager.save(me.engine, Progress(step=step, consumed_samples=step))
        background = manager.background
        return over if background is None else lambda: not background.is_busy

    def deepspeed(step: int) -> Callable[[], bool]:
        me.engine.checkpoint_engine = TorchCheckpointEngine()
        me.engine.save_checkpoint(str(me.folder / "deepspeed"), tag="same", save_latest=False)
        sync_files(me.folder / "deepspeed" / "same", me.rank)
        _everywhere(True)
        return over

    def distributed(step: int) -> Callable[[], bool]:
        save(me.state(), storage_writer=FileSystemWriter(me.folder / "dcp", overwrite=True))
        return over

    def distributed_beside(step: int) -> Callable[[], bool]:
        writer = FileSystemWriter(me.folder / "dcp-beside", overwrite=True)
        future = cast(Future[Any], async_save(me.state(), storage_writer=writer, process_group=own))
        return future.done

    return {
        "ours_asynchronous": lambda step: ours(beside, step),
        "ours_synchronous": lambda step: ours(within, step),
        "deepspeed": deepspeed,
        "dcp": distributed,
        "dcp_asynchronous": distributed_beside,
    }


def sync_files(folder: Path, rank: int) -> None:
    """Wait for the disk, which DeepSpeed does not; each rank for about its own files."""
    for index, path in enumerate(sorted(folder.iterdir())):
        if index % WORKERS == rank:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def load_role(folder: Path) -> None:
    """Load our newest checkpoint into a fresh engine, converting it first if need be."""
    me = Engine(folder)
    told: list[str] = []
    manager = me.manager("ours")
    manager.notify = told.append
    began = time.perf_counter()
    manager.load(me.engine)
    if me.rank == 0:
        figures = {"seconds": time.perf_counter() - began, "told": told}
        (folder / f"load-{me.workers}.json").write_text(json.dumps(figures))


def verification(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds of verifying a checkpoint and of only reading its files, from the page cache and from the disk."""
    from launcher.checkpoints import folders
    from launcher.checkpoints.manifest import faults_of, read_manifest

    newest = folders.complete(folder / "ours")[-1]
    ways: dict[str, Callable[[], Any]] = {
        "read": lambda: _read(newest),
        "verify": lambda: faults_of(newest, contents=True),
    }
    seconds: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for source in ("", "_from_disk"):
            for name in rotated(list(ways), turn):
                if source:
                    forget(newest)
                began = time.perf_counter()
                wrong = ways[name]()
                seconds.setdefault(name + source, []).append(time.perf_counter() - began)
                if wrong:
                    raise RuntimeError(f"the checkpoint is damaged: {wrong}")
    medians = {name: Spread.of(values[1:]).median for name, values in seconds.items()}
    return {"bytes": read_manifest(newest).size, **medians}


def forget(folder: Path) -> None:
    """Take a folder's files out of the page cache; they are on the disk already."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _read(folder: Path) -> None:
    """Read every file as verifying does, in as many threads, and look at nothing."""
    from concurrent.futures import ThreadPoolExecutor

    from launcher.checkpoints.disk import PIECE
    from launcher.checkpoints.files import THREADS

    def read(path: Path) -> None:
        buffer = memoryview(bytearray(PIECE))
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, folder.iterdir()))


def summary(saves: dict[str, Any], loads: dict[str, Any], verified: dict[str, float]) -> dict[str, Any]:
    """Medians, and the ratios that the issue of this benchmark is about, each within one round."""
    later = [save for save in saves["saves"] if save["round"] > 0]
    arms: dict[str, Any] = {}
    present = {save["arm"] for save in later}
    for arm in [arm for arm in ARMS if arm in present]:
        own = [save for save in later if save["arm"] == arm]
        slower = [
            Spread.of(save["meanwhile"]).median / Spread.of(save["idle"]).median for save in own if save["meanwhile"]
        ]
        arms[arm] = {
            "blocked": vars(Spread.of([save["blocked"] for save in own])),
            "seconds": vars(Spread.of([save["seconds"] for save in own])),
            "steps_slower": vars(Spread.of(slower)) if slower else None,
            "first_blocked": next(s["blocked"] for s in saves["saves"] if s["round"] == 0 and s["arm"] == arm),
        }
    by_round = {(save["round"], save["arm"]): save["blocked"] for save in later}
    rounds = sorted({save["round"] for save in later})
    ratios: dict[str, Any] = {
        f"{arm} / dcp": vars(Spread.of([by_round[r, arm] / by_round[r, "dcp"] for r in rounds]))
        for arm in arms
        if arm != "dcp"
    }
    ratios["verify / read, in memory"] = verified["verify"] / verified["read"]
    ratios["verify / read, from disk"] = verified["verify_from_disk"] / verified["read_from_disk"]
    ratios["resized again / same size"] = loads["resized_again"]["seconds"] / loads["same_size"]["seconds"]
    return {"arms": arms, "blocked_ratios": ratios, "loads": loads, "verification": verified, "saves": saves["saves"]}


def text_of(result: dict[str, Any]) -> str:
    """For a person."""
    lines = [f"{'':20}{'blocked s':>12}{'written s':>12}{'steps slower':>14}{'first save s':>14}"]
    for arm, figures in result["arms"].items():
        slower = figures["steps_slower"]
        lines.append(
            f"{arm:20}{figures['blocked']['median']:>12.3f}{figures['seconds']['median']:>12.3f}"
            f"{'-' if slower is None else format(slower['median'], '.2f'):>14}{figures['first_blocked']:>14.3f}"
        )
    for name, ratio in result["blocked_ratios"].items():
        lines.append(f"{name:32}{ratio if isinstance(ratio, float) else ratio['median']:.3f}")
    for name, load in result["loads"].items():
        lines.append(f"load, {name:26}{load['seconds']:.2f} s  {'; '.join(load['told'])}")
    verified = result["verification"]
    for source, name in (("memory", "verify"), ("disk", "verify_from_disk")):
        lines.append(f"verification from {source}: {verified['bytes'] / verified[name] / 1e9:.2f} GB/s")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of"]:
        if sys.argv[2] == "save":
            save_role(Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
        else:
            load_role(Path(sys.argv[3]))
        os._exit(0)
    main()
