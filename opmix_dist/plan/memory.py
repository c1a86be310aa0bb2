"""What one trainer rank needs, by kind: of the engines single and fsdp by running their own step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opmix_dist.config import EngineConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.engines.single import SingleEngine
from opmix_dist.models.source import ModelSource
from opmix_dist.plan.live import LiveBytes
from opmix_dist.plan.unallocated import mode_of, pretended, samples, unallocated_engine


@dataclass(frozen=True)
class StepSizes:
    """Of a training step.

    ranks: trainer ranks. sequence_length: tokens of a sample, T. micro_batch_size: samples in a pass of one
    replica. micro_batches: passes of one replica in a step.
    """

    ranks: int
    sequence_length: int
    micro_batch_size: int
    micro_batches: int = 1


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one device at the highest point of a step, by the kinds of ``metrics/train.jsonl``.

    activations_and_others: the rest of the peak: activations, logits, gathered parameters, gradients that
    are not reduced yet.
    kept: part of the rest that is live between the forward and the backward pass of the first micro-batch.
    offloaded: of parameters, gradients and optimizer, what lies in the host's memory.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations_and_others: int
    kept: int
    offloaded: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations_and_others


def live_bytes_of_step(engine: SingleEngine, microbatches: Sequence[TokenBatch]) -> tuple[int, int]:
    """Most bytes that the passes of a step have live at once, gradients among them, and those between the
    first forward pass and its backward pass. Collective over the trainer ranks, if they are real."""
    kept = 0
    with LiveBytes() as live:
        for i, batch in enumerate(microbatches):
            with engine._accumulating(i == len(microbatches) - 1):
                with engine._compute_context():
                    losses = engine._losses(batch)
                if not i:
                    kept = live.now
                losses.sum().backward()
            del losses
    return live.peak, kept


def rank_memory(source: ModelSource, config: EngineConfig, sizes: StepSizes) -> RankMemory:
    """Of the first trainer rank under the engine ``single`` or ``fsdp``, whose shards are the largest. A step
    of two micro-batches has all that one of more has."""
    sharded, length = config.name == "fsdp", sizes.sequence_length
    with pretended(sizes.ranks) as world:
        engine = unallocated_engine(source, world, config, sequence_length=length, sharded=sharded)
        held = engine.held_bytes()
        with mode_of(engine.model):
            batches = [samples(sizes.micro_batch_size, length) for _ in range(min(sizes.micro_batches, 2))]
            peak, kept = live_bytes_of_step(engine, batches)
    offloaded = config.fsdp.cpu_offload and sharded
    parts = (held.parameters, held.gradients, held.optimizer)
    on_device = (0, 0, 0) if offloaded else parts
    return RankMemory(
        parameters=on_device[0],
        gradients=on_device[1],
        optimizer=on_device[2],
        activations_and_others=max(0, peak - held.gradients),
        kept=kept,
        offloaded=sum(parts) if offloaded else 0,
    )
