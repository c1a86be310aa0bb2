"""``opmix data ls | inspect | verify``: what is in a prepared folder, or in the data of a run."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opmix_dist.errors import UserError

if TYPE_CHECKING:
    from opmix_dist.config import DataConfig
    from opmix_dist.data.catalogue import Catalogue
    from opmix_dist.data.store import ShardStore
    from opmix_dist.exchange.rundir import RunDir

UNSOUND = 1
"""Exit status of ``verify`` when something is wrong."""


def add_data_commands(commands: Any) -> None:
    """Add ``data`` and what belongs to it to the subcommands of ``opmix``."""
    data = commands.add_parser("data", help="look at prepared data, or at that of a run")
    kinds = data.add_subparsers(dest="data_command", required=True)

    ls = kinds.add_parser("ls", help="domains, their sizes, and what a run has drawn of them")
    _add_place(ls)
    ls.add_argument("--json", action="store_true", help="one line of JSON for each domain, then the sum")
    ls.set_defaults(run=_ls)

    inspect = kinds.add_parser("inspect", help="samples as text, with the borders of their documents")
    _add_place(inspect)
    inspect.add_argument("--domain", required=True)
    inspect.add_argument("--split", choices=("train", "eval"), default="train")
    inspect.add_argument("--sample", type=int, help="number of one sample, from 0")
    inspect.add_argument("--count", type=int, default=3, help="samples to choose at random")
    inspect.add_argument("--seed", type=int, default=0, help="of that choice")
    inspect.set_defaults(run=_inspect)

    verify = kinds.add_parser(
        "verify",
        help="check every shard, count and hash, and look for duplicates",
        description="Ends with status 1 when something is wrong; duplicates alone are warnings.",
    )
    _add_place(verify)
    verify.add_argument("--domain", action="append", help="check only this one; repeatable")
    verify.add_argument("--workers", type=int, help="processes; default: all cores")
    verify.add_argument("--all", action="store_true", help="read train splits for duplicates among them, too")
    verify.add_argument("--strict", action="store_true", help="status 1 for duplicates, too")
    verify.set_defaults(run=_verify)


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", metavar="PATH", help="prepared folder, its URL, or a run directory")
    parser.add_argument("--cache", help="local folder for the shards of a URL")
    parser.add_argument("--cache-limit", help="most that the cache may hold, such as 200GB")


@dataclass(frozen=True)
class _Place:
    """What the user named."""

    data: DataConfig
    run: RunDir | None

    def open(self, domains: list[str] | None = None) -> Catalogue:
        """UserError when it cannot be opened."""
        from opmix_dist.data.build import open_data
        from opmix_dist.report.run_data import open_run_data

        if self.run is None:
            return open_data(self.data, domains)
        return open_run_data(self.run, self.data, domains)

    def store(self) -> ShardStore | None:
        """Of a remote root. What it fetches is checked, whatever the run's settings say."""
        from opmix_dist.data.store import ShardStore

        if self.data.cache is None:
            return None
        limit, timeout_s = self.data.cache_limit, self.data.fetch_timeout_s
        return ShardStore(self.data.root, Path(self.data.cache), limit_bytes=limit, timeout_s=timeout_s)


def _place(arguments: argparse.Namespace) -> _Place:
    """Raises UserError: a URL without a cache, or a run whose configuration cannot be read."""
    from pydantic import ValidationError

    from opmix_dist.config import DataConfig
    from opmix_dist.data.remote import is_url
    from opmix_dist.exchange.rundir import RunDir
    from opmix_dist.report.run_data import is_run

    given = {"cache": arguments.cache, "cache_limit": arguments.cache_limit}
    given = {key: value for key, value in given.items() if value is not None}
    run = None
    settings: dict[str, Any] = {"root": arguments.place}
    if not is_url(arguments.place) and is_run(Path(arguments.place)):
        run = RunDir(arguments.place)
        settings = run.config().data.model_dump()
    elif is_url(arguments.place) and arguments.cache is None:
        raise UserError(f"{arguments.place} is remote: give --cache, a local folder for its shards")
    try:
        return _Place(DataConfig.model_validate({**settings, **given}), run)
    except ValidationError as error:
        raise UserError(f"--cache-limit {arguments.cache_limit}: {error.errors()[0]['msg']}") from None


def _ls(arguments: argparse.Namespace, rest: list[str]) -> None:
    from opmix_dist.data.overview import overview
    from opmix_dist.report.data_tables import overview_lines, overview_rows, overview_table
    from opmix_dist.report.run_data import read_run_data
    from opmix_dist.terminal import open_console, say

    place = _place(arguments)
    catalogue = place.open()
    domains = overview(catalogue)
    run = read_run_data(place.run, catalogue) if place.run else None
    if arguments.json:
        for row in overview_rows(catalogue, domains, run):
            print(json.dumps(row))
        return
    console = open_console()
    console.print(overview_table(domains, run))
    for line in overview_lines(catalogue, run):
        say(console, line)


def _inspect(arguments: argparse.Namespace, rest: list[str]) -> None:
    from opmix_dist.data.excerpt import choose, excerpt, leaving_no_trace
    from opmix_dist.report.data_tables import excerpt_legend, excerpt_text
    from opmix_dist.terminal import open_console

    if arguments.count < 1 or arguments.seed < 0:
        raise UserError(f"--count {arguments.count} --seed {arguments.seed}: give at least 1 and 0")
    console = open_console()
    domain, split = arguments.domain, arguments.split
    with leaving_no_trace(_place(arguments).open([domain])) as catalogue:
        numbers = [arguments.sample]
        if arguments.sample is None:
            samples = catalogue.domains[domain].splits[split].samples
            numbers = choose(samples, arguments.count, arguments.seed, domain)
        tokenizer = catalogue.load_tokenizer()
        for number in numbers:
            found = excerpt(catalogue, tokenizer, domain, split, number)
            console.print(excerpt_text(found, catalogue.sequence_length), soft_wrap=True)
    console.print(excerpt_legend(found.chat), soft_wrap=True)


def _verify(arguments: argparse.Namespace, rest: list[str]) -> int:
    from opmix_dist.data.verify import verify
    from opmix_dist.report.data_tables import verify_lines, verify_table
    from opmix_dist.report.run_data import run_domains
    from opmix_dist.terminal import open_console, say

    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: give at least 1")
    place = _place(arguments)
    domains = arguments.domain
    if domains is None and place.run is not None:
        domains = run_domains(place.run, place.data)
    report = verify(
        place.data.root,
        store=place.store(),
        domains=domains,
        workers=arguments.workers,
        all_train=arguments.all,
    )
    console = open_console()
    console.print(verify_table(report))
    for line in verify_lines(report):
        say(console, line)
    return UNSOUND if not report.sound or (arguments.strict and report.repetitions) else 0
