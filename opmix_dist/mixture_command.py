"""``opmix mixture``: a mixture that was proposed or is in use, in the form that a trainer reads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from opmix_dist.errors import UserError

FORMATS = ("megatron", "olmo-core", "streams", "interleave", "json", "yaml")


def add_mixture_command(commands: Any) -> None:
    """Add ``mixture`` to the subcommands of ``opmix``."""
    mixture = commands.add_parser(
        "mixture",
        help="print a mixture in the form that another trainer reads",
        description="Prints the mixture that `opmix fit` or `opmix search` chose (where they decided to "
        "stay, the current one), or the last one that a training run took.",
    )
    mixture.add_argument(
        "place", type=Path, metavar="PROPOSAL_OR_RUN",
        help="a run directory, an output folder of `opmix fit`, or a JSON or YAML file of weights by domain",
    )  # fmt: skip
    mixture.add_argument("--format", choices=FORMATS, default="json", help="default: json")
    add_source_option(mixture)
    mixture.set_defaults(run=_mixture)


def add_source_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="where a domain's data lies, in the words of that trainer; repeatable, also for one NAME. "
        "Domains without one get their name as a path",
    )


def read_mixture(place: Path) -> dict[str, float]:
    """Weights by domain of whatever ``opmix`` wrote them to, or of a file of them.

    A run directory: the last mixture that was trained on, or what its last search chose. An output folder of
    ``opmix fit``, or a proposal.json: the proposal, or the current mixture where the decision was to stay.

    Raises:
        UserError: nothing of that kind is there, or the weights are no numbers.
    """
    from opmix_dist.exchange.rundir import RunDir

    if not place.is_dir():
        return _read_file(place)
    if (place / "proposal.json").is_file():
        return _read_file(place / "proposal.json")
    run = RunDir(place)
    mixtures = run.mixtures()
    if mixtures:
        return mixtures[-1].weights
    proposed = [search for search in run.search_dirs() if search.proposal_file.is_file()]
    if proposed:
        return proposed[-1].proposal().chosen
    raise UserError(f"{place} holds no mixture: it has neither proposal.json nor mixtures.jsonl")


def _read_file(path: Path) -> dict[str, float]:
    from opmix_dist.exchange.files import read_json
    from opmix_dist.settings import read_settings

    content = read_settings(path) if path.suffix in (".yaml", ".yml") else read_json(path)
    if isinstance(content, dict) and isinstance(content.get("weights"), dict):
        decision = content.get("decision")
        stays = isinstance(decision, dict) and decision.get("move") is False
        content = content.get("current") if stays else content["weights"]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no weights by domain")
    for name, weight in content.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"{path}: the weight of {name} is {weight!r}, no number")
    try:
        return {str(name): float(weight) for name, weight in content.items()}
    except OverflowError:
        raise UserError(f"{path}: a weight is too large for a number") from None


def _mixture(arguments: argparse.Namespace, rest: list[str]) -> None:
    from opmix_dist.mixture_files import mixture_text, parse_sources

    weights = read_mixture(arguments.place)
    print(mixture_text(arguments.format, weights, parse_sources(arguments.source)), end="")
