"""The kernels on a GPU, beside what else would do the same: one command, one table.

    python benchmarks/gpu_kernels.py --out FOLDER [--only REGEX] [--quick] [--budget SECONDS]

Nothing needs to be installed but torch and triton (2.11 and 3.6 or newer); whole sweeps also need
transformers, peft, safetensors and pydantic, and rows say what is missing. Every path is compared with a
reference in float64 before it is timed; one that computes something else is not timed, and the exit status is
1. FOLDER gets gpu_kernels.json and gpu_kernels.md after each row, so that a run that is cut off leaves what
it has.

``--dry-run`` runs every path with tiny shapes on the CPU, kernels in Triton's interpreter: its numbers are
marked as no measurements. ``--plan`` writes the table with every cell "not yet measured".
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import os
import platform
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
if "--dry-run" in sys.argv:  # read when kernels are defined
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from benchmarks.kernels import operations, sweeps  # noqa: E402
from benchmarks.kernels.measure import Bench  # noqa: E402
from benchmarks.kernels.table import (  # noqa: E402
    DRY,
    FAILED,
    MEASURED,
    NOT_YET,
    SKIPPED,
    WRONG,
    Case,
    Report,
    Row,
)
from benchmarks.kernels.targets import targets  # noqa: E402

GPU = "a GPU"
"""A need of cases that a dry run leaves out."""


def main() -> int:
    arguments = _arguments()
    sizes = operations.DRY if arguments.dry_run else operations.QUICK if arguments.quick else operations.REAL
    plan = sweeps.DRY if arguments.dry_run else sweeps.QUICK if arguments.quick else sweeps.REAL
    cases = [*operations.cases(sizes), *sweeps.cases(plan)]
    if not (arguments.plan or arguments.dry_run or torch.cuda.is_available()):
        print("no CUDA device: --dry-run runs every path on the CPU, --plan writes an empty table")
        return 2
    report = Report(_machine(arguments), [Row.of(case) for case in cases], remarks=_remarks(arguments))
    report.noise = [_noise_row(path, None, NOT_YET) for path in sweeps.NOISE_PATHS]
    report.targets = targets(report.rows, sizes, plan)
    if arguments.plan:
        report.write(arguments.out)
        return 0
    measure(report, cases, sizes, plan, arguments)
    return 1 if report.failed else 0


def measure(
    report: Report, cases: list[Case], sizes: operations.Sizes, plan: sweeps.Plan,
    arguments: argparse.Namespace,
) -> None:  # fmt: skip
    """Fill the report's rows in order while there is time; it is written after each."""
    ends = time.monotonic() + arguments.budget
    bench = Bench(torch.device("cpu" if arguments.dry_run else "cuda"), arguments.dry_run)
    report.ceilings = bench.ceilings()
    print(f"ceilings: {report.ceilings}", flush=True)
    chosen = re.compile(arguments.only)
    noise_due = True
    for case, row in zip(cases, report.rows, strict=True):
        if noise_due and case.operation == sweeps.SWEEP:  # before the long rows
            _noise(report, bench, plan, chosen, ends)
            noise_due = False
        if not chosen.search(" | ".join(row.key)):
            row.say("not asked for")
        elif time.monotonic() > ends:
            row.say(f"the {arguments.budget:.0f} s were over")
        else:
            measure_row(bench, case, row, report)
        report.targets = targets(report.rows, sizes, plan)
        report.write(arguments.out)
        print(f"{' | '.join(row.key)}: {row.status} {_told(row)}", flush=True)
    report.complete = all(row.status == (DRY if bench.dry else MEASURED) for row in report.rows)
    report.write(arguments.out)


def measure_row(bench: Bench, case: Case, row: Row, report: Report) -> None:
    """Check, then time; what goes wrong is told in the row."""
    assert report.ceilings is not None
    missing = [need for need in case.needs if not _have(need, bench)]
    if missing:
        row.status = SKIPPED
        row.say(f"needs {', '.join(missing)}")
        return
    row.floor_seconds = report.ceilings.seconds(case.work)
    try:
        prepared = case.prepare(bench)
        try:
            if prepared.error is not None:
                row.error, row.tolerance = (
                    prepared.error((prepared.warm or prepared.run)()),
                    prepared.tolerance,
                )
                if not row.error <= prepared.tolerance:
                    row.status = WRONG
                    row.say(f"relative error {row.error:.1e}, allowed {prepared.tolerance:.0e}")
                    return
            row.fill(
                bench.time(prepared.run, warm=prepared.warm), prepared.times, DRY if bench.dry else MEASURED
            )
        finally:
            prepared.close()
    except Exception as error:  # one row's failure must not cost the others; the exit status tells of ours
        row.status = FAILED
        row.say(_line(error))
    finally:
        prepared = None
        _free(bench)


def _noise(report: Report, bench: Bench, plan: sweeps.Plan, chosen: re.Pattern[str], ends: float) -> None:
    missing = [need for need in sweeps.NEEDS if not _have(need, bench)]
    if missing or not chosen.search("loss noise") or time.monotonic() > ends:
        what = f"needs {', '.join(missing)}" if missing else NOT_YET
        report.noise = [_noise_row(path, None, what) for path in sweeps.NOISE_PATHS]
        return
    exact = sweeps.exact_losses(bench, plan.noise)
    for index, path in enumerate(sweeps.NOISE_PATHS):
        try:
            found, status = sweeps.noise(bench, plan.noise, path, exact), DRY if bench.dry else MEASURED
        except Exception as error:  # as for the rows
            found, status = None, f"{FAILED}: {_line(error)}"
        report.noise[index] = _noise_row(path, found, status)
        _free(bench)
        print(f"loss noise | {path}: {report.noise[index]}", flush=True)


def _noise_row(path: str, found: dict[str, Any] | None, status: str) -> dict[str, Any]:
    return {"losses": None, "differences": None, **(found or {}), "path": path, "status": status}


def _have(need: str, bench: Bench) -> bool:
    return not bench.dry if need == GPU else importlib.util.find_spec(need) is not None


def _free(bench: Bench) -> None:
    gc.collect()
    if not bench.dry:
        torch.cuda.empty_cache()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".replace("|", "/")


def _told(row: Row) -> str:
    return row.note if row.seconds is None else f"{1e3 * row.seconds:.3f} ms {row.note}"


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.plan:
        return {"machine": "none: no GPU was at hand, nothing below was measured"}
    versions = {}
    for name in ("torch", "triton", "transformers", "peft", "safetensors", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    machine = platform.machine()
    if not arguments.dry_run:
        gpu = torch.cuda.get_device_properties(0)
        machine = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} processors"
    return {
        "date": str(datetime.date.today()),
        "machine": machine,
        "python": platform.python_version(),
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "arguments": " ".join(sys.argv[1:]),
    }


_REMARKS = (
    "Ours are in bold. A share of a floor is the time that a path's own work takes under the ceilings, over "
    "the time measured; FLOPs and bytes are those of opmix_kernels/cost.py. Peak memory is what a run takes "
    "beyond its inputs. Errors are relative to float64: of sweeps, those of a loss over what the adapters "
    "change in it.",
    "Copies of weights that are made once per search are made before timing, in ours and in the baselines. "
    "All models use torch's causal attention without a mask tensor. Batched merging is measured for layers, "
    "not for models: all merged models at once do not fit. `auto` is the faster of low rank and merging: "
    "what it takes once it has timed both.",
)
_NO_GPU = (
    "**No GPU was at hand when this was written: every cell is not yet measured, and no number is a guess at "
    "one.** The command above fills the table on a CUDA machine."
)
_NO_MEASUREMENT = "**A dry run on the CPU with tiny shapes: no number here is a measurement.**"


def _remarks(arguments: argparse.Namespace) -> list[str]:
    first = [_NO_GPU] if arguments.plan else [_NO_MEASUREMENT] if arguments.dry_run else []
    return [*first, *_REMARKS]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_kernels.json and .md")
    parser.add_argument("--only", default="", help="regular expression on `operation | shape | path`")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and one sweep")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which no row is begun")
    parser.add_argument("--dry-run", action="store_true", help="every path with tiny shapes on the CPU")
    parser.add_argument("--plan", action="store_true", help="write the table without measuring")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
