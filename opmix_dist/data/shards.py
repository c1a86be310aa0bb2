"""Access to MDS shards through mosaicml-streaming."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types


def import_streaming() -> types.ModuleType:
    """Import mosaicml-streaming, also where torchvision is absent.

    Its package imports ``streaming.vision``, which needs torchvision; a CUDA build of that cannot be loaded
    beside a CPU build of torch. An empty module of that name stands in.
    """
    if importlib.util.find_spec("torchvision") is None:
        sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
    return importlib.import_module("streaming")
