"""``opmix top RUN``: watch a run in a terminal. It reads the run directory and changes nothing."""

from __future__ import annotations

import argparse
import io
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

DEFAULT_INTERVAL_S = 2.0
WIDTH = 104
"""Columns of a picture, and of what goes to a pipe."""
_WEB_FONT = re.compile(r"@font-face\s*\{[^}]*\}\s*")
"""In a picture: without it, the viewer's own fixed-width font is taken and nothing is fetched."""


def add_top_command(commands: argparse._SubParsersAction[Any]) -> None:
    top = commands.add_parser(
        "top",
        help="watch a run or a lifecycle: progress, speed, mixture, search, warnings",
        description="Shows a run directory until the run has ended, or until Ctrl-C; of a lifecycle, the "
        "stage that is under way. It only reads, from any machine that sees the directory.",
    )
    top.add_argument("run_dir", type=Path, metavar="RUN")
    top.add_argument("--once", action="store_true", help="print once and stop, as where there is no terminal")
    top.add_argument(
        "--interval", type=_seconds, default=DEFAULT_INTERVAL_S, help="seconds between looks (default: 2)"
    )
    top.add_argument("--svg", type=Path, metavar="FILE", help="write what is shown once as a picture instead")
    top.set_defaults(run=_top)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.1 and 3600")
    return value


def _top(arguments: argparse.Namespace, rest: list[str]) -> None:
    from rich.live import Live

    from opmix_dist.exchange.files import write_bytes
    from opmix_dist.observe.follow import Follower
    from opmix_dist.terminal import Terminal

    follower = Follower(arguments.run_dir)
    if arguments.svg is not None:
        picture = Terminal(record=True, width=WIDTH, file=io.StringIO())
        picture.print(follower.look())
        svg = picture.export_svg(title=f"opmix top {arguments.run_dir.name}")
        write_bytes(arguments.svg, _WEB_FONT.sub("", svg).encode())
        return
    console = Terminal()
    if not console.is_terminal:
        console = Terminal(width=WIDTH)
    if arguments.once or not console.is_terminal:
        console.print(follower.look())
        return
    shown = follower.look()
    with suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        while not follower.ended:
            live.update(shown, refresh=True)
            time.sleep(arguments.interval)
            shown = follower.look()
    console.print(shown)
