"""Memory of tensors that come and go while something runs: real ones, or ones without memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

Storage = torch.UntypedStorage


class LiveBytes(TorchDispatchMode):
    """Counts the bytes behind the tensors that operations within the context make, until they are gone.

    What was there before counts nothing. It is what an allocator that returns memory at once would hand out:
    on a GPU torch's ``memory_allocated``, but for workspaces inside kernels, which no tensor shows.

    now: bytes that are live. peak: the most that they were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._known: dict[int, Any] = {}

    def __enter__(self) -> LiveBytes:
        """FSDP frees gathered parameters by making their memory empty, which is no operation."""
        self._resize = Storage.resize_
        Storage.resize_ = self._resized()  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        Storage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(is_traceable_wrapper_subclass(kind) or kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # its parts come here again, one by one
        for tensor in _tensors((args, kwargs)):
            self._see(tensor.untyped_storage(), new=False)
        found = func(*args, **kwargs)
        for tensor in _tensors(found):
            self._see(tensor.untyped_storage(), new=True)
        return found

    def _see(self, storage: Storage, *, new: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = weakref.finalize(storage, self._gone, key)
        self._known[key].atexit = False
        self._sizes[key] = storage.nbytes() if new else 0
        self._change(self._sizes[key])

    def _gone(self, key: int) -> None:
        del self._known[key]
        self._change(-self._sizes.pop(key))

    def _change(self, difference: int) -> None:
        self.now += difference
        self.peak = max(self.peak, self.now)

    def _resized(self) -> Any:
        tracker, resize = self, self._resize

        def resize_(storage: Storage, size: int) -> Any:
            tracker._see(storage, new=False)
            difference = size - storage.nbytes()
            found = resize(storage, size)
            tracker._sizes[storage._cdata] += difference
            tracker._change(difference)
            return found

        return resize_


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
