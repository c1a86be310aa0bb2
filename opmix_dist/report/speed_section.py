"""The section of a report on speed and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import plotly.graph_objects as go

from opmix_dist.exchange.schemas import MemoryUse, TrainLine
from opmix_dist.report import page, words
from opmix_dist.report.charts import GREY, binned, plain
from opmix_dist.report.page import Figures, Html
from opmix_dist.report.reading import RunView

_COLOUR = "#4d6a8f"
_KINDS = {
    "parameters": "#4d6a8f",
    "gradients": "#8fa3bd",
    "optimizer": "#6f8f95",
    "activations_and_others": "#b3bac4",
}


def speed_section(views: Sequence[RunView], figures: Figures) -> Html:
    """Tokens per second, MFU where it is known, memory by kind: the last of ``views``, beside others."""
    title, run = "Speed and memory", views[-1]
    if not run.train:
        return page.section(title, page.problem("No training step has been logged yet."))
    charts = [_over_steps(views, "tokens_per_second", "tokens/s")]
    if any(line.mfu is not None for line in run.train):
        charts.append(_over_steps(views, "mfu", "MFU", tickformat=".0%"))
    parts = [page.caption(" ".join(_sentences(run.train))), figures.grid(charts)]
    held = {view.name: memory for view in views if (memory := largest_memory(view.train)) is not None}
    if held:
        parts += [page.caption(_of_memory(held)), figures.place(_memory_bars(held))]
    return page.section(title, *parts)


def _sentences(lines: Sequence[TrainLine]) -> Iterator[str]:
    timed = [line for line in lines if line.seconds is not None]
    seconds = sum(line.seconds or 0.0 for line in timed)
    if not seconds:
        yield "Tokens per second of each step."
        return
    tokens = sum(line.tokens_per_second * (line.seconds or 0.0) for line in timed)
    each = sum((line.tokens_per_second_per_device or 0.0) * (line.seconds or 0.0) for line in timed)
    yield f"On average {words.si(tokens / seconds)} tokens/s, {words.si(each / seconds)} on each device;"
    yield f"{words.share(sum(line.data_seconds or 0.0 for line in timed) / seconds)} of the time went by"
    yield "waiting for data."
    known = [line for line in timed if line.mfu is not None]
    if known:
        spent = sum(line.seconds or 0.0 for line in known)
        mfu, hfu = (
            sum((getattr(line, name) or 0.0) * (line.seconds or 0.0) for line in known) / spent
            for name in ("mfu", "hfu")
        )
        again = f" ({words.share(hfu)} with what was computed again)" if hfu > 1.001 * mfu else ""
        yield f"MFU {words.share(mfu)}{again}."


def largest_memory(lines: Sequence[TrainLine]) -> MemoryUse | None:
    """With the highest peak."""
    found = [line.memory for line in lines if line.memory is not None]
    return max(found, key=lambda memory: memory.peak, default=None)


def _of_memory(held: dict[str, MemoryUse]) -> str:
    texts = []
    for name, memory in held.items():
        what = "memory of its process" if memory.measured == "resident" else "allocated on its device"
        more = f", {_gib(memory.reserved)} reserved" if memory.reserved else ""
        more += f", {_gib(memory.offloaded)} in the host's memory" if memory.offloaded else ""
        texts.append(f"{name}: rank {memory.rank}, {_gib(memory.peak)} {what}{more}")
    return f"Memory of the rank that took most of it. {'; '.join(texts)}."


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def _over_steps(views: Sequence[RunView], name: str, title: str, **axis: object) -> go.Figure:
    """A field of the log by step, means of consecutive steps; the last run solid."""
    figure = go.Figure(
        layout={
            "height": 240,
            "template": None,
            "xaxis": {"title": {"text": "step"}},
            "yaxis": {"title": {"text": title}, "rangemode": "tozero", **axis},
            "showlegend": len(views) > 1,
            "hovermode": "x unified",
        }
    )
    for view in views:
        lines = [line for line in view.train if getattr(line, name) is not None]
        x, y = binned([line.step for line in lines], [getattr(line, name) for line in lines])
        line = {"color": _COLOUR} if view is views[-1] else {"color": GREY, "dash": "dash"}
        figure.add_scatter(x=x, y=y, name=plain(view.name), mode="lines", line=line | {"width": 1.8})
    return figure


def _memory_bars(held: dict[str, MemoryUse]) -> go.Figure:
    """A bar of each run, divided by kind."""
    figure = go.Figure(
        layout={
            "height": 110 + 44 * len(held),
            "template": None,
            "barmode": "stack",
            "xaxis": {"title": {"text": "GiB"}},
            "yaxis": {"autorange": "reversed", "type": "category"},
        }
    )
    for kind, colour in _KINDS.items():
        figure.add_bar(
            y=[plain(name) for name in held],
            x=[getattr(memory, kind) / 2**30 for memory in held.values()],
            name=kind.replace("_", " "),
            orientation="h",
            marker={"color": colour},
            hovertemplate="%{x:.3g} GiB",
        )
    return figure
