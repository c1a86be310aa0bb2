"""benchmarks/gpu_engines.py: it still runs, what trains something else is not timed, what its table says."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks import gpu_engines
from benchmarks.engines import cases, loops
from benchmarks.engines.cases import EngineCase, JobCase
from benchmarks.engines.results import Overhead, Report, Row, Spread, Timings, targets
from benchmarks.kernels.table import DRY, FAILED, MEASURED, NOT_YET, SKIPPED, WRONG

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DRY_ENGINES = {case.path: case for case in cases.dry_cases() if isinstance(case, EngineCase)}
DRY_JOB = next(case for case in cases.dry_cases() if isinstance(case, JobCase))


def timings(ratio: float, mfu: float) -> Timings:
    spread = Spread(ratio, ratio, ratio)
    return Timings(Spread(1e5, 9e4, 1.1e5), spread, spread, mfu, mfu, 10**9, 0.0, 1e-3, 8, 5, 5)


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In this process; what a row's own process may leave behind is put back."""
    monkeypatch.setattr(torch, "compile", torch.compile)
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # DeepSpeed sets it, and HF's Trainer would join a launch
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.compiler.reset()


# HF's Trainer compiles the same loop, and sets the environment for good: by hand, or on the GPU
@pytest.mark.parametrize("path", [path for path in DRY_ENGINES if path != cases.HF_COMPILED])
def test_every_loop_trains_the_same_model(path: str, measured_here: None) -> None:
    """Its loss after two steps is that of the loop by hand, to a hundredth of what these lowered it by."""
    case = DRY_ENGINES[path]
    found = gpu_engines.measured(case, case.micro, dry=True)
    assert (found["status"], found["note"]) == (DRY, "")
    assert found["timings"]["error"] < 0.01
    assert found["timings"]["mfu"] is None, "a CPU's peak is not known"
    assert found["timings"]["by_hand"]["low"] > 0


def test_what_trains_something_else_is_not_timed(
    measured_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: loops.Ours) -> None:
        self.engine.train_step(next(self.batches).split(self.micro)[:1], lr=self.lr)  # half the batch

    monkeypatch.setattr(loops.Ours, "step", step)
    case = DRY_ENGINES[cases.SINGLE]
    found = gpu_engines.measured(case, case.micro, dry=True)
    assert (found["status"], found["timings"]) == (WRONG, None)
    assert "after 2 steps" in found["note"]


def arguments(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"dry_run": True, "micro_batch": None, **given})


def test_passes_that_do_not_fit_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CPU runs out of memory so that torch tells."""
    tried = []

    def child(case: EngineCase, micro: int, limit_s: float, given: argparse.Namespace) -> dict[str, Any]:
        tried.append(micro)
        fits = micro <= largest
        status = DRY if fits else gpu_engines.TOO_LARGE
        filled = dataclasses.asdict(timings(1.0, 0.5)) if fits else None
        return {"status": status, "note": "", "timings": filled, "overhead": None}

    monkeypatch.setattr(gpu_engines, "_in_a_child", child)
    largest = 2
    case = dataclasses.replace(DRY_ENGINES[cases.SINGLE], micro=8)
    row = gpu_engines.measure_row(case, 100.0, arguments())
    assert (tried, row.status, row.timings) == ([8, 4, 2], DRY, timings(1.0, 0.5))
    tried.clear()
    largest = 0
    row = gpu_engines.measure_row(case, 100.0, arguments(micro_batch=2))
    assert (tried, row.status, row.note) == ([2, 1], FAILED, "out of memory with one sample in a pass")


def test_a_row_that_takes_too_long_is_ended_with_all_that_it_started() -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    row = gpu_engines.measure_row(DRY_JOB, 1.0, arguments())
    assert (row.status, row.note) == (FAILED, "not done in 1 s")
    time.sleep(0.2)
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_what_is_missing_or_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(DRY_ENGINES[cases.SINGLE])
    monkeypatch.setattr(EngineCase, "needs", ("transformers", "no_such_package"))
    row = gpu_engines.measure_row(case, 100.0, arguments())
    assert (row.status, row.note, row.ours) == (SKIPPED, "needs no_such_package", True)
    monkeypatch.setattr(EngineCase, "needs", ())
    monkeypatch.setattr(gpu_engines.sys, "executable", "/bin/false")
    row = gpu_engines.measure_row(case, 100.0, arguments())
    assert (row.status, row.note) == (FAILED, "exit code 1: it said nothing")


def test_what_another_command_has_measured_stays(tmp_path: Path) -> None:
    chosen = cases.cases()
    first = Report.of(chosen, dry=False)
    first.rows[0] = dataclasses.replace(first.rows[0], status=MEASURED, timings=timings(0.98, 0.45), run=0)
    job = next(i for i, case in enumerate(chosen) if isinstance(case, JobCase))
    first.rows[job] = dataclasses.replace(
        first.rows[job], status=MEASURED, overhead=Overhead(60.0, 50.0, 51.0, 8.0), run=0
    )
    first.runs.append({"machine": "one GPU"})
    first.write(tmp_path)
    second = Report.of(chosen[::-1], dry=False)
    second.merge(tmp_path)
    assert {row.key: row for row in second.rows} == {row.key: row for row in first.rows}
    assert second.runs == first.runs
    page = second.markdown()
    assert "| +20.0 % | 60.0 | 50.0 |" in page
    assert "Run 0: one GPU" in page
    with pytest.raises(ValueError, match="holds measurements: give another --out"):
        Report.of(chosen, dry=True).merge(tmp_path)


def test_targets_are_those_of_compiled_engines() -> None:
    report = Report.of(cases.cases(), dry=False)
    for row in report.rows:
        if row.path == cases.SINGLE_COMPILED and row.group.startswith("1B"):
            row.status, row.timings = MEASURED, timings(0.98, 0.39)
        if row.path == cases.FSDP_COMPILED and row.group.startswith("150M"):
            row.status, row.timings = MEASURED, timings(0.96, 0.5)
    found = {t["name"]: (t["wanted"], t["found"], t["met"]) for t in targets(report.rows, dry=False)}
    assert found == {
        f"1B, {cases.SINGLE_COMPILED}: speed of the loop by hand": ("at least 0.97", "0.980", "yes"),
        f"1B, {cases.SINGLE_COMPILED}: MFU": ("at least 0.4", "0.390", "no"),
        f"1B, {cases.FSDP_COMPILED}: speed of the loop by hand": ("at least 0.97", NOT_YET, NOT_YET),
        f"150M, {cases.SINGLE_COMPILED}: speed of the loop by hand": ("at least 0.97", NOT_YET, NOT_YET),
        f"150M, {cases.FSDP_COMPILED}: speed of the loop by hand": ("at least 0.97", "0.960", "no"),
    }


def test_the_committed_table_lists_what_the_benchmark_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_engines.py", "--plan", "--out", str(tmp_path)])
    assert gpu_engines.main() == 0
    planned, committed = (
        json.loads((folder / "gpu_engines.json").read_text()) for folder in (tmp_path, RESULTS)
    )
    keys = [[(row["group"], row["path"]) for row in report["rows"]] for report in (planned, committed)]
    assert keys[0] == keys[1]
    assert not committed["dry"]
    page = (RESULTS / "gpu_engines.md").read_text()
    assert page == Report.read(RESULTS).markdown() + "\n", "the page is not that of the numbers"
    for row in map(Row.from_record, committed["rows"]):
        assert (row.status == MEASURED) == (row.timings is not None or row.overhead is not None), row.key
        assert (row.run is None) == (row.status == NOT_YET), row.key
    if not committed["runs"]:  # then nothing in it may look like a result
        assert {row["status"] for row in committed["rows"]} == {NOT_YET}
        assert {target["found"] for target in committed["targets"]} == {NOT_YET}
        assert "No GPU was at hand" in page


@pytest.mark.launch
def test_the_command_measures_rows_in_their_own_processes(streaming: None, tmp_path: Path) -> None:
    """An engine's row and a whole job's whose search runs in a second process; then only what is missing."""
    command = [sys.executable, "benchmarks/gpu_engines.py", "--dry-run", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for rows in ("single$|training waits", "single$"):
        done = subprocess.run(
            [*command, "--missing", "--rows", rows], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout == "", "a row was measured again"
    report = Report.read(tmp_path)
    filled = {row.path: row for row in report.rows if row.status != NOT_YET}
    assert {row.status for row in filled.values()} == {DRY}
    assert filled.keys() == {cases.SINGLE, "a second process on the same GPU searches, training waits"}
    overhead = next(row.overhead for row in filled.values() if row.overhead is not None)
    assert overhead.seconds > overhead.seconds_without > 0
    assert overhead.search_seconds > 0
    assert {target["met"] for target in report.targets} == {NOT_YET}
    page = (tmp_path / "gpu_engines.md").read_text()
    assert "no number here is a measurement" in page
    assert page.count("dry run, not a measurement") == 2
