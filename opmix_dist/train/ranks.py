"""Whether a number of trainer ranks can train a configuration; known before they are there."""

from __future__ import annotations

from opmix_dist.config import RunConfig
from opmix_dist.errors import UserError


def check_ranks(config: RunConfig, trainers: int) -> None:
    """UserError when ``trainers`` ranks cannot hold whole copies of the model, or divide the global batch."""
    each = config.engine.ranks_per_replica
    if trainers % each:
        raise UserError(
            f"engine.name {config.engine.name} divides the model over {each} ranks, of which "
            f"{trainers} trainer rank(s) are no multiple: start others, or change the engine's settings"
        )
    replicas = trainers // each
    if config.train.global_batch_size % (config.train.micro_batch_size * replicas):
        raise UserError(
            f"train.global_batch_size {config.train.global_batch_size} must be a multiple of "
            f"train.micro_batch_size x copies of the model = {config.train.micro_batch_size} x {replicas}"
        )
