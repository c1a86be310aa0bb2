"""A plan as tables for a terminal, and as one JSON value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table

from opmix_dist.plan.build import Plan, SearchPlan
from opmix_dist.plan.question import Question
from opmix_dist.plan.sizes import count, duration, gigabytes, hours, share


def as_json(question: Question, plan: Plan, warnings: list[str]) -> dict[str, Any]:
    """Bytes, seconds and FLOPs, unrounded."""
    found = asdict(plan)
    found["parameters"]["total"] = plan.parameters.total
    found["memory"]["total"] = plan.memory.total
    found["memory"]["usable"] = question.gpu.usable_bytes
    found["flops"]["train"] = plan.flops.train()
    found["flops"]["probe"] = plan.flops.probe()
    found["seconds"], found["gpu_hours"] = plan.seconds, plan.gpu_hours
    for phase, value in zip(plan.phases, found["phases"], strict=True):
        value["gpu_hours"] = phase.gpu_hours
    if plan.search is not None:
        for kind in ("probes", "candidates"):
            found["search"][kind]["total"] = getattr(plan.search, kind).total
        found["search"]["peak"] = plan.search.peak
        found["search"]["usable"] = question.search_gpu.usable_bytes
    asked = {
        "gpu": question.gpu.name,
        "nodes": question.nodes,
        "gpus_per_node": question.gpus_per_node,
        "trainers": question.trainers,
        "pool_ranks": question.pool_ranks,
        "search_gpu": question.search_gpu.name,
        "engine": question.engine,
        "micro_batches": question.micro_batches,
        "mfu": question.mfu,
        "search_mfu": question.search_mfu,
        "domains": question.data.domains,
        "sequence_length": question.data.sequence_length,
    }
    return {"asked": asked, **found, "warnings": warnings}


def tables(question: Question, plan: Plan) -> Iterator[Table]:
    yield _model(question, plan)
    yield _memory(question, plan)
    yield _phases(question, plan)
    if plan.search is not None:
        yield _choices(question, plan.search)
    yield _storage(plan)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _model(question: Question, plan: Plan) -> Table:
    counts, flops = plan.parameters, plan.flops
    table = _table("Model", "", "parameters", "FLOPs per token, forward")
    table.add_row("embeddings", f"{counts.embeddings:,}", "0")
    table.add_row("blocks", f"{counts.blocks:,}", f"{flops.blocks:,.0f}")
    table.add_row("of it attention's scores and values", "", f"{flops.attention:,.0f}")
    table.add_row("norm before the head", f"{counts.rest:,}", "0")
    table.add_row("head", f"{counts.head:,}", f"{flops.head:,.0f}")
    table.add_row("all", f"{counts.total:,}", f"{flops.forward:,.0f}", style="bold")
    table.add_row(
        "training: three times, and recomputed", "", f"{flops.train():,.0f} + {plan.recomputed:,.0f}"
    )
    return table


def _memory(question: Question, plan: Plan) -> Table:
    memory, search = plan.memory, plan.search
    ranks = (
        f"{question.trainers} trainer rank(s), {question.engine}, {question.micro_batches} micro-batch(es)"
    )
    if search is not None and question.pool_ranks:
        ranks += f"; a pool of {question.pool_ranks} {question.search_gpu.name}"
    columns = ["kind", "training"] + (["probes", "candidates"] if search else [])
    table = _table(f"Memory of a rank: {ranks}", *columns)

    def row(
        name: str, training: int | None, probes: int | None = None, candidates: int | None = None
    ) -> None:
        cells = (training, probes, candidates)[: len(columns) - 1]
        table.add_row(name, *("" if cell is None else gigabytes(cell) for cell in cells))

    if search is None:
        row("parameters", memory.parameters)
    else:
        row("parameters", memory.parameters, search.probes.model, search.candidates.model)
        row("adapters, with gradients and moments", None, search.probes.adapters, search.candidates.adapters)
    row("gradients", memory.gradients)
    row("optimizer", memory.optimizer)
    if search is not None and search.resident:
        row("the trainers' own beside it", None, search.resident, search.resident)
    passes = () if search is None else (search.probes.passes, search.candidates.passes)
    row("activations and others", memory.activations_and_others, *passes)
    row("of it kept for the backward pass", memory.kept)
    totals = (
        ()
        if search is None
        else (search.resident + search.probes.total, search.resident + search.candidates.total)
    )
    row("all", memory.total, *totals)
    searching = question.search_gpu.usable_bytes
    row("usable", question.gpu.usable_bytes, *([searching, searching] if search else []))
    if memory.offloaded:
        row("in the host's memory", memory.offloaded)
    return table


def _phases(question: Question, plan: Plan) -> Table:
    title = f"Phases: MFU {question.mfu:g} of {plan.rates.peak / 1e12:,.1f} TFLOP/s ({question.gpu.name})"
    if plan.search is not None:
        peak = plan.rates.pool_peak if question.pool_ranks else plan.rates.inline_peak
        title += f", in the search {question.search_mfu:g} of {peak / 1e12:,.1f} ({question.search_gpu.name})"
    table = _table(title, "phase", "tokens", "FLOPs", "ranks", "time", "GPU-hours")
    for phase in plan.phases:
        table.add_row(
            phase.name,
            count(phase.tokens),
            f"{phase.flops:.3g}",
            str(phase.ranks),
            duration(phase.seconds),
            hours(phase.gpu_hours),
        )
    return table


def hours_by_kind(question: Question, trainers: float, pool: float) -> str:
    """GPU-hours of one kind of GPU, or of two, which do not cost the same."""
    if question.search_gpu == question.gpu:
        return hours(trainers + pool)
    kinds = ((trainers, question.gpu), (pool, question.search_gpu))
    return " + ".join(f"{hours(value)} {gpu.name}" for value, gpu in kinds if value) or "0"


def run_hours(question: Question, plan: Plan) -> str:
    """Of the phases, busy ranks alone: what waits beside them is in the table of places."""
    searching = sum(phase.gpu_hours for phase in plan.phases if phase.gpu != question.gpu.name)
    return hours_by_kind(question, plan.gpu_hours - searching, searching)


def enough_ranks(question: Question, search: SearchPlan) -> str:
    """How large a pool is in time."""
    due = f"within {share(question.due_within)} of the training after its request"
    kind = question.pool_gpu if question.config.pool.external else question.gpu
    if search.enough is None:
        most = max(choice.ranks for choice in search.choices)
        return f"no pool of up to {most} {kind.name} makes the search finish {due}"
    ranks = search.enough.ranks
    nodes = -(-ranks // kind.per_node)
    return (
        f"a pool of {ranks} {kind.name} ({nodes} machine(s) of {kind.per_node}) makes the search finish {due}"
    )


def _choices(question: Question, search: SearchPlan) -> Table:
    waits = "waits" if question.config.search.mode == "sync" else "goes on"
    title = f"Where to search ({search.components} probes; training {waits} while a pool searches)"
    table = _table(
        title,
        "place",
        "ranks",
        "search",
        "of the training left",
        "whole run",
        "GPU-hours",
        "of them waiting",
        f"within {share(question.due_within)}",
        "global batch",
    )
    for choice in search.choices:
        table.add_row(
            choice.place,
            str(choice.ranks),
            duration(choice.search.seconds),
            share(choice.interval_share),
            duration(choice.total_seconds),
            hours_by_kind(question, choice.trainer_gpu_hours, choice.pool_gpu_hours),
            hours_by_kind(question, choice.trainer_waiting, choice.pool_waiting),
            "yes" if choice.in_time else "no",
            "divides" if choice.batch_divides else "does not divide",
            style="bold" if choice == search.chosen else None,
        )
    return table


def _storage(plan: Plan) -> Table:
    stored = plan.storage
    table = _table("Storage", "what", "size")
    for name, size in (
        ("a checkpoint: parameters and two moments", stored.checkpoint),
        ("checkpoints at once, one being written", stored.checkpoints),
        ("snapshot that the search starts from", stored.snapshot),
        ("probes", stored.probes),
        ("export", stored.export),
        ("all at once", stored.at_once),
        ("all checkpoints of the run, written", stored.written),
        ("host memory of a node: snapshot being written", stored.host_snapshot),
        ("host memory of a node: checkpoint being written", stored.host_checkpoint),
    ):
        table.add_row(name, gigabytes(size))
    return table
