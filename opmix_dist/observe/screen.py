"""Draws a glance at a run in a terminal, which text from the run directory cannot drive: it is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from opmix_dist.data.printable import first_words, printable
from opmix_dist.exchange.schemas import SearchStage
from opmix_dist.observe.concerns import concerns, leader_is_gone, quiet_limit
from opmix_dist.observe.glance import Glance, SearchGlance, StepLine
from opmix_dist.observe.pace import Pace, seconds_left
from opmix_dist.observe.phrases import duration, sparkline
from opmix_dist.report import words

BAR_WIDTH = 24
RECENT = 20
"""Steps that the speed and the mean loss are taken over."""
MOST_DOMAINS = 20
MOST_CONCERNS = 8


class Screen:
    """Remembers what it saw, for the times that are left."""

    def __init__(self) -> None:
        self._training, self._search = Pace(), Pace()

    def draw(self, seen: Glance) -> Group:
        """What matters most comes first: a terminal shows what it has room for."""
        parts: list[RenderableType] = [_panel(self._head(seen), seen.path.resolve().name)]
        warnings = concerns(seen)
        if warnings:
            parts.append(_panel(_warnings(warnings), "warnings", style="yellow"))
        if seen.lines or seen.training is not None:
            parts.append(_panel(_training(seen), "trainers"))
        parts += [_panel(self._one_search(seen, search), f"search {search.name}") for search in seen.searches]
        if seen.mixtures:
            parts.append(_panel(_mixture(seen), _since(seen)))
        return Group(*parts)

    def _head(self, seen: Glance) -> RenderableType:
        standing, style = _standing(seen)
        row = _grid(1, 1, 1)
        training = seen.training
        if training is None:
            row.add_row(Text(standing, style))
            return row
        steps = training.train.steps
        self._training.see("steps", seen.step, seen.now)
        progress = f"step {seen.step:,} of {steps:,}"
        left = None if seen.ended else seconds_left(seen.step, steps, self._steps_per_second(seen))
        row.add_row(Text(standing, style), _bar(seen.step, steps), Text(progress + _left(left)))
        return row

    def _steps_per_second(self, seen: Glance) -> float | None:
        """As seen, with all pauses; until then, of the steps alone."""
        if self._training.per_second is not None:
            return self._training.per_second
        recent = seen.lines[-RECENT:]
        if len(recent) < 2:
            return None
        tokens = (recent[-1].tokens - recent[0].tokens) / (recent[-1].step - recent[0].step)
        return _speed(recent) / tokens if tokens > 0 else None

    def _one_search(self, seen: Glance, search: SearchGlance) -> RenderableType:
        table = _facts()
        status = search.status
        if search.request is not None:
            probes = f"{len(search.request.components)} probes over {len(search.request.domains)} domains"
            table.add_row("asked", f"at step {search.request.step:,}: {probes}")
        if status is None:
            table.add_row("pool", _text("given up" if search.decided else "has not begun"))
        else:
            table.add_row("phase", self._phase(seen, search))
        if search.beat_at is not None and search.open:
            table.add_row("last sign of life", f"{duration(seen.now - search.beat_at)} ago")
        if search.decided is not None:
            table.add_row("decided", _text(f"at step {search.decided.step:,}: {search.decided.why}"))
        return table

    def _phase(self, seen: Glance, search: SearchGlance) -> RenderableType:
        assert search.status is not None
        status = search.status
        if status.stage is SearchStage.FAILED:
            return Text("failed", "red")
        if status.stage.final or not status.total:
            return Text(status.stage.value)
        row = _grid(1, 1, 1)
        left = None
        if search.open and not seen.ended:
            self._search.see((search.name, status.stage), status.done, seen.now)
            left = seconds_left(status.done, status.total, self._search.per_second or _since_begin(search))
        text = f"{status.done:,} of {status.total:,}{_left(left)}"
        row.add_row(Text(status.stage.value), _bar(status.done, status.total), Text(text))
        return row


def _since_begin(search: SearchGlance) -> float | None:
    """Pieces of work a second since the phase began, by the times of the files."""
    if search.status is None or search.stage_began_at is None or search.beat_at is None:
        return None
    seconds = search.beat_at - search.stage_began_at
    return search.status.done / seconds if seconds > 0 else None


def _standing(seen: Glance) -> tuple[str, str]:
    if seen.summary is not None:
        return "finished", "green"
    if seen.stopped is not None:
        return "stopped", "yellow"
    if leader_is_gone(seen):
        return "not running", "red"
    if seen.training is None:
        return ("search alone", "cyan") if seen.config is not None else ("not begun", "yellow")
    if not seen.lines or seen.stepped_at is None:
        return "starting", "cyan"
    if any(search.open for search in seen.searches) and seen.training.search.mode == "sync":
        return "waits for the search", "cyan"
    return ("quiet", "yellow") if seen.now - seen.stepped_at > quiet_limit(seen) else ("training", "green")


def _training(seen: Glance) -> RenderableType:
    table = _facts()
    table.add_column(no_wrap=True, style="dim")
    table.add_column()
    rows = [*_numbers(seen.lines), *_times(seen)]
    half = math.ceil(len(rows) / 2)
    for i, left in enumerate(rows[:half]):
        table.add_row(*left, *(rows[half + i] if half + i < len(rows) else ("", "")))
    return table


def _numbers(lines: Sequence[StepLine]) -> Iterator[tuple[str, str]]:
    if not lines:
        return
    last, recent = lines[-1], lines[-RECENT:]
    mean = math.fsum(line.loss for line in recent) / len(recent)
    yield "loss", f"{last.loss:.4f}  (mean of {len(recent)}: {mean:.4f})"
    yield f"of {len(lines):,} steps", sparkline([line.loss for line in lines], 2 * BAR_WIDTH)
    yield "learning rate", f"{last.lr:.2e}"
    yield "gradient norm", f"{last.grad_norm:.3g}"
    yield "tokens", words.si(last.tokens)
    yield "speed", f"{words.si(_speed(recent))} tokens/s"
    known = [line.mfu for line in recent if line.mfu is not None]
    yield "MFU", words.share(math.fsum(known) / len(known)) if known else f"{words.ABSENT} (no known peak)"


def _speed(lines: Sequence[StepLine]) -> float:
    """Tokens a second over these steps, without what lies between them: the harmonic mean."""
    slowness = [1 / line.tokens_per_second for line in lines if line.tokens_per_second > 0]
    return len(slowness) / math.fsum(slowness) if slowness else 0.0


def _times(seen: Glance) -> Iterator[tuple[str, str]]:
    if seen.stepped_at is not None:
        yield "last step", f"{duration(seen.now - seen.stepped_at)} ago"
    if seen.checkpoint is None:
        yield "checkpoint", "none yet"
    else:
        yield "checkpoint", f"step {seen.checkpoint.step:,}, {duration(seen.now - seen.checkpoint.at)} ago"
    if seen.bad_steps:
        last = seen.bad_steps[-1]
        count = f"{len(seen.bad_steps):,}{' and more' if seen.more_bad_steps else ''}"
        yield (
            "bad steps",
            f"{count}, last step {last.step + 1:,} (batch {last.batch:,}): {last.kind}, {last.action}",
        )
    if seen.training is not None:
        pool = seen.training.pool
        where = (
            "a launch of its own" if pool.external else f"{pool.ranks} rank(s)" if pool.ranks else "inline"
        )
        yield "pool", where if seen.training.mixture.policy == "opmix" else "none: the mixture is static"
    if seen.holder:
        yield "leader", printable(seen.holder)


def _mixture(seen: Glance) -> RenderableType:
    """A row per domain, heaviest first, with its change by the last new mixture."""
    now = seen.mixtures[-1].weights
    earlier = [record.weights for record in seen.mixtures if record.version < seen.mixtures[-1].version]
    before = earlier[-1] if earlier else now
    trained = {name: loss for line in seen.lines for name, loss in line.domain_loss.items()}
    heldout = seen.evaluation.loss if seen.evaluation else {}
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("domain", no_wrap=True)
    table.add_column("")
    for header in ("share", "change", "training", "held out"):
        table.add_column(header, justify="right", no_wrap=True)
    heaviest = sorted(now.items(), key=lambda item: -item[1])
    for name, weight in heaviest[:MOST_DOMAINS]:
        change = 100 * (weight - before.get(name, 0.0))
        table.add_row(
            _text(name),
            _bar(weight, max(now.values())),
            words.share(weight),
            f"{change:+.1f}" if abs(change) >= 0.05 else "",
            words.loss(trained.get(name)),
            words.loss(heldout.get(name)),
        )
    if len(heaviest) > MOST_DOMAINS:
        table.add_row(Text(f"and {len(heaviest) - MOST_DOMAINS} more", "dim"))
    return table


def _since(seen: Glance) -> str:
    last = seen.mixtures[-1]
    first = next(record for record in seen.mixtures if record.version == last.version)
    return f"mixture, version {last.version} since step {first.step:,}: {first_words(first.why)}"


def _warnings(warnings: Sequence[str]) -> RenderableType:
    shown = [_text(text) for text in warnings[:MOST_CONCERNS]]
    if len(warnings) > MOST_CONCERNS:
        shown.append(Text(f"and {len(warnings) - MOST_CONCERNS} more", "dim"))
    return Group(*shown)


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f", {duration(seconds)} left"


def _bar(done: float, total: float) -> Bar:
    return Bar(max(total, 1e-9), 0, done, width=BAR_WIDTH, color="blue", bgcolor="grey30")


def _grid(*ratios: int) -> Table:
    grid = Table.grid(padding=(0, 2))
    for _ in ratios:
        grid.add_column()
    return grid


def _facts() -> Table:
    """Names in the first column, what is to be said of them in the second."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column()
    return table


def _text(text: str) -> Text:
    return Text(printable(text))


def _panel(content: RenderableType, title: str, style: str = "grey50") -> Panel:
    return Panel(content, title=_text(title), title_align="left", border_style=style)
