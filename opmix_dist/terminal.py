"""How commands print to a terminal, or to what stands in its place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from opmix_dist.data.printable import printable


class Terminal(Console):
    """A console through which no text can drive the terminal: only rich's own codes are sent as they are, and
    square brackets are no markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "highlight": False, "emoji": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def open_console() -> Terminal:
    """Tables as wide as they need to be where nobody looks: a pipe has no width."""
    console = Terminal()
    return console if console.is_terminal else Terminal(width=200)


def say(console: Console, line: str, style: str | None = None) -> None:
    """One line, as it is: neither wrapped nor read as markup."""
    console.print(printable(line), style=style, markup=False, highlight=False, soft_wrap=True)
