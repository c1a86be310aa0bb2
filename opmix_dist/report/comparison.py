"""Several runs side by side: one self-contained HTML page. The first run is the baseline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.report import charts, page, run_charts, tables, words
from opmix_dist.report.page import Html
from opmix_dist.report.reading import RunView, read_run

COMPARISON_FILE = "comparison.html"


def write_comparison(runs: Sequence[RunDir], path: Path) -> Path:
    """Write ``path``, which opens from disk and loads nothing from a network.

    Runs that have not finished are shown as far as they are; each must have been evaluated once.

    Args:
        runs: over the same domains, two at least; the baseline first.

    Raises:
        UserError: a folder is no training run, a file of its trainer is invalid, a run has no evaluation yet,
            or the domains differ.
    """
    page = _Comparison([read_run(run) for run in runs])
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, page.render())
    return path


def named_apart(views: Sequence[RunView]) -> list[RunView]:
    """Runs of the same name get a number, so that each has one name of its own."""
    names = words.apart(view.name for view in views)
    return [replace(view, name=name) for name, view in zip(names, views, strict=True)]


class _Comparison:
    """One page; a method per section, in the order in which they appear."""

    def __init__(self, views: Sequence[RunView]) -> None:
        self.views = named_apart(views)
        for view in self.views:
            if view.final is None:
                raise UserError(f"{view.name} has no held-out evaluation yet: leave it out, or wait for one")
        self.figures = page.Figures()
        self.rows = tables.loss_rows([view.final for view in self.views if view.final])
        self.colours = charts.domain_colours([view.name for view in self.views])

    def render(self) -> bytes:
        parts = [self.runs(), self.losses(), self.heldout(), self.mixtures(), self.compute(), self.training()]
        title = " · ".join(view.name for view in self.views)
        return page.render(title, self.lead(), parts, self.figures)

    def lead(self) -> str:
        """The result in one sentence."""
        average = self.rows[-1].perplexities
        best = min(range(len(average)), key=average.__getitem__)
        baseline = self.views[0].name
        text = f"Lowest average perplexity: {self.views[best].name}, {average[best]:.2f}"
        if best:
            text += f", {words.comparison(average[best], average[0])} {baseline}"
        tokens = {view.final.tokens for view in self.views if view.final}
        return f"{text}, at {'the same' if len(tokens) == 1 else 'different numbers of'} tokens."

    def runs(self) -> Html:
        header = ["run", "state", "steps", "tokens", "policy", "searches", "parameters", "trainer ranks"]
        return page.section("Runs", page.table(header, map(_facts, self.views)))

    def losses(self) -> Html:
        names = [view.name for view in self.views]
        header = ["domain", *names, *(f"{name} − {names[0]}" for name in names[1:])]
        notes = [page.problem(text) for text in self._unfinished()]
        text = f"Nats per token ± standard error; the lowest is bold. {tables.AVERAGES}"
        return page.section(
            "Held-out losses", page.caption(text), *notes, page.table(header, self._loss_table())
        )

    def _unfinished(self) -> Iterator[str]:
        names = [view.name for view in self.views if view.summary is None]
        if names:
            yield f"Not finished, latest evaluation shown: {', '.join(names)}."

    def _loss_table(self) -> Iterator[list[str]]:
        for row in self.rows:
            losses = zip(row.losses, row.stderrs, strict=True)
            cells = [_emphasised(words.loss(loss, err), loss == row.best) for loss, err in losses]
            yield [row.label, *cells, *(words.signed(change) for change in row.differences[1:])]
        average = self.rows[-1].perplexities
        best = min(average)
        yield [
            "average perplexity",
            *(_emphasised(f"{value:.2f}", value == best) for value in average),
            *(words.comparison(value, average[0]) for value in average[1:]),
        ]

    def heldout(self) -> Html:
        domains = [row.label for row in self.rows[:-1]]
        grid = (run_charts.heldout_losses(name, self.views, self.colours) for name in domains)
        text = "Nats per token over training tokens; hover for the standard error."
        return page.section("Held-out loss by domain", page.caption(text), self.figures.grid(grid))

    def mixtures(self) -> Html:
        views = [view for view in self.views if view.mixtures]
        figure = run_charts.latest_mixtures(views, self.colours)
        header = ["domain", *(view.name for view in views)]
        rows = tables.mixture_rows([view.mixtures[-1].weights for view in views])
        cells = [[name, *map(words.share, weights)] for name, weights in rows]
        return page.section("Latest mixtures", self.figures.place(figure), page.table(header, cells))

    def compute(self) -> Html:
        views = [view for view in self.views if view.costs]
        if not views:
            return page.section("Compute", page.problem("No run has finished: costs are not known yet."))
        rows = [
            [f"{view.name}: {phase}", *tables.cost_cells(cost)]
            for view in views
            for phase, cost in tables.cost_rows(view.costs)
        ]
        chart = self.figures.place(charts.compute_shares({view.name: view.costs for view in views}))
        return page.section("Compute", chart, page.table(["", *tables.COST_HEADER], rows))

    def training(self) -> Html:
        figure = run_charts.training_losses(self.views, self.colours)
        return page.section("Training loss", page.caption("Nats per token."), self.figures.place(figure))


def _facts(view: RunView) -> list[str]:
    final, summary = view.final, view.summary
    return [
        view.name,
        "finished" if summary else "not finished",
        f"{view.last_step:,}",
        words.si(final.tokens) if final else words.ABSENT,
        view.config.mixture.policy,
        str(len(view.searches)),
        words.si(summary.parameters) if summary else words.ABSENT,
        str(summary.world_size) if summary else words.ABSENT,
    ]


def _emphasised(text: str, strong: bool) -> str:
    return page.Strong(text) if strong else text
