"""The phases of a run: what each computes, where, and how long that takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from opmix_dist.models.flops import FlopCounts
from opmix_dist.plan.question import Question
from opmix_dist.plan.rates import Rates
from opmix_dist.plan.schedule import PoolChoice, SearchWork


@dataclass(frozen=True)
class Phase:
    """flops: of the model, on all ranks together. ranks: that are busy or wait. gpu: their kind.
    delays: whether the run takes that much longer for it; else it is beside another phase."""

    name: str
    tokens: int
    flops: float
    ranks: int
    gpu: str
    seconds: float
    delays: bool = True

    @property
    def gpu_hours(self) -> float:
        return self.ranks * self.seconds / 3600


def training_phase(question: Question, flops: FlopCounts, rates: Rates) -> Phase:
    """All steps. Time is FLOPs / (peak x MFU x ranks)."""
    train = question.config.train
    tokens = train.steps * train.global_batch_size * question.data.sequence_length
    return _on_trainers(question, "training", tokens, flops.train(), rates)


def evaluation_phase(question: Question, flops: FlopCounts, rates: Rates) -> Phase:
    """After every interval and the last step; with a search the final model on the search's samples too."""
    config, train = question.config, question.config.train
    times = math.ceil(train.steps / train.eval_interval_steps) if train.eval_interval_steps else 1
    samples = times * train.eval_samples_per_domain
    if config.mixture.policy == "opmix":
        samples += config.search.candidates.samples_per_domain
    tokens = samples * question.data.domains * question.data.sequence_length
    return _on_trainers(question, "held-out evaluation", tokens, flops.forward, rates)


def search_phases(question: Question, work: SearchWork, chosen: PoolChoice) -> Iterator[Phase]:
    time, gpu = chosen.search, question.search_gpu.name
    for name, tokens, flops, seconds in (
        ("probes", work.probe_tokens, work.probe_flops, time.probes),
        ("candidates", work.candidate_tokens, work.candidate_flops, time.candidates),
    ):
        yield Phase(name, tokens, flops, time.ranks, gpu, seconds, delays=chosen.delays)


def _on_trainers(question: Question, name: str, tokens: int, flops_per_token: float, rates: Rates) -> Phase:
    total, ranks = tokens * flops_per_token, question.trainers
    return Phase(name, tokens, total, ranks, question.gpu.name, total / (rates.training * ranks))
