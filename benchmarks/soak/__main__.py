"""Random faults in real jobs: does each job end as if nothing had been?

    make soak

Jobs of a tiny model (two trainer ranks and a pool rank; every third one is a single process that searches
itself) and ``opmix prepare`` get faults drawn from a seed, over all phases. A job is started until it has
ended, and compared with the job without faults. Episodes that are done are kept in the folder of the runs,
and a soak that was stopped goes on. The table goes to benchmarks/results/soak.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, table
from benchmarks.soak.drawing import INGEST, Episode, draw_ingest, draw_job
from benchmarks.soak.episodes import Outcome, Soak, as_json

RESULTS = Path(__file__).parent.parent / "results"
FAULTS_OF_A_JOB = 4
INGEST_EVERY = 4
"""So many jobs for each `opmix prepare`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=110, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/soak"), help="folder of the jobs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no episode after so many")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    soak, end = Soak(arguments.runs), time.monotonic() + 60 * arguments.minutes
    done: list[dict[str, Any]] = []
    for name, run, episode in _episodes(soak, arguments.seed, arguments.faults):
        file = arguments.runs / f"{name}_seed{arguments.seed}.json"
        if not file.exists():
            if time.monotonic() > end:
                break
            outcome = run(episode)
            _say(name, outcome)
            file.write_text(json.dumps(as_json(outcome), indent=1))
        done.append(json.loads(file.read_text()))
        _write(done, arguments.seed, arguments.out)
    bad = sum(bool(one["problems"]) for one in done)
    print(f"{sum(len(one['faults']) for one in done)} faults in {len(done)} episodes, {bad} with problems")
    return 1 if bad else 0


def _episodes(
    soak: Soak, seed: int, faults: int
) -> Iterator[tuple[str, Callable[[Episode], Outcome], Episode]]:
    planned = number = 0
    while planned < faults:
        if number % INGEST_EVERY == 0:
            yield f"ingest_{number}", soak.ingest, draw_ingest(seed, number)
            planned += len(INGEST)
        yield f"job_{number}", soak.job, draw_job(seed, number, FAULTS_OF_A_JOB)
        planned += FAULTS_OF_A_JOB
        number += 1


def _say(name: str, outcome: Outcome) -> None:
    seconds = sum(start.seconds for start in outcome.starts)
    verdict = "; ".join(outcome.problems) or "survived"
    print(
        f"{name}: {outcome.fired} faults, {len(outcome.starts)} launches, {seconds:.0f} s: {verdict}",
        flush=True,
    )


def _write(done: Sequence[dict[str, Any]], seed: int, out: Path) -> None:
    """The table so far."""
    out.mkdir(parents=True, exist_ok=True)
    machine = describe("torch", "transformers")
    (out / "soak.json").write_text(json.dumps({"machine": machine, "seed": seed, "episodes": done}, indent=1))
    text = [
        "# Faults on purpose\n",
        f"`python -m benchmarks.soak --seed {seed}` ({machine}): {_count(done)} faults in {len(done)} "
        f"episodes, {sum(len(one['starts']) for one in done)} launches. A fault is survived when its job has "
        "ended with the decisions, data, losses and weights of the job without faults, bit for bit; where "
        "an error failed the search, those of a job without one; where a batch was left out, up to there. "
        f"{_hung(done)} launches hung until the soak ended them: those that a job cannot notice itself.\n",
        _table(done, "phase"),
        "",
        _table(done, "kind"),
        "",
        *(
            f"- {one['shape']}, episode {one['episode']}: {'; '.join(one['problems'])}"
            for one in done
            if one["problems"]
        ),
    ]
    (out / "soak.md").write_text("\n".join(text).rstrip() + "\n")


def _hung(done: Sequence[dict[str, Any]]) -> int:
    return sum(start["killed_as_hung"] for one in done for start in one["starts"])


def _count(done: Sequence[dict[str, Any]]) -> int:
    return sum(len(one["faults"]) for one in done)


def _table(done: Sequence[dict[str, Any]], key: str) -> str:
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in done:
        for fault in one["faults"]:
            groups.setdefault(fault[key], []).append(fault | {"survived": not one["problems"]})
    head = (key, "faults", "happened", "survived", "ended the launch", "steps lost, most", "resumed after, s")
    return table(head, [_row(name, rows) for name, rows in groups.items()])


def _row(name: str, rows: Sequence[dict[str, Any]]) -> tuple[object, ...]:
    ended = [row for row in rows if row["ended_the_launch"]]
    lost = [row["lost_steps"] for row in ended if row["lost_steps"] is not None]
    seconds = [row["resume_seconds"] for row in ended if row["resume_seconds"] is not None]
    return (
        name,
        len(rows),
        sum(row["fired"] for row in rows),
        sum(row["survived"] for row in rows),
        len(ended),
        max(lost, default=0),
        f"{statistics.median(seconds):.0f} (most {max(seconds):.0f})" if seconds else "-",
    )


if __name__ == "__main__":
    sys.exit(main())
