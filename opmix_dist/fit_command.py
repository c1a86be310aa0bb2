"""``opmix fit``: laws and a mixture from tables of runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opmix_dist.errors import UserError
from opmix_dist.mixture_command import add_source_option, read_mixture

if TYPE_CHECKING:
    from rich.table import Table

    from opmix_dist.fit.analysis import Analysis, Outcome

SETTINGS = {
    "ratios": "swarm.ratios",
    "metrics": "swarm.metrics",
    "kl_reg": "proposer.kl_reg",
    "family": "regression.type",
    "objective": "objective.type",
    "seed": "regression.seed",
    "columns": "columns.preset",
    "run_column": "columns.run",
    "ratio_prefix": "columns.ratio_prefix",
    "metric_prefix": "columns.metric_prefix",
    "metric_suffix": "columns.metric_suffix",
}
"""Options that stand for a setting, which any other setting is given as: ``--dotted.key value``."""


def add_fit_command(commands: Any) -> None:
    """Add ``fit`` to the subcommands of ``opmix``."""
    fit = commands.add_parser(
        "fit",
        help="laws and a mixture from tables of runs (mixture, losses); any setting as --dotted.key value",
        description="Fits laws to the runs of two tables and proposes a mixture. Reads the tables and the "
        "fit files of olmix, and RegMix's tables with --columns regmix. What is given here wins over the "
        "file.",
        argument_default=argparse.SUPPRESS,
    )
    fit.add_argument("--ratios", metavar="TABLE", help="mixture of each run, CSV or Parquet")
    fit.add_argument("--metrics", metavar="TABLE", help="losses of each run, CSV or Parquet")
    fit.add_argument("--config", type=Path, metavar="YAML", default=None, help="fit file, as olmix's or ours")
    fit.add_argument("--output-dir", required=True, type=Path, metavar="OUT", help="folder to write to")
    fit.add_argument("--kl-reg", type=float, help="weight of KL(mixture || prior) (default: 0.05)")
    fit.add_argument("--family", help="of laws: log_linear (default), power, ..., or auto to compare them")
    fit.add_argument("--objective", help="mean (default), relative, worst or worst_change")
    fit.add_argument(
        "--current",
        type=Path,
        default=None,
        metavar="MIXTURE",
        help="mixture in use, to compare with: a JSON or YAML file of weights, or a run directory",
    )
    fit.add_argument("--seed", type=int, help="of the fit and the resampling (default: 0)")
    names = fit.add_argument_group("columns of the tables")
    names.add_argument("--columns", choices=("olmix", "regmix"), help="how they are named (default: olmix)")
    names.add_argument("--run-column", help="names the runs")
    names.add_argument("--ratio-prefix", help="begins the domains' columns, and is cut off")
    names.add_argument("--metric-prefix", help="begins the metrics' columns, and is cut off")
    names.add_argument("--metric-suffix", help="ends the metrics' columns, and is cut off")
    add_source_option(fit)
    fit.set_defaults(run=_fit, source=[])


def _fit(arguments: argparse.Namespace, rest: list[str]) -> None:
    from opmix_dist.fit.analysis import analyse
    from opmix_dist.fit.config import load_fit_config
    from opmix_dist.fit.outputs import write_outputs
    from opmix_dist.mixture_files import parse_sources
    from opmix_dist.terminal import open_console, say

    sources = parse_sources(arguments.source)
    if arguments.output_dir.exists() and not arguments.output_dir.is_dir():
        raise UserError(f"--output-dir {arguments.output_dir} is a file: name a folder")
    console = open_console()
    config = load_fit_config(arguments.config, [*_overrides(arguments), *rest])
    analysis = analyse(config, on_progress=lambda line: say(console, line))
    files = write_outputs(analysis, arguments.output_dir, sources)
    if analysis.outcome:
        console.print(mixture_table(analysis, analysis.outcome))
    console.print(quality_table(analysis))
    for line in lines(analysis, files):
        say(console, line)


def _overrides(arguments: argparse.Namespace) -> Iterator[str]:
    """Settings in YAML; JSON is YAML, so that a path or a name stays a string."""
    given = vars(arguments)
    for option, key in SETTINGS.items():
        if option in given:
            yield f"--{key}={json.dumps(given[option])}"
    if arguments.current is not None:
        yield f"--current={json.dumps(read_mixture(arguments.current))}"


def mixture_table(analysis: Analysis, outcome: Outcome) -> Table:
    """A row for each domain: prior, current, proposed with its interval."""
    from rich.table import Table
    from rich.text import Text

    from opmix_dist.data.printable import printable
    from opmix_dist.report import words

    settings, current = analysis.config.bootstrap, analysis.inputs.current
    table = Table(title="worst mixture" if analysis.config.proposer.make_worst_mix else "mixture")
    table.add_column("domain")
    shown = {"prior": outcome.problem.prior, "current": current, "proposed": outcome.proposal.mixture}
    columns = {name: weights for name, weights in shown.items() if weights is not None}
    for name in columns:
        table.add_column(name, justify="right")
    interval = outcome.bootstrap.interval(settings.confidence) if outcome.bootstrap else None
    if interval:
        table.add_column(f"{settings.confidence:.0%} interval", justify="right")
    for i, domain in enumerate(analysis.inputs.domains):
        cells = [words.share(weights[i]) for weights in columns.values()]
        if interval:
            cells.append(f"{words.share(interval[0][i])} to {words.share(interval[1][i])}")
        table.add_row(Text(printable(domain)), *cells)
    return table


def quality_table(analysis: Analysis) -> Table:
    """A row for each metric: what the laws expect, and how well they hold."""
    from rich.table import Table
    from rich.text import Text

    from opmix_dist.data.printable import printable
    from opmix_dist.fit.outputs import quality_rows
    from opmix_dist.report import words

    outcome, quality = analysis.outcome, quality_rows(analysis)
    table = Table(title=f"laws: {analysis.fit.family}, {len(analysis.inputs.fitted.runs)} runs")
    table.add_column("metric")
    losses = {
        "at current": outcome.current_losses if outcome else None,
        "at proposed": outcome.proposal.predicted if outcome else None,
    }
    columns = {name: values for name, values in losses.items() if values is not None}
    names = {"r2": "R2", "spearman": "rank", "loo_error": "left-out error", "calibration": "calibration"}
    if analysis.inputs.held_out:
        names["test_error"] = "test error"
    for name in (*columns, *names.values()):
        table.add_column(name, justify="right")
    for i, metric in enumerate(analysis.inputs.metrics):
        cells = [words.loss(float(values[i])) for values in columns.values()]
        table.add_row(Text(printable(metric)), *cells, *(words.loss(quality[i][key]) for key in names))
    return table


def _grouped(warnings: Sequence[str], metrics: Sequence[str]) -> Iterator[str]:
    """Warnings that say the same of several metrics, as one."""
    about: dict[str, list[str]] = {}
    for warning in warnings:
        name = next((metric for metric in metrics if warning.startswith(f"{metric}: ")), None)
        if name is None:
            yield warning
        else:
            about.setdefault(warning.removeprefix(f"{name}: "), []).append(name)
    for text, names in about.items():
        yield f"{', '.join(names)}: {text}"


def lines(analysis: Analysis, files: list[Path]) -> Iterator[str]:
    """What the tables do not say."""
    outcome = analysis.outcome
    for family, errors in analysis.fit.comparison.items():
        yield f"cross-validated error of {family}: {(errors**2).mean() ** 0.5:.4g}"
    for warning in _grouped(analysis.warnings, analysis.inputs.metrics):
        yield f"warning: {warning}"
    if outcome:
        name, kl = outcome.problem.objective, outcome.problem.kl
        yield (
            f"objective {name} + {kl:g} KL = {outcome.proposal.objective:.4f}, "
            f"KL to the prior {outcome.proposal.kl_divergence:.4f} nats"
        )
        if outcome.decision:
            yield f"{'move' if outcome.decision.move else 'stay'}: {outcome.decision.reason}"
    else:
        yield "no mixture is proposed: proposer.fit_only is true (--proposer.fit_only false proposes one)"
    yield f"written: {', '.join(str(file) for file in files)}"
