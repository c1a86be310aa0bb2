"""What every worker process needs, to be imported by the one that they are forked from.

streaming takes seconds to import and most of a worker's memory; so it does once, not once a worker.
"""

from __future__ import annotations

import importlib.util

from opmix_dist.data import encode, mds, survey, writing

__all__ = ["encode", "mds", "survey", "writing"]

if importlib.util.find_spec("streaming") is not None:  # else writing the first shard says what is missing
    mds.import_streaming()
