"""A plan, put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opmix_dist.config import EngineConfig
from opmix_dist.engines.build import engine_class
from opmix_dist.errors import UserError
from opmix_dist.models.flops import FlopCounts, ParameterCounts, count_flops, parameter_counts
from opmix_dist.models.lora import require_adaptable
from opmix_dist.plan.held import deepspeed_memory, megatron_memory
from opmix_dist.plan.memory import RankMemory, StepSizes, rank_memory
from opmix_dist.plan.phases import Phase, evaluation_phase, search_phases, training_phase
from opmix_dist.plan.question import Question
from opmix_dist.plan.rates import Rates, rates
from opmix_dist.plan.schedule import PoolChoice, SearchWork, pool_choices, search_work
from opmix_dist.plan.searching import (
    CandidateMemory,
    ProbeMemory,
    candidate_memory,
    components,
    probe_memory,
)
from opmix_dist.plan.storage import Storage, storage
from opmix_dist.train.ranks import check_ranks


@dataclass(frozen=True)
class SearchPlan:
    """resident: bytes that the trainers' own parameters and optimizer take beside the search, where it is on
    their ranks; 0 of a pool. enough: the smallest pool that is done in time; None: no pool here is."""

    components: int
    groups: Sequence[int]
    work: SearchWork
    probes: ProbeMemory
    candidates: CandidateMemory
    resident: int
    choices: Sequence[PoolChoice]
    chosen: PoolChoice
    enough: PoolChoice | None

    @property
    def peak(self) -> int:
        return self.resident + max(self.probes.total, self.candidates.total)


@dataclass(frozen=True)
class Plan:
    """step_seconds: of training at the stated MFU."""

    parameters: ParameterCounts
    flops: FlopCounts
    recomputed: float
    rates: Rates
    memory: RankMemory
    phases: Sequence[Phase]
    step_seconds: float
    search: SearchPlan | None
    storage: Storage

    @property
    def gpu_hours(self) -> float:
        return sum(phase.gpu_hours for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Of the run; a search that it does not wait for takes none."""
        return sum(phase.seconds for phase in self.phases if phase.delays)


def make_plan(question: Question) -> Plan:
    """
    Raises:
        UserError: sizes that do not divide, an engine that does not take the configuration, or a model that
            a search cannot adapt.
    """
    config, source = question.config, question.source
    if question.trainers < 1:
        raise UserError(
            f"pool.ranks {question.pool_ranks} leaves no trainer of {question.ranks} ranks: lower it"
        )
    if config.model.lora is not None:
        raise UserError(
            "opmix plan knows the training of all parameters only: leave out model.lora, with which a run "
            "holds less"
        )
    check_ranks(config, question.trainers)
    engine_class(question.engine).check(config, question.trainers)
    model = source.build()
    flops = count_flops(model, question.data.sequence_length, config.search.probes.rank)
    speed = rates(question)
    memory = training_memory(question, config.engine)
    search = None
    if config.mixture.policy == "opmix":
        require_adaptable(model)
        search = _search(question, flops, speed, memory)
    training = training_phase(question, flops, speed)
    phases = [training, evaluation_phase(question, flops, speed)]
    if search is not None:
        phases += search_phases(question, search.work, search.chosen)
    counts = parameter_counts(source.hf_config)
    return Plan(
        parameters=counts,
        flops=flops,
        recomputed=flops.recomputed(config.engine.activation_checkpointing),
        rates=speed,
        memory=memory,
        phases=phases,
        step_seconds=training.seconds / config.train.steps,
        search=search,
        storage=storage(
            config,
            parameters=counts.total,
            adapters=0 if search is None else search.candidates.adapters // 4,
            trainers=question.trainers,
            ranks_per_node=question.gpus_per_node,
        ),
    )


def training_memory(question: Question, engine: EngineConfig, micro_batch_size: int = 0) -> RankMemory:
    """Of a trainer rank; another engine's settings or micro-batch than the configuration's may be asked
    for."""
    train = question.config.train
    size = micro_batch_size or train.micro_batch_size
    sizes = StepSizes(
        ranks=question.trainers,
        sequence_length=question.data.sequence_length,
        micro_batch_size=size,
        micro_batches=train.global_batch_size // (size * question.replicas),
    )
    measure = {"deepspeed": deepspeed_memory, "megatron": megatron_memory}.get(question.engine, rank_memory)
    return measure(question.source, engine.model_copy(update={"name": question.engine}), sizes)


def _search(question: Question, flops: FlopCounts, speed: Rates, training: RankMemory) -> SearchPlan:
    config, data, source = question.config, question.data, question.source
    inline, searching = question.pool_ranks == 0, question.searching
    if searching % config.pool.ranks_per_model:
        raise UserError(
            f"pool.ranks_per_model {config.pool.ranks_per_model} does not divide the {searching} rank(s) "
            "that search: change one of them"
        )
    names = components(config, data.domains)
    resident = training.parameters + training.optimizer if inline else 0
    probes = probe_memory(source, config, names=names, sequence_length=data.sequence_length)
    room = question.search_gpu.usable_bytes - resident
    candidates = candidate_memory(source, config, names=names, data=data, room=room)
    work = search_work(question, flops, names, candidates)
    train = config.train
    tokens = train.steps * train.global_batch_size * data.sequence_length
    choices, enough = pool_choices(question, work, tokens * flops.train(), speed)
    wanted = next(c for c in choices if (c.place == "inline") == inline and (inline or c.ranks == searching))
    return SearchPlan(
        components=len(names),
        groups=[round(one / work.probes[-1]) for one in work.probes],
        work=work,
        probes=probes,
        candidates=candidates,
        resident=resident,
        choices=choices,
        chosen=wanted,
        enough=enough,
    )
