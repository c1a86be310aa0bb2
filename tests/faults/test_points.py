"""Plans of faults: what is refused, that a fault happens once and leaves its mark before it does."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from opmix_dist.errors import UserError
from opmix_dist.faults import points
from opmix_dist.faults.injector import EXIT_CODE, InjectedError, Injector
from tests.helpers import ROOT


def write(folder: Path, *faults: dict[str, Any]) -> str:
    file = folder / "plan.json"
    file.write_text(json.dumps({"fired": str(folder / "fired"), "faults": faults}))
    return str(file)


def fault(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "point": "train.step", "kind": "exception"} | changes


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([fault(point="train.stop")], "there is no point train.stop: take one of ingest.read"),
        ([fault(kind="nan")], "a fault at train.step cannot be nan"),
        ([fault(point="train.gradient")], "a fault at train.gradient cannot be exception"),
        ([fault(), fault()], "two faults have the same id"),
        ([fault(id="../a")], "faults.0.id"),
        ([fault(when=3)], "faults.0.when"),
    ],
)
def test_a_plan_that_could_not_happen_is_refused(
    tmp_path: Path, faults: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Injector.open(write(tmp_path, *faults), "trainer", 0)


def test_a_plan_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="plan.json cannot be read"):
        Injector.open(str(tmp_path / "plan.json"), "trainer", 0)


def test_a_fault_happens_once_over_ranks_and_starts_at_its_step_or_later(tmp_path: Path) -> None:
    plan = write(tmp_path, fault(step=3), fault(id="b", kind="oserror", step=3))
    first, again = (Injector.open(plan, "trainer", 0) for _ in range(2))
    elsewhere = Injector.open(plan, "trainer", 1)
    first.reach("train.step", 2, "")
    first.reach("train.evaluate", 4, "")
    elsewhere.reach("train.step", 4, "")
    assert not (tmp_path / "fired").exists()
    with pytest.raises(InjectedError, match="train.step"):
        first.reach("train.step", 4, "")
    mark = json.loads((tmp_path / "fired" / "a.json").read_text())
    assert (mark["id"], mark["step"], mark["pid"]) == ("a", 4, os.getpid())
    with pytest.raises(OSError, match="No space left") as caught:
        again.reach("train.step", 5, "")
    assert caught.value.errno == errno.ENOSPC
    again.reach("train.step", 6, "")
    first.reach("train.step", 6, "")


def test_a_detail_chooses_among_those_that_pass(tmp_path: Path) -> None:
    injector = Injector.open(write(tmp_path, fault(point="probe.save", detail="json")), "trainer", 0)
    injector.reach("probe.save", 0, "old")
    with pytest.raises(InjectedError):
        injector.reach("probe.save", 0, "json")


def test_a_number_is_spoiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "_injector", None)
    monkeypatch.delenv(points.PLAN_VARIABLE, raising=False)
    points.install("trainer", 0)
    assert points.spoiled("train.gradient", 7, step=lambda: 9) == 7
    plan = write(tmp_path, fault(point="train.gradient", kind="nan", step=2))
    monkeypatch.setenv(points.PLAN_VARIABLE, plan)
    points.install("trainer", 0)
    found = [points.spoiled("train.gradient", 7, step=partial(int, step)) for step in range(4)]
    assert [number == 7 for number in found] == [True, True, False, True]
    assert found[2] != found[2]


@pytest.mark.parametrize(("kind", "code"), [("crash", -signal.SIGKILL), ("exit", EXIT_CODE), ("slow", 0)])
def test_a_process_ends_as_planned_and_has_left_its_mark(tmp_path: Path, kind: str, code: int) -> None:
    plan = write(tmp_path, fault(kind=kind, seconds=0.1, role="pool", rank=1))
    script = "from opmix_dist.faults import points; points.install('pool', 1); points.point('train.step')"
    for expected in (code, 0):
        done = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, points.PLAN_VARIABLE: plan}, cwd=ROOT
        )
        assert done.returncode == expected
    assert [mark.name for mark in (tmp_path / "fired").iterdir()] == ["a.json"]


def test_every_point_is_in_the_code_and_in_the_page() -> None:
    """And none is in the code that a plan could not name."""
    code = "\n".join(path.read_text() for path in (ROOT / "opmix_dist").rglob("*.py"))
    named = set(re.findall(r"\b(?:point|spoiled)\(\s*\"([a-z.]+)\"", code))
    of_stages = {name for name in points.POINTS if name.startswith("search.")} - named
    assert 'point(f"search.{' in code
    assert of_stages == {"search.probing", "search.evaluating", "search.fitting", "search.proposed"}
    assert named | of_stages == set(points.POINTS)
    page = (ROOT / "docs" / "faults.md").read_text()
    assert set(re.findall(r"^\| `([a-z]+\.[a-z]+)` \|", page, re.MULTILINE)) == set(points.POINTS)
