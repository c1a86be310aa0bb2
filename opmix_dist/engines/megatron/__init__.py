"""Megatron-core: tensor, sequence, pipeline and data parallelism with its distributed optimizer."""

import warnings

with warnings.catch_warnings():
    # a dozen of them, on every rank: it tells of each optional package (Transformer Engine, Apex) it lacks
    warnings.filterwarnings("ignore", message=".*not installed")
    from opmix_dist.engines.megatron.engine import MegatronEngine

__all__ = ["MegatronEngine"]
