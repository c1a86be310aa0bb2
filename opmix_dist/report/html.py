"""The report of a run: one self-contained HTML file, from what its run directory holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from opmix_dist.config import SearchRunConfig
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.report import charts, page, tables, words
from opmix_dist.report.bad_steps_section import bad_steps_section
from opmix_dist.report.page import Html
from opmix_dist.report.reading import RunView, read_run
from opmix_dist.report.search_section import search_section
from opmix_dist.report.speed_section import speed_section
from opmix_dist.settings import to_yaml


def write_report(run: RunDir, *, baseline: RunDir | None = None) -> Path:
    """Write RUN/report.html, which opens from disk and loads nothing from a network.

    A run that has no search, is in progress, or whose search failed gets a report of what there is.

    Args:
        baseline: another run over the same domains to compare with.

    Raises:
        UserError: no run directory, a file of its trainer is invalid, or the baseline's domains are others.
    """
    report = _Report(read_run(run), read_run(baseline) if baseline else None)
    files.write_bytes(run.report_file, report.render())
    return run.report_file


class _Report:
    """One page; a method per section, in the order in which they appear."""

    def __init__(self, run: RunView, baseline: RunView | None) -> None:
        if baseline and baseline.name == run.name:
            baseline = replace(baseline, name=f"{baseline.name} (baseline)")
        self.run, self.baseline = run, baseline
        self.views = [view for view in (baseline, run) if view]
        self.figures = page.Figures()
        self.colours = charts.domain_colours(run.domains)
        self.finals = [view.final for view in self.views if view.final]
        self.rows = tables.loss_rows(self.finals) if run.final else []
        self.compared = bool(self.rows) and len(self.finals) == 2

    def render(self) -> bytes:
        if isinstance(self.run.config, SearchRunConfig):
            parts = [*self.searches(), self.compute(), self.configuration()]
        else:
            parts = [
                self.headline(),
                self.mixture(),
                self.heldout(),
                self.final(),
                *self.searches(),
                self.compute(),
                self.training(),
                speed_section(self.views, self.figures),
                *bad_steps_section(self.run.bad_steps),
                self.configuration(),
            ]
        return page.render(self.run.name, self.lead(), parts, self.figures)

    def lead(self) -> str:
        """The result in one sentence."""
        if isinstance(self.run.config, SearchRunConfig):
            return f"A search from {self.run.config.model.checkpoint}, without training."
        if self.run.summary is None:
            latest = f", training loss {self.run.train[-1].loss:.4f}" if self.run.train else ""
            return f"Not finished: step {self.run.last_step:,} of {self.run.config.train.steps:,}{latest}."
        if not self.rows:
            return "Finished without a held-out evaluation."
        average = self.rows[-1].perplexities
        text = f"Average perplexity {average[-1]:.2f}"
        if self.compared:
            text += f", {words.comparison(average[1], average[0])} {self._baseline_name} {self._at_tokens()}"
        return f"{text}."

    @property
    def _baseline_name(self) -> str:
        return self.baseline.name if self.baseline else ""

    def _at_tokens(self) -> str:
        its, mine = (final.tokens for final in self.finals)
        return "at the same tokens" if mine == its else f"({words.si(mine)} against {words.si(its)} tokens)"

    def headline(self) -> Html:
        cards = [*self._loss_cards(), *self._size_cards()]
        return page.element("div", *(page.card(*texts) for texts in cards), css="cards")

    def _loss_cards(self) -> Iterator[tuple[str, str, str]]:
        if not self.rows:
            return
        average = self.rows[-1]
        for label, values, digits in (
            ("average perplexity", average.perplexities, 2),
            ("average loss", average.losses, 4),
        ):
            before = f"{self._baseline_name}: {values[0]:.{digits}f}" if self.compared else ""
            yield f"{values[-1]:.{digits}f}", label, before

    def _size_cards(self) -> Iterator[tuple[str, str, str]]:
        run = self.run
        tokens = run.final.tokens if run.final else run.train[-1].tokens if run.train else 0
        yield words.si(tokens), "training tokens", f"{run.last_step:,} steps"
        count = len(run.searches)
        yield str(count), "search" if count == 1 else "searches", self._search_share()
        if run.summary:
            ranks = run.summary.world_size
            yield (
                words.si(run.summary.parameters),
                "parameters",
                f"trained on {ranks} rank{'s' if ranks > 1 else ''}",
            )

    def _search_share(self) -> str:
        total = tables.total_cost(self.run.costs.values()).flops
        spent = sum(cost.flops for phase, cost in self.run.costs.items() if phase.startswith("search "))
        return f"{words.share(spent / total)} of the run's FLOPs" if total and spent else ""

    def mixture(self) -> Html:
        title = "Mixture over time"
        if not self.run.mixtures:
            return page.section(title, page.problem("No mixture has been recorded yet."))
        figure = charts.mixture_over_time(self.run.mixtures, self.run.last_step, self.colours)
        text = "Share of each domain in what was read. Triangles mark a new mixture; hover for the reason."
        return page.section(title, page.caption(text), self.figures.place(figure))

    def heldout(self) -> Html:
        title = "Held-out loss by domain"
        if not self.run.evals:
            return page.section(title, page.problem("No held-out evaluation has been recorded yet."))
        base = self.baseline.evals if self.baseline else []
        grid = (charts.heldout_loss(d, self.run.evals, base, c) for d, c in self.colours.items())
        text = "Nats per token over training tokens; hover for the standard error."
        if base:
            text += f" Dashed: {self._baseline_name}."
        return page.section(title, page.caption(text), self.figures.grid(grid))

    def final(self) -> Html:
        title = "Final losses" if self.run.summary else "Latest losses"
        if not self.rows:
            return page.section(title, page.problem("There is no evaluation to show yet."))
        notes = []
        if self.baseline and not self.compared:
            notes.append(page.problem(f"The baseline {self.baseline.name} has no held-out evaluation."))
        unfinished = [view.name for view in self.views if view.summary is None]
        if unfinished:
            notes.append(page.problem(f"Not finished, latest evaluation shown: {', '.join(unfinished)}."))
        figure = charts.final_comparison(self.rows[:-1], self.colours)
        text = f"Nats per token ± standard error. {tables.AVERAGES}"
        return page.section(title, page.caption(text), *notes, self.figures.place(figure), self._loss_table())

    def _loss_table(self) -> Html:
        names = [self._baseline_name, self.run.name] if self.compared else [self.run.name]
        header = ["domain", *(f"{name}: {what}" for name in names for what in ("loss", "perplexity"))]
        header += ["difference in loss"] if self.compared else []
        return page.table(header, map(self._loss_cells, self.rows))

    def _loss_cells(self, row: tables.LossRow) -> list[str]:
        cells = [row.label]
        for loss, stderr, value in zip(row.losses, row.stderrs, row.perplexities, strict=True):
            emphasis = page.Strong if self.compared and loss == row.best else str
            cells += [emphasis(words.loss(loss, stderr)), emphasis(f"{value:.2f}")]
        return [*cells, words.signed(row.differences[-1])] if self.compared else cells

    def searches(self) -> list[Html]:
        if not self.run.searches:
            return [page.section("Searches", page.caption(self._no_search()))]
        realised = self.run.summary.final_search_loss if self.run.summary else {}
        return [search_section(view, realised, self.colours, self.figures) for view in self.run.searches]

    def _no_search(self) -> str:
        if isinstance(self.run.config, SearchRunConfig):
            return "The search has not begun."
        policy = self.run.config.mixture.policy
        text = f"This run has requested no search (mixture.policy: {policy})."
        if policy == "static" or self.run.summary:
            return text
        return f"{text} The first starts at step {self.run.config.search_step:,}."

    def compute(self) -> Html:
        title = "Compute"
        views = [view for view in self.views if view.costs]
        notes = [page.problem(text) for text in self._missing_costs()]
        if not views:
            return page.section(title, *notes)
        ledgers = {view.name: view.costs for view in views}
        rows = [
            [f"{view.name}: {phase}", *tables.cost_cells(cost)]
            for view in views
            for phase, cost in tables.cost_rows(view.costs)
        ]
        text = "A device-second is a second of one rank that is busy with a phase or waits in it. "
        text += "MFU is FLOPs over what devices can do in these seconds, where that is known."
        chart = self.figures.place(charts.compute_shares(ledgers))
        return page.section(
            title, page.caption(text), *notes, chart, page.table(["", *tables.COST_HEADER], rows)
        )

    def _missing_costs(self) -> Iterator[str]:
        for view in self.views:
            if view.summary is None and not isinstance(view.config, SearchRunConfig):
                yield f"{view.name} has not finished: the costs of its training are not known yet."
        for search in self.run.searches:
            if search.proposal is None:
                yield f"The cost of search {search.name} is not known: it left no proposal."

    def training(self) -> Html:
        title = "Training loss"
        if not self.run.train:
            return page.section(title, page.problem("No training step has been logged yet."))
        steps = math.ceil(len(self.run.train) / charts.MOST_POINTS)
        text = (
            f"Nats per token{f'; each point is the mean of up to {steps} logged steps' if steps > 1 else ''}."
        )
        figure = charts.training_loss(self.views)
        return page.section(title, page.caption(text), self.figures.place(figure))

    def configuration(self) -> Html:
        """Settings, and the versions that ran them, folded away."""
        versions = self.run.summary.versions if self.run.summary else {}
        lines = "".join(f"# {name} {version}\n" for name, version in versions.items())
        content = page.element("pre", lines + to_yaml(self.run.config))
        return page.section(
            "Configuration", page.element("details", page.element("summary", "config.yaml"), content)
        )
