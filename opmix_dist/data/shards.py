"""Random access to the MDS shards of one split of one domain.

StreamingDataset is not used: its constructor makes collectives and shared memory, and refuses a folder that
another live process reads, while here trainers and pool read the same shards. Its parts, Stream (download,
decompress) and the MDS reader, do the work.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType


def import_streaming() -> ModuleType:
    """The ``streaming`` package, also where torchvision is not installed.

    Only ``streaming.vision``, which nothing here uses, needs torchvision; an empty module takes its place.
    """
    if importlib.util.find_spec("torchvision") is None:
        sys.modules.setdefault("streaming.vision", ModuleType("streaming.vision"))
    import streaming

    return streaming
