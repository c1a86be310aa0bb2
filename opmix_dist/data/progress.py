"""What a user sees of the ingest: one line per stage, and on a terminal a bar while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Advance = Callable[[int, int], None]
"""Called with the documents and the tokens done since the last call."""


class Report:
    """Shows stages one after the other; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("documents {task.fields[rate]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Report:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """A bar for ``total`` documents, then a line; yields the function that moves the bar."""
        task = self._bars.add_task(title, total=total, rate="")
        began = time.monotonic()
        documents = tokens = 0

        def rate() -> str:
            return f"{tokens / (time.monotonic() - began):,.0f} tokens/s" if tokens else ""

        def advance(more_documents: int, more_tokens: int) -> None:
            nonlocal documents, tokens
            documents += more_documents
            tokens += more_tokens
            self._bars.update(task, completed=documents, rate=rate())

        yield advance
        self._bars.remove_task(task)
        self._bars.refresh()
        seconds = time.monotonic() - began
        self.say(f"{title}: {documents:,} documents in {seconds:.1f} s {rate()}".rstrip())
