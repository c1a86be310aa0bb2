"""Texts from anybody's run directory reach no terminal and no log as they are."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from opmix_dist.cli import main
from opmix_dist.exchange.rundir import write_record
from opmix_dist.exchange.schemas import SearchStage, SearchStatus, Stopped
from opmix_dist.launch.records import Launch, LaunchDir
from opmix_dist.telling import PrintableFormatter
from opmix_dist.terminal import Terminal, say
from tests.report.runs import UNIFORM, RunWriter

EVIL = "\x1b]0;mine\x07\x1b[2J\u202e\rall is well"
SHOWN = r"\x1b]0;mine\x07\x1b[2J\u202e\rall is well"

DRAWN = SHOWN.replace(r"\x07", "").replace(r"\r", "")
"""rich leaves some out by itself."""


def printed(what: object, **options: object) -> str:
    console = Terminal(file=io.StringIO(), width=100, **options)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_whatever_is_drawn_is_printable() -> None:
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    table.add_row(Text(EVIL))
    for what in (EVIL, Text(EVIL), Panel(EVIL, title=EVIL), table):
        text = printed(what)
        assert DRAWN in text
        assert not set(text) & set("\x1b\x07\r\u202e")


def test_styles_are_still_sent_and_brackets_are_no_markup() -> None:
    text = printed(Text(EVIL, "red"), force_terminal=True, color_system="standard")
    assert text == f"\x1b[31m{DRAWN}\x1b[0m\n"
    assert printed("[red]a[/red] :smile: [link=x]") == "[red]a[/red] :smile: [link=x]\n"


def test_a_line_is_said_whole() -> None:
    console = Terminal(file=io.StringIO(), width=10)
    say(console, f"[b] {EVIL} and some more")
    assert console.file.getvalue() == f"[b] {SHOWN} and some more\n"  # type: ignore[attr-defined]


def test_a_message_is_one_line_of_the_log() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(PrintableFormatter("[%(name)s] %(message)s"))
    log = logging.Logger("a")
    log.addHandler(handler)
    log.warning("failed: %s", f"{EVIL}\n[a] ended well")
    assert out.getvalue() == f"[a] failed: {SHOWN}\\n[a] ended well\n"
    try:
        raise ValueError(EVIL)
    except ValueError:
        log.exception("once more")
    lines = out.getvalue().splitlines()
    assert len(lines) > 3
    assert lines[-1] == f"ValueError: {SHOWN}"


@pytest.fixture
def run(tmp_path: Path) -> RunWriter:
    """Texts that say what they like wherever a run directory has texts."""
    writer = RunWriter(tmp_path / "run").mixture(0, UNIFORM, "initial mixture").mixture(20, UNIFORM, EVIL)
    writer.training(20).evaluation(10, [3.0, 2.0, 3.5]).evaluation(20, [2.9, 1.9, 3.4])
    search = writer.request()
    write_record(search.status_file, SearchStatus(stage=SearchStage.FAILED, reason=EVIL))
    write_record(writer.run.stopped_file, Stopped(step=3, checkpoint=None, signal=EVIL, at=EVIL))
    launch = LaunchDir(writer.run)
    launch.path.mkdir()
    launch.write(Launch(cwd=EVIL.replace("\r", "")))
    (writer.run.path / ".lock").write_text(EVIL)
    return writer


@pytest.mark.parametrize(
    "command",
    [
        ["top", "RUN", "--once"],
        ["status", "RUN"],
        ["report", "RUN"],
        ["what-if", "RUN"],
        ["what-if", "RUN", "--search", EVIL],
        ["compare", "RUN", "RUN"],
        ["report", EVIL],
    ],
    ids=lambda command: " ".join(command[:1] + command[2:3]).replace(EVIL, "evil"),
)
def test_no_command_lets_a_text_drive_the_terminal(
    run: RunWriter, command: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    main([str(run.run.path) if part == "RUN" else part for part in command])
    out, err = capfd.readouterr()
    assert out or err
    assert not set(out + err) & set("\x1b\x07\r\u202e")
    if command[0] in ("top", "status") or EVIL in command:
        assert r"\x1b" in out + err
