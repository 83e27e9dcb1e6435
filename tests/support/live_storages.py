"""What is allocated on CPU, tensor by tensor: torch keeps no such count there as it does on a GPU."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of every storage that operations inside the block make, as long as it lives.

    Attributes:
        live: bytes alive now.
        peak: the most that was alive at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()
        self._counted: set[int] = set()

    def ignore(self, tensors: Any) -> None:
        """Leave out what was there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known.add(storage._cdata)
            weakref.finalize(storage, self._known.discard, storage._cdata)  # a new one may get its address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        self._known.add(key)
        self._counted.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._counted.discard(key)
        self.live -= size

    def bytes_of(self, tensors: Any) -> int:
        """Bytes of those counted storages that lie under the given tensors."""
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(size for key, size in storages.items() if key in self._counted)

    def reset_peak(self) -> None:
        """Look for the peak from here on."""
        self.peak = self.live
