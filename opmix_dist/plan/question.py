"""What is planned: a configuration, its data in numbers, and the devices to run on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from opmix_dist.config import FSDPConfig, RunConfig
from opmix_dist.data.build import open_data
from opmix_dist.data.remote import is_url
from opmix_dist.distributed import Placement, Role
from opmix_dist.errors import UserError
from opmix_dist.exchange.history import starting_model
from opmix_dist.models.build import open_source
from opmix_dist.models.long_context import with_context
from opmix_dist.models.source import ModelSource
from opmix_dist.plan.gpus import Gpu

AS_SDPA = ("flash_attention_2", "flash_attention_3", "flex_attention", "varlen", "sdpa")
"""Attention that keeps queries, keys, values, the result and a logarithm for each row, and no T x T."""


@dataclass(frozen=True)
class DataSizes:
    """domains: their number, D. sequence_length: tokens of a sample, T. vocab_size: of the tokenizer; None:
    as the model's configuration has it."""

    domains: int
    sequence_length: int
    vocab_size: int | None = None


@dataclass(frozen=True)
class Question:
    """ranks: of the launch, trainers and pool together, on ``gpu``; a pool that is a launch of its own is on
    ``pool_gpu``. 0 pool ranks search on the trainers' own."""

    config: RunConfig
    data: DataSizes
    source: ModelSource
    gpu: Gpu
    nodes: int
    gpus_per_node: int
    pool_ranks: int
    pool_gpu: Gpu
    mfu: float
    search_mfu: float
    due_within: float
    """Share of the training after its request in which a search is to be done."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def trainers(self) -> int:
        """A pool of its own has other devices than these nodes'."""
        return self.ranks - (0 if self.config.pool.external else self.pool_ranks)

    @property
    def searching(self) -> int:
        """Ranks that search."""
        return self.pool_ranks or self.trainers

    @property
    def search_gpu(self) -> Gpu:
        return self.pool_gpu if self.pool_ranks else self.gpu

    @property
    def engine(self) -> str:
        """That ``auto`` stands for."""
        config = self.config.engine
        if config.name != "auto":
            return config.name
        return "fsdp" if self.trainers > 1 or config.fsdp != FSDPConfig() else "single"

    @property
    def replicas(self) -> int:
        return self.trainers // self.config.engine.ranks_per_replica

    @property
    def micro_batches(self) -> int:
        """Of one replica in a step."""
        train = self.config.train
        return train.global_batch_size // (train.micro_batch_size * self.replicas)

    @property
    def placement(self) -> Placement:
        return Placement(Role.TRAINER, 0, self.trainers)


def data_sizes(
    config: RunConfig, domains: int | None, sequence_length: int | None, vocab_size: int | None
) -> DataSizes:
    """What is given, and for the rest the catalogue of ``data.root``.

    Raises:
        UserError: there is no catalogue, and something of it is not given.
    """
    if domains is None and config.data.domains is not None:
        domains = len(config.data.domains)
    if domains is not None and sequence_length is not None:
        return DataSizes(domains, sequence_length, vocab_size)
    if not is_url(config.data.root) and not Path(config.data.root).exists():
        raise UserError(f"data.root {config.data.root} is not there: give --domains and --sequence-length")
    catalogue = open_data(config.data)
    return DataSizes(
        domains if domains is not None else len(catalogue.names),
        sequence_length if sequence_length is not None else catalogue.sequence_length,
        vocab_size if vocab_size is not None else catalogue.vocab_size,
    )


def sizes_of_model(config: RunConfig, vocab_size: int | None) -> ModelSource:
    """The model's shapes; of a checkpoint only its configuration is read.

    Raises:
        UserError: the configuration cannot be read, or nothing tells the vocabulary's size.
    """
    settings = starting_model(config)
    attention = "sdpa" if settings.attention in AS_SDPA else settings.attention
    if settings.checkpoint is not None:
        try:
            hf = AutoConfig.from_pretrained(settings.checkpoint, trust_remote_code=settings.trust_remote_code)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"cannot read the configuration of {settings.checkpoint}: {reason}") from None
        if settings.context is not None:
            hf = with_context(hf, settings.context)
        return ModelSource(hf, attention=attention, trust_remote_code=settings.trust_remote_code)
    assert settings.config is not None
    size = settings.config.get("vocab_size", vocab_size)
    if size is None:
        raise UserError("nothing tells how many tokens the vocabulary has: give --vocab-size")
    plain = settings.model_copy(update={"attention": attention})
    return open_source(plain, vocab_size=size, token_ids={}, seed=0)
