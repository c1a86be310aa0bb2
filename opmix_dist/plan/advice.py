"""What does not go well with a plan, and what to change; numbers come from planning the change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opmix_dist.config import EngineConfig
from opmix_dist.plan.build import Plan, SearchPlan, training_memory
from opmix_dist.plan.gpus import USABLE
from opmix_dist.plan.question import Question
from opmix_dist.plan.searching import components, probe_memory
from opmix_dist.plan.sizes import gigabytes, share


def advice(question: Question, plan: Plan) -> list[str]:
    """Sentences, the gravest first; empty where all is well."""
    return [
        *_training(question, plan),
        *_accumulation(question, plan),
        *(_search(question, plan.search) if plan.search is not None else ()),
    ]


def _training(question: Question, plan: Plan) -> Iterator[str]:
    room, needed = question.gpu.usable_bytes, plan.memory.total
    if needed <= room:
        return
    start = (
        f"training does not fit: a rank needs {gigabytes(needed)} of {gigabytes(room)} ({USABLE:.0%} of a "
        f"{question.gpu.name})"
    )
    tried = []
    for text, engine, micro in _changes(question):
        found = training_memory(question, engine, micro).total
        tried.append(f"{text}: {gigabytes(found)}")
        if found <= room:
            yield f"{start}; it fits with {tried[-1]}"
            return
    divided = "engine.fsdp.tensor_parallel" if question.engine == "fsdp" else "more ranks to divide it over"
    yield f"{start}, nor with {'; '.join(tried)}: take {divided}, shorter samples, or larger GPUs"


def _changes(question: Question) -> Iterator[tuple[str, EngineConfig, int]]:
    """In the order of what they cost."""
    engine, train = question.config.engine, question.config.train
    kinds = ("none", "selective", "full")
    more = kinds[kinds.index(engine.activation_checkpointing) + 1 :]
    for kind in more:
        yield _with(engine, f"engine.activation_checkpointing {kind}", 0, activation_checkpointing=kind)
    full: dict[str, Any] = {"activation_checkpointing": "full"}
    if train.micro_batch_size > 1 and train.global_batch_size % question.replicas == 0:
        yield _with(engine, "engine.activation_checkpointing full, train.micro_batch_size 1", 1, **full)
    if question.engine == "fsdp" and question.micro_batches > 1:
        bfloat16 = {**full, "reduce_dtype": "bfloat16"}
        yield _with(
            engine, "engine.activation_checkpointing full, engine.reduce_dtype bfloat16", 0, **bfloat16
        )


def _with(engine: EngineConfig, text: str, micro: int, **changes: Any) -> tuple[str, EngineConfig, int]:
    return text, engine.model_copy(update=changes), micro


def _accumulation(question: Question, plan: Plan) -> Iterator[str]:
    """FSDP here reduces gradients in the last micro-batch only."""
    if question.engine != "fsdp" or question.micro_batches == 1:
        return
    engine = question.config.engine
    width = 4 if engine.reduce_dtype == "float32" or engine.param_dtype == "float32" else 2
    whole = width * plan.parameters.total // engine.fsdp.tensor_parallel
    size = question.config.train.global_batch_size // question.replicas
    yield (
        f"a step has {question.micro_batches} micro-batches, between which each rank keeps gradients whole: "
        f"some {gigabytes(whole)} of its memory; none of it with train.micro_batch_size {size}, or with "
        f"{question.micro_batches} times as many ranks"
    )


def _search(question: Question, search: SearchPlan) -> Iterator[str]:
    gpu, config = question.search_gpu, question.config
    room, of = gpu.usable_bytes, f"of {gigabytes(gpu.usable_bytes)} of a {gpu.name}"
    beside = f", {gigabytes(search.resident)} of it the trainers'" if search.resident else ""
    needed = search.resident + search.probes.total
    if needed > room:
        yield (
            f"training {search.probes.jointly} probe(s) jointly does not fit: {gigabytes(needed)}{beside}, "
            f"{of}; {_smaller_probes(question, room - search.resident)}"
        )
    needed = search.resident + search.candidates.total
    if needed > room:
        yield (
            f"evaluating candidates does not fit: {gigabytes(needed)}{beside}, {of}, with a "
            f"sample in a pass; pool.ranks_per_model {2 * config.pool.ranks_per_model} shards the model"
        )
    chosen = search.chosen
    if chosen.in_time:
        return
    what = "training waits for it" if config.search.mode == "sync" else "the mixture changes that much later"
    end = f"a pool of {search.enough.ranks} would do" if search.enough else "no pool here is large enough"
    yield (
        f"the search takes {share(chosen.interval_share)} of the training left after its request, and "
        f"{what}: {end} for {share(question.due_within)} (--due-within), or fewer search.probes.steps"
    )


def _smaller_probes(question: Question, room: int) -> str:
    """What is the first to fit of smaller passes, and of a model that is sharded besides."""
    config, data = question.config, question.data
    names, tried = components(config, data.domains), []
    for sharded in (1, 2, 4, 8):
        ranks = max(sharded, config.pool.ranks_per_model)
        probes = config.search.probes.model_copy(update={"micro_batch_size": 1, "max_joint": 1})
        changed = config.model_copy(
            update={
                "search": config.search.model_copy(update={"probes": probes}),
                "pool": config.pool.model_copy(update={"ranks_per_model": ranks}),
            }
        )
        found = probe_memory(question.source, changed, names=names, sequence_length=data.sequence_length)
        text = "search.probes.micro_batch_size 1, max_joint 1"
        if sharded > 1:
            text += f", pool.ranks_per_model {ranks}"
        tried.append(f"{text}: {gigabytes(found.total)} besides")
        if found.total <= room:
            return f"it fits with {tried[-1]}"
    return f"nor with {'; '.join(tried)}: shorter samples or larger GPUs are needed"
