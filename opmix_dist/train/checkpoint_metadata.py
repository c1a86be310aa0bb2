"""DCP's ``.metadata``, which is a pickle, read without trusting who wrote it.

Two things are restricted: the classes that it may name, and how much it may stand for (pickle_bounds.py).
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

from opmix_dist.train.pickle_bounds import check_bounds

_DCP_METADATA = "torch.distributed.checkpoint.metadata"
_ADMITTED = {
    (_DCP_METADATA, "Metadata"),
    (_DCP_METADATA, "MetadataIndex"),
    (_DCP_METADATA, "TensorStorageMetadata"),
    (_DCP_METADATA, "TensorProperties"),
    (_DCP_METADATA, "ChunkStorageMetadata"),
    (_DCP_METADATA, "BytesStorageMetadata"),
    (_DCP_METADATA, "StorageMeta"),
    (_DCP_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}


def load_metadata(data: bytes) -> Any:
    """What the pickle holds.

    Raises:
        pickle.UnpicklingError: as of :func:`check_bounds`; it names another class; or making its objects
            fails in any other way.
    """
    check_bounds(data)
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError:
        raise
    except (
        Exception
    ) as error:  # constructors of admitted classes raise what they like for what they are given
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _ADMITTED and not is_dtype:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
        return super().find_class(module, name)
