"""Plain lines that leave for a terminal or a log. Their texts may come from anybody's run directory."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from opmix_dist.data.printable import printable


def tell(text: str, file: TextIO | None = None) -> None:
    """Print to ``file``, standard output by default, without anything that could drive a terminal."""
    print(printable(text), file=file or sys.stdout, flush=True)


class PrintableFormatter(logging.Formatter):
    """A message is one line, whatever is in it: no text passes for another line of the log. Tracebacks keep
    theirs."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = record.message.replace("\n", "\\n")
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
