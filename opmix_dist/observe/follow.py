"""Looks again and again at what is under way: a run, or the stages of a lifecycle one after the other."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from opmix_dist.exchange.lifecycles import is_lifecycle, runs_in
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.observe.glance import Glance, glance
from opmix_dist.observe.screen import Screen


class Follower:
    """Of a lifecycle it follows the last stage that has begun, and goes on to the next when that begins."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._screen, self._shown = Screen(), folder
        self.ended = False
        """As of the last look: nothing more will happen unless somebody starts it again."""

    def look(self) -> RenderableType:
        """Look once, and draw it.

        Raises:
            UserError: there is no such folder, or a lifecycle's file does not name its stages.
        """
        if not is_lifecycle(self._folder):
            seen = glance(RunDir(self._folder))
            self.ended = seen.ended
            return self._screen.draw(seen)
        runs = runs_in(self._folder)
        begun = [number for number, run in enumerate(runs, 1) if run.path.is_dir()]
        if not begun:
            return Text(f"none of {len(runs)} stages has begun", "cyan")
        number = begun[-1]
        seen = glance(runs[number - 1])
        self.ended = seen.ended and (number == len(runs) or seen.summary is None)
        return Group(_stage(number, runs, seen), self._screen_of(seen).draw(seen))

    def _screen_of(self, seen: Glance) -> Screen:
        """Another stage has its own speed."""
        if seen.path != self._shown:
            self._screen, self._shown = Screen(), seen.path
        return self._screen


def _stage(number: int, runs: list[RunDir], seen: Glance) -> Text:
    following = [run.path.name for run in runs[number:]]
    text = f"stage {number} of {len(runs)}"
    return Text(f"{text}, then {', '.join(following)}" if following else text, "bold")
