"""benchmarks/gpu_kernels.py: it still runs, wrong results are not timed, and what its table claims."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_kernels
from benchmarks.kernels import operations, sweeps
from benchmarks.kernels.measure import Bench
from benchmarks.kernels.table import (
    DRY,
    FAILED,
    MEASURED,
    NOT_YET,
    SKIPPED,
    WRONG,
    Case,
    Prepared,
    Report,
    Row,
)
from benchmarks.kernels.targets import targets
from opmix_kernels.cost import Ceilings, Work

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BENCH = Bench(torch.device("cpu"), dry=True)


def rows_of(report: dict[str, Any]) -> set[tuple[str, str, str]]:
    return {(row["operation"], row["shape"], row["path"]) for row in report["rows"]}


def test_a_dry_run_walks_every_path(tmp_path: Path) -> None:
    """Ours and the baselines agree with float64 at tiny shapes; no number passes for a measurement."""
    command = [sys.executable, "benchmarks/gpu_kernels.py", "--dry-run", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "gpu_kernels.json").read_text())
    for row in report["rows"]:
        if row["status"] != DRY:
            assert (row["status"], row["note"]) == (SKIPPED, "needs a GPU"), row
    assert all(entry["status"] == DRY and entry["losses"] < 0.01 for entry in report["noise"])
    assert {target["met"] for target in report["targets"]} == {NOT_YET}
    page = (tmp_path / "gpu_kernels.md").read_text()
    assert "no number here is a measurement" in page
    assert page.count("not a measurement") >= len([row for row in report["rows"] if row["status"] == DRY])


def test_the_committed_table_lists_what_the_benchmark_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", "--plan", "--out", str(tmp_path)])
    assert gpu_kernels.main() == 0
    planned = json.loads((tmp_path / "gpu_kernels.json").read_text())
    committed = json.loads((RESULTS / "gpu_kernels.json").read_text())
    assert rows_of(committed) == rows_of(planned)
    if committed["machine"]["machine"].startswith("none"):  # then nothing in it may look like a result
        assert {row["status"] for row in committed["rows"]} == {NOT_YET}
        assert {row["seconds"] for row in committed["rows"]} == {None}
        assert {target["found"] for target in committed["targets"]} == {NOT_YET}
        assert "No GPU was at hand" in (RESULTS / "gpu_kernels.md").read_text()


def test_a_budget_that_is_over_leaves_rows_unmeasured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", "--dry-run", "--budget", "0", "--out", str(tmp_path)])
    assert gpu_kernels.main() == 0
    report = json.loads((tmp_path / "gpu_kernels.json").read_text())
    assert {row["status"] for row in report["rows"]} == {NOT_YET}
    assert {row["note"].split("; ")[-1] for row in report["rows"]} == {"the 0 s were over"}
    assert not report["complete"]


def measured(
    error: float, *, ours: bool = True, needs: tuple[str, ...] = (), fail: bool = False
) -> tuple[Row, Report]:
    """A row of one case whose result is wrong by ``error``."""

    def prepare(bench: Bench) -> Prepared:
        if fail:
            raise RuntimeError("no | such kernel")
        return Prepared(lambda: torch.ones(3), lambda found: error * found.sum().item() / 3)

    case = Case("operation", "shape", "path", ours, [Work(4.0, 8.0)], prepare, needs)
    row = Row.of(case)
    report = Report({"machine": "this"}, [row], Ceilings(2.0, 2.0))
    gpu_kernels.measure_row(BENCH, case, row, report)
    return row, report


def test_what_computes_something_else_is_not_timed() -> None:
    row, report = measured(0.02)
    assert (row.status, row.seconds, row.error, report.failed) == (WRONG, None, 0.02, True)
    assert "relative error 2.0e-02, allowed 1e-02" in report.markdown()
    assert measured(float("nan"))[0].status == WRONG
    assert measured(0.02, ours=False)[1].failed  # a wrong baseline is no baseline
    row, report = measured(0.005)
    assert (row.status, report.failed) == (DRY, False)
    assert row.seconds is not None
    assert row.floor_seconds == 4.0


def test_what_is_missing_or_fails_is_named() -> None:
    row, report = measured(0.0, needs=("no_such_package",))
    assert (row.status, row.note, report.failed) == (SKIPPED, "needs no_such_package", False)
    row, report = measured(0.0, fail=True)
    assert (row.status, row.note, report.failed) == (FAILED, "RuntimeError: no / such kernel", True)
    assert not measured(0.0, fail=True, ours=False)[1].failed  # told, but no fault of ours


def test_targets_are_ratios_of_rows() -> None:
    rows = [Row.of(case) for case in (*operations.cases(operations.REAL), *sweeps.cases(sweeps.REAL))]
    for row in rows:
        if row.operation == operations.NORMED and row.path == operations.DENSE:
            row.status, row.seconds = MEASURED, 0.9
        if row.operation == operations.NORMED and row.path == operations.OURS_WIDE:
            row.status, row.seconds = MEASURED, 1.2
        if row.operation == operations.LOSSES and row.path == operations.OURS_LOSSES:
            row.status, row.seconds, row.floor_seconds, row.peak_bytes = MEASURED, 1.0, 0.85, 700_000_000
        if row.operation == sweeps.SWEEP and row.path in sweeps.PATHS:
            row.status, row.seconds, row.floor_seconds = MEASURED, 2.0, 1.7
        if row.operation == sweeps.SWEEP and row.path == sweeps.OURS_MERGE:
            row.seconds = 3.0  # auto takes the other
        if row.operation == sweeps.SWEEP and row.path == sweeps.DISK:
            row.status, row.seconds = MEASURED, 30.0
    found = {t["name"]: (t["found"], t["met"]) for t in targets(rows, operations.REAL, sweeps.REAL)}

    def of(*parts: str) -> tuple[str, str]:
        return next(value for name, value in found.items() if all(part in name for part in parts))

    assert of("behind a norm") == ("0.75", "no")
    assert of("without a norm") == (NOT_YET, NOT_YET)
    assert of("65536 rows", "GEMM floor") == ("0.85", "yes")
    assert of("65536 rows", "scratch") == ("700 MB", "yes")
    assert of("65536 rows", "chunked") == (NOT_YET, NOT_YET)
    assert of("sweep 1B, 64 x 32768", "floor") == ("0.85", "yes")
    assert of("sweep 150M, 64 x 512", "disk") == ("15", "no")
    assert of("sweep 150M, 64 x 512", "best baseline") == (NOT_YET, NOT_YET)
    assert len(found) == 2 + 2 * 3 + 6 * 3
