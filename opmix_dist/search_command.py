"""``opmix search``: a search alone, from a trained model to a mixture for any trainer."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from opmix_dist.mixture_command import add_source_option


def add_search_command(commands: Any) -> None:
    """Add ``search`` to the subcommands of ``opmix``."""
    search = commands.add_parser(
        "search",
        help="search a mixture for a trained model, without training; any setting as --dotted.key value",
        description="From the Hugging Face checkpoint model.checkpoint and the domains of data.root to a "
        "mixture, in the forms that other trainers read. Start it with torchrun to search on several ranks. "
        "A search that was killed goes on with the same command, one that has finished prints its result "
        "again; other candidates, laws or proposals use the probes and evaluations that are there.",
    )
    search.add_argument("config", type=Path, help="YAML configuration; that of a training run will do")
    search.add_argument("--print-config", action="store_true", help="print the documented settings and stop")
    add_source_option(search)
    search.set_defaults(run=_search)


def _search(arguments: argparse.Namespace, rest: list[str]) -> None:
    from opmix_dist.config import load_search_config
    from opmix_dist.settings import to_yaml

    config, unused = load_search_config(arguments.config, rest)
    if arguments.print_config:
        print(to_yaml(config, documented=True), end="")
        return
    from opmix_dist.mixture_files import parse_sources
    from opmix_dist.search_job import run_search_alone

    sources = parse_sources(arguments.source)
    leads = os.environ.get("RANK", "0") == "0"
    if unused and leads:
        print(f"a search has no use for {', '.join(unused)}: left out")
    run_search_alone(config, sources)
