"""``opmix what-if``: losses that a finished search, or a fit of tables, predicts at any mixture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opmix_dist.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from opmix_dist.report.what_if import Answer, Searched, Trade

PAGE = "pareto.html"


def add_what_if(commands: Any) -> None:
    """Add ``what-if`` to the subcommands of ``opmix``."""
    what_if = commands.add_parser(
        "what-if",
        help="losses with intervals that a finished search predicts at any mixture, and Pareto fronts",
        description="The search's laws are fitted again to its candidates, to the same digits, and asked of "
        "the current mixture, the proposal and the mixture that --set makes. Differences between these have "
        "paired intervals.",
        epilog="A group is the mean loss of its members: --pareto code+math,web.",
    )
    what_if.add_argument(
        "place", metavar="RUN", type=Path, help="run directory, or output folder of `opmix fit`"
    )
    what_if.add_argument("--search", metavar="NAME", help="such as 0001; default: the last that proposed")
    what_if.add_argument(
        "--set",
        dest="shares",
        action="append",
        default=[],
        metavar="DOMAIN=SHARE",
        help="fix a share; repeatable. The other domains keep their proportions",
    )
    what_if.add_argument(
        "--from",
        dest="start",
        choices=("current", "proposal"),
        help="mixture that --set changes (default: current, where there is one)",
    )
    what_if.add_argument("--confidence", type=float, help="of the intervals (default: as the search's)")
    what_if.add_argument(
        "--bootstrap",
        type=int,
        metavar="N",
        help="resampled laws behind the intervals (default: as the search's)",
    )
    what_if.add_argument(
        "--pareto", metavar="A,B", help="front between two losses, or groups of them joined by +"
    )
    what_if.add_argument("--points", type=int, default=15, help="of the front (default: 15)")
    what_if.add_argument("--out", type=Path, metavar="FILE.html", help=f"plot of it (default: RUN/{PAGE})")
    what_if.add_argument("--json", action="store_true", help="all of it as one JSON value")
    what_if.set_defaults(run=_what_if)


def _what_if(arguments: argparse.Namespace, rest: list[str]) -> None:
    from opmix_dist.report.what_if import Answer
    from opmix_dist.searched import read_searched

    if arguments.confidence is not None and not 0.5 < arguments.confidence < 1:
        raise UserError(f"--confidence {arguments.confidence:g}: give a share between 0.5 and 1, such as 0.9")
    if arguments.bootstrap is not None and arguments.bootstrap < 2:
        raise UserError(f"--bootstrap {arguments.bootstrap}: give at least 2")
    if arguments.start is not None and not arguments.shares:
        raise UserError("--from is the mixture that --set changes: set a share with --set DOMAIN=SHARE")
    if arguments.out is not None and arguments.pareto is None:
        raise UserError("--out is for the plot of --pareto: give the two losses with --pareto A,B")
    searched = read_searched(arguments.place, arguments.search, arguments.confidence, arguments.bootstrap)
    asked = _asked(searched, arguments.shares, arguments.start) if arguments.shares else None
    answer = Answer(searched, asked)
    trade = _trade(searched, arguments.pareto, arguments.points) if arguments.pareto else None
    page = None if trade is None else _write_page(answer, trade, arguments.out or arguments.place / PAGE)
    if arguments.json:
        _print_json(answer, trade)
    else:
        _print(answer, trade, page)


def _asked(searched: Searched, texts: Sequence[str], start: str | None) -> np.ndarray:
    """Coefficients u [K] of the mixture that ``--set`` makes, of as many probes as the proposal's."""
    from opmix_dist.search.simplex import coefficients_of
    from opmix_dist.search.what_if import as_mixed_as, with_shares

    if start == "current" and searched.current is None:
        raise UserError(
            f"{searched.title} knows no current mixture: leave --from out, or say --from proposal"
        )
    is_current = start != "proposal" and searched.current is not None
    u = searched.current if is_current else searched.proposal
    assert u is not None
    composition, shares = searched.problem.expanded, _shares(texts, searched.domains)
    try:
        mixture = with_shares(u @ composition, shares)
        for index, share in shares.items():
            _require_reach(searched.domains[index], share, composition[:, index])
        asked = coefficients_of(mixture, composition, domains=searched.domains)
    except ValueError as error:
        raise UserError(f"--set {' '.join(texts)}: {error}") from None
    return as_mixed_as(searched.proposal, asked, composition)


def _shares(texts: Sequence[str], domains: Sequence[str]) -> dict[int, float]:
    """``["code=0.4"]`` by the domain's number."""
    shares: dict[int, float] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not equals:
            raise UserError(f"--set {text}: write DOMAIN=SHARE, such as {domains[0]}=0.4")
        if name not in domains:
            raise UserError(f"--set {text}: there is no domain {name}, only {', '.join(domains)}")
        if domains.index(name) in shares:
            raise UserError(f"--set {text}: the share of {name} is set twice")
        try:
            shares[domains.index(name)] = float(value)
        except ValueError:
            raise UserError(f"--set {text}: {value} is no number") from None
    return shares


def _require_reach(domain: str, share: float, of_components: np.ndarray) -> None:
    """ValueError where no mixture of components with these shares [K] has that share."""
    low, high = float(of_components.min()), float(of_components.max())
    if not low - 1e-9 <= share <= high + 1e-9:
        raise ValueError(f"mixtures of the probes have between {low:.4g} and {high:.4g} of {domain}")


def _trade(searched: Searched, text: str, points: int) -> Trade:
    """The front between the two losses or groups that ``--pareto`` names."""
    import numpy as np

    from opmix_dist.report.what_if import Trade
    from opmix_dist.search.frontier import pareto_front
    from opmix_dist.search.proposal import SolverError

    labels = text.split(",")
    if len(labels) != 2:
        raise UserError(f"--pareto {text}: name two losses or groups, such as {searched.losses[0]},B")
    weights = np.array([_mean_of(label, searched.losses) for label in labels])
    if np.array_equal(weights[0], weights[1]):
        raise UserError(f"--pareto {text}: both sides are the same losses")
    try:
        front = pareto_front(searched.fit.law, searched.problem, weights[0], weights[1], points=points)
    except (ValueError, SolverError) as error:
        raise UserError(f"--pareto {text}: {error}") from None
    return Trade((labels[0], labels[1]), weights, front)


def _mean_of(label: str, losses: Sequence[str]) -> np.ndarray:
    """Weights [D] of the mean of a loss or a group such as ``code+web``; a loss's own name may have a +."""
    import numpy as np

    members = [label] if label in losses else label.split("+")
    for name in members:
        if name not in losses:
            raise UserError(f"--pareto: there is no loss of {name}, only of {', '.join(losses)}")
    return np.array([members.count(name) for name in losses]) / len(members)


def _write_page(answer: Answer, trade: Trade, path: Path) -> Path:
    from opmix_dist.atomic import write_bytes
    from opmix_dist.report.frontier_page import frontier_page

    try:
        write_bytes(path, frontier_page(answer, trade))
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; --out FILE.html names another place"
        ) from None
    return path


def _print_json(answer: Answer, trade: Trade | None) -> None:
    from opmix_dist.report.what_if import answer_values, trade_values

    values = answer_values(answer)
    if trade is not None:
        values["pareto"] = trade_values(answer.searched, trade)
    print(json.dumps(values, allow_nan=False))


def _print(answer: Answer, trade: Trade | None, page: Path | None) -> None:
    from opmix_dist.report.what_if import answer_tables, trade_table
    from opmix_dist.terminal import open_console, say

    console = open_console()
    for table in answer_tables(answer):
        console.print(table)
    if trade is not None:
        console.print(trade_table(answer.searched, trade))
    for warning in answer.warnings():
        say(console, warning, style="yellow")
    if page is not None:
        say(console, f"plot: {page}")
