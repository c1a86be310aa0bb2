"""Training on one GPU: this project's engines beside a loop by hand and HF's Trainer; what a search costs.

    python benchmarks/gpu_engines.py --out FOLDER [--rows REGEX] [--missing] [--budget SECONDS]

Needs torch (2.11 or newer), transformers, accelerate, peft, safetensors and pydantic; whole jobs also need
mosaicml-streaming and what laws are fitted with, and rows say what is missing. Each row runs in a process of
its own, beside the loop by hand, with a time limit; where a GPU's memory does not hold its passes, it is
tried again with half the micro-batch. FOLDER gets gpu_engines.json and gpu_engines.md after each row, and
rows that another command has measured stay: a command takes some rows, ``--missing`` those that have no
number yet. The exit status is 1 when a row of ours failed or anything computed something else.

``--dry-run`` runs every row with a tiny model on the CPU: its numbers are marked as no measurements.
``--plan`` writes the table with every cell "not yet measured".
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from benchmarks.engines.cases import Case, EngineCase, cases, dry_cases  # noqa: E402
from benchmarks.engines.results import Report, Row, WrongError  # noqa: E402
from benchmarks.kernels.table import DRY, FAILED, MEASURED, SKIPPED, WRONG  # noqa: E402

TOO_LARGE = "out of memory"
"""Status of a child whose passes did not fit."""


def main() -> int:
    arguments = _arguments()
    chosen = dry_cases() if arguments.dry_run else cases()
    if arguments.measure is not None:
        return _child(chosen, arguments)
    report = Report.of(chosen, dry=arguments.dry_run)
    if arguments.plan:
        report.write(arguments.out)
        return 0
    if not (arguments.dry_run or torch.cuda.is_available()):
        print("no CUDA device: --dry-run runs every row on the CPU, --plan writes an empty table")
        return 2
    try:
        report.merge(arguments.out)
    except ValueError as error:
        print(error)
        return 2
    report.runs.append(_machine(arguments))
    measure(report, chosen, arguments)
    return 1 if report.failed else 0


def measure(report: Report, chosen: Sequence[Case], arguments: argparse.Namespace) -> None:
    """Fill the report's rows in order while there is time; it is written after each."""
    ends = time.monotonic() + arguments.budget
    pattern = re.compile(arguments.rows)
    for index, case in enumerate(chosen):
        row = report.rows[index]
        if not pattern.search(case.key) or (arguments.missing and row.status in (MEASURED, DRY)):
            continue
        left = ends - time.monotonic()
        if left <= 0:
            print(f"the {arguments.budget:.0f} s are over: --missing goes on", flush=True)
            break
        report.rows[index] = row = measure_row(case, left, arguments)
        row.run = len(report.runs) - 1
        report.write(arguments.out)
        print(f"{row.key}: {row.status} {_told(row)}", flush=True)
    report.write(arguments.out)


def measure_row(case: Case, left_s: float, arguments: argparse.Namespace) -> Row:
    """In a process of its own; what goes wrong is told in the row.

    Args:
        left_s: seconds that are left to this command.
    """
    row = Row.of(case)
    missing = [need for need in case.needs if importlib.util.find_spec(need) is None]
    if missing:
        row.status, row.note = SKIPPED, f"needs {', '.join(missing)}"
        return row
    micro = arguments.micro_batch or case.micro
    ends = time.monotonic() + min(case.timeout_s, left_s)
    while True:
        found = _in_a_child(case, micro, ends - time.monotonic(), arguments)
        if found["status"] != TOO_LARGE or micro == 1:
            break
        micro //= 2
    row.status, row.note = found["status"], found["note"]
    if row.status == TOO_LARGE:
        row.status, row.note = FAILED, "out of memory with one sample in a pass"
    if row.status in (MEASURED, DRY):
        filled = Row.from_record({**dataclasses.asdict(row), **found})
        row.timings, row.overhead = filled.timings, filled.overhead
    return row


def _in_a_child(case: Case, micro: int, limit_s: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``--measure`` wrote; a child that is killed, or dies, leaves a failure."""
    with tempfile.TemporaryDirectory(prefix="gpu-engines-row-") as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--measure", case.key, "--result", str(file)]
        command += ["--micro-batch", str(micro), *(["--dry-run"] if arguments.dry_run else [])]
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            said, _ = child.communicate(timeout=max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # with the jobs that it has started
            child.wait()
            return {"status": FAILED, "note": f"not done in {limit_s:.0f} s"}
        if not file.exists():
            tail = said.strip().splitlines()[-1:] or ["it said nothing"]
            return {"status": FAILED, "note": _line(f"exit code {child.returncode}: {tail[0]}")}
        return json.loads(file.read_text())


def _child(chosen: Sequence[Case], arguments: argparse.Namespace) -> int:
    (case,) = (case for case in chosen if case.key == arguments.measure)
    found = measured(case, arguments.micro_batch, dry=arguments.dry_run)
    arguments.result.write_text(json.dumps(found))
    return 0


def measured(case: Case, micro: int, *, dry: bool) -> dict[str, Any]:
    """Measure a case in this process: status, note, and timings or overhead as plain values."""
    found: dict[str, Any] = {
        "status": DRY if dry else MEASURED,
        "note": "",
        "timings": None,
        "overhead": None,
    }
    try:
        if isinstance(case, EngineCase):
            from benchmarks.engines import turns

            found["timings"] = dataclasses.asdict(turns.measure(case, micro, dry=dry))
        else:
            from benchmarks.engines import jobs  # needs more packages than engines do

            taken = jobs.measure(dataclasses.replace(case, micro=micro), dry=dry)
            found["overhead"] = dataclasses.asdict(taken)
    except WrongError as error:
        found |= {"status": WRONG, "note": _line(str(error))}
    except torch.OutOfMemoryError:
        found |= {"status": TOO_LARGE}
    except Exception as error:  # one row's failure must not cost the others; the exit status tells of ours
        found |= {"status": FAILED, "note": _line(f"{type(error).__name__}: {error}")}
    return found


def _line(text: str) -> str:
    return " ".join(text.split())[-300:].replace("|", "/")


def _told(row: Row) -> str:
    if row.timings is not None:
        return f"{row.timings.tokens_per_second.median:,.0f} tokens/s, {row.timings.ratio.median:.3f} by hand"
    return row.note if row.overhead is None else f"{100 * row.overhead.share:+.1f} %"


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of the command that is about to measure."""
    machine = platform.machine()
    if not arguments.dry_run:
        gpu = torch.cuda.get_device_properties(0)
        machine = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    versions = []
    for name in ("torch", "triton", "transformers", "accelerate"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} missing")
    return {
        "date": str(datetime.date.today()),
        "machine": machine,
        "python": f"Python {platform.python_version()}",
        "cuda": f"CUDA {torch.version.cuda or torch.version.hip or 'none'}",
        "versions": ", ".join(versions),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for gpu_engines.json and .md")
    parser.add_argument("--rows", default="", help="regular expression on `group | path`")
    parser.add_argument("--missing", action="store_true", help="only rows that have no number yet")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in which all is to be done")
    parser.add_argument("--micro-batch", type=int, help="samples of a pass to begin with, in all rows")
    parser.add_argument("--dry-run", action="store_true", help="every row with a tiny model on the CPU")
    parser.add_argument("--plan", action="store_true", help="write the table without measuring")
    parser.add_argument("--measure", metavar="KEY", help="what a row's own process is called with")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.out is None and arguments.measure is None:
        parser.error("--out is needed")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
