"""How commands print to a terminal, or to what stands in its place."""

from __future__ import annotations

from rich.console import Console

from opmix_dist.data.printable import printable


def open_console() -> Console:
    """Tables as wide as they need to be where nobody looks: a pipe has no width."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def say(console: Console, line: str, style: str | None = None) -> None:
    """One line, as it is: neither wrapped nor read as markup."""
    console.print(printable(line), style=style, markup=False, highlight=False, soft_wrap=True)
