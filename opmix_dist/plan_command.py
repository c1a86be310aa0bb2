"""``opmix plan``: what a run needs, before any device is paid for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from opmix_dist.errors import UserError

GPUS_PER_NODE = "as the vendor's usual machines have"


def add_plan_command(commands: Any) -> None:
    """Add ``plan`` to the subcommands of ``opmix``."""
    plan = commands.add_parser(
        "plan",
        help="memory, FLOPs, GPU-hours, time and storage of a run, without GPUs and without weights",
        description="Runs the step of the configuration's engine on tensors without memory, as the first of "
        "the ranks. Any setting of the configuration may be given as --dotted.key value.",
    )
    plan.add_argument("config", type=Path, help="YAML configuration of `opmix train`")
    plan.add_argument("--nodes", type=int, default=1, help="machines of the launch (default: 1)")
    plan.add_argument("--gpu", required=True, help="kind of GPU, such as h100; an unknown name lists all")
    plan.add_argument("--gpus-per-node", type=int, help=f"(default: {GPUS_PER_NODE})")
    plan.add_argument("--mfu", type=float, default=0.4, help="of training, as you measured it (default: 0.4)")
    plan.add_argument("--search-mfu", type=float, help="of probes and candidates (default: as --mfu)")
    plan.add_argument(
        "--pool-ranks", type=int, help="ranks that search (default: pool.ranks); 0: the trainer ranks"
    )
    plan.add_argument(
        "--pool-nodes", type=int, help="machines of a pool that is a launch of its own (pool.external)"
    )
    plan.add_argument("--pool-gpu", help="their kind of GPU (default: as --gpu)")
    plan.add_argument("--pool-gpus-per-node", type=int, help=f"(default: {GPUS_PER_NODE})")
    plan.add_argument(
        "--due-within",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of the training after its request, in which a search is to be done (default: 0.1)",
    )
    plan.add_argument("--domains", type=int, help="their number, where data.root is not there")
    plan.add_argument("--sequence-length", type=int, help="tokens of a sample, likewise")
    plan.add_argument("--vocab-size", type=int, help="of the tokenizer, likewise")
    plan.add_argument("--json", action="store_true", help="all of it as one JSON value")
    plan.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace, rest: list[str]) -> None:
    from opmix_dist.config import load_config
    from opmix_dist.plan.gpus import find_gpu

    # what can be wrong comes before what takes seconds to import
    _require_sensible(arguments)
    gpu = find_gpu(arguments.gpu)
    pool_gpu = find_gpu(arguments.pool_gpu, "--pool-gpu") if arguments.pool_gpu else gpu
    if arguments.pool_nodes:
        rest = [*rest, "--pool.external", "true", "--pool.ranks", "0"]
    config = load_config(arguments.config, rest)
    pool = _pool_ranks(arguments, config, pool_gpu)

    from opmix_dist.plan.advice import advice
    from opmix_dist.plan.build import make_plan
    from opmix_dist.plan.question import Question, data_sizes, sizes_of_model

    data = data_sizes(config, arguments.domains, arguments.sequence_length, arguments.vocab_size)
    question = Question(
        config=config,
        data=data,
        source=sizes_of_model(config, data.vocab_size),
        gpu=gpu,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node or gpu.per_node,
        pool_ranks=pool,
        pool_gpu=pool_gpu,
        mfu=arguments.mfu,
        search_mfu=arguments.search_mfu or arguments.mfu,
        due_within=arguments.due_within,
    )
    plan = make_plan(question)
    warnings = advice(question, plan)
    if arguments.json:
        from opmix_dist.plan.tables import as_json

        print(json.dumps(as_json(question, plan, warnings), indent=1))
    else:
        _print(question, plan, warnings)


def _require_sensible(arguments: argparse.Namespace) -> None:
    counts = ("nodes", "gpus_per_node", "pool_nodes", "pool_gpus_per_node")
    for name in (*counts, "domains", "sequence_length", "vocab_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give at least 1")
    for name in ("mfu", "search_mfu"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= 1:
            raise UserError(
                f"--{name.replace('_', '-')} {value:g}: give a share between 0 and 1, such as 0.4"
            )
    if not arguments.due_within > 0:
        raise UserError(f"--due-within {arguments.due_within:g}: give a share above 0, such as 0.1")
    if arguments.pool_ranks is not None and arguments.pool_ranks < 0:
        raise UserError(f"--pool-ranks {arguments.pool_ranks}: give 0 or more")
    if arguments.pool_ranks is not None and arguments.pool_nodes is not None:
        raise UserError("--pool-ranks and --pool-nodes both say how large the pool is: give one of them")
    if arguments.pool_gpus_per_node is not None and arguments.pool_nodes is None:
        raise UserError("--pool-gpus-per-node is of --pool-nodes: give that too")


def _pool_ranks(arguments: argparse.Namespace, config: Any, gpu: Any) -> int:
    """
    Args:
        gpu: the pool's.
    """
    if arguments.pool_nodes:
        return int(arguments.pool_nodes * (arguments.pool_gpus_per_node or gpu.per_node))
    pool = config.pool.ranks if arguments.pool_ranks is None else int(arguments.pool_ranks)
    if config.pool.external and not pool:
        raise UserError(
            "pool.external is a launch of its own: give its size with --pool-nodes or --pool-ranks"
        )
    if arguments.pool_gpu and not config.pool.external:
        raise UserError(
            "--pool-gpu is of a pool that is a launch of its own: give --pool-nodes, or set pool.external"
        )
    return int(pool)


def _print(question: Any, plan: Any, warnings: list[str]) -> None:
    from opmix_dist.plan.sizes import duration
    from opmix_dist.plan.tables import enough_ranks, run_hours, tables
    from opmix_dist.terminal import open_console, say

    console = open_console()
    for table in tables(question, plan):
        console.print(table)
    if plan.search is not None:
        say(console, enough_ranks(question, plan.search))
    say(
        console,
        f"a step takes {duration(plan.step_seconds)}, the run {duration(plan.seconds)} and "
        f"{run_hours(question, plan)} GPU-hours",
        style="bold",
    )
    for warning in warnings:
        say(console, f"! {warning}", style="yellow")
