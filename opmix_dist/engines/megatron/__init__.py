"""Megatron-core: tensor, sequence, pipeline and data parallelism with its distributed optimizer."""

import warnings

# what Megatron's own code is told on every rank, and nobody here can change
for _message in (
    "full scope is deprecated",
    r"`torch\.distributed\.\w+` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
):
    warnings.filterwarnings("ignore", message=_message)
with warnings.catch_warnings():
    # a dozen of them: it tells of each optional package (Transformer Engine, Apex) that it lacks
    warnings.filterwarnings("ignore", message=".*not installed")
    from opmix_dist.engines.megatron.engine import MegatronEngine

__all__ = ["MegatronEngine"]
