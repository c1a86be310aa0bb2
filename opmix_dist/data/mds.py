"""The one door to mosaicml-streaming."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from opmix_dist.errors import UserError


def import_streaming() -> ModuleType:
    """The ``streaming`` package, also where torchvision is not installed.

    Only ``streaming.vision``, which nothing here uses, needs torchvision; an empty module takes its place.

    Raises:
        UserError: the package itself is not installed.
    """
    if importlib.util.find_spec("streaming") is None:
        raise UserError("reading and writing shards needs mosaicml-streaming: `make setup` installs it")
    if importlib.util.find_spec("torchvision") is None:
        sys.modules.setdefault("streaming.vision", ModuleType("streaming.vision"))
    import streaming

    return streaming
