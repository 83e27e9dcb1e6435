"""How fast an all-reduce is over this node and some others; runs on the node."""

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

END_TIMEOUT = timedelta(seconds=15)
"""Within which others must join, and an all-reduce end."""
TRIALS = 20
MIN_SECONDS = 0.2
"""What is reduced grows until it takes so long, or reaches its largest size."""
FIRST_BYTES, MAX_BYTES = 1 << 20, 1 << 28


class CollectiveProbe:
    """An actor on one node, besides its NodeProbe: only here PyTorch is imported, which takes seconds."""

    def __init__(self) -> None:
        import torch

        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self._store: Any = None

    def backend(self) -> str:
        """Of its collectives."""
        return "nccl" if self._device.type == "cuda" else "gloo"

    def meet_here(self, address: str) -> int:
        """Open a new place for a group to meet at; returns its port."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, and in no list of its names

        self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=END_TIMEOUT)
        return int(self._store.port)

    def all_reduce(self, address: str, port: int, rank: int, size: int, backend: str) -> dict[str, Any]:
        """Measure an all-reduce with the other nodes that are asked the same.

        Args:
            address: of the first node of the group, which opened `port`.
            port: of its store.
            rank: of this node in the group.
            size: of the group.
            backend: "nccl" or "gloo".

        Returns:
            `latency_s`, the median of small all-reduces, and `bytes_per_second`, the bus bandwidth of a large one:
            2 (n - 1) / n of its bytes a second, which does not depend on the number of nodes (NVIDIA, nccl-tests,
            doc/PERFORMANCE.md); or `error`.
        """
        import torch
        import torch.distributed as dist
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # as above

        device = self._device if backend == "nccl" else torch.device("cpu")
        try:
            mine = self._store if rank == 0 else None
            store = mine or TCPStore(address, port, is_master=False, timeout=END_TIMEOUT)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=END_TIMEOUT)
            small = sorted(_seconds(torch.zeros(1, device=device)) for _ in range(TRIALS))
            num_bytes, seconds = 0, 0.0
            while seconds < MIN_SECONDS and num_bytes < MAX_BYTES:
                num_bytes = max(FIRST_BYTES, 4 * num_bytes)
                longest = torch.tensor(_seconds(torch.zeros(num_bytes // 4, device=device)), device=device)
                dist.all_reduce(longest, dist.ReduceOp.MAX)  # so that all go on, or none
                seconds = float(longest)
        except (RuntimeError, OSError) as error:  # torch.distributed's own errors are RuntimeErrors
            return {"error": str(error).partition("\n")[0]}
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return {"latency_s": small[TRIALS // 2], "bytes_per_second": 2 * (size - 1) / size * num_bytes / seconds}


def _seconds(values: "torch.Tensor") -> float:
    import torch
    import torch.distributed as dist

    began = time.perf_counter()
    dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
    return time.perf_counter() - began
