"""OP-Mix and what it is compared with, over the stages of a lifecycle and over seeds.

    make evidence-lifecycle

Each method is a few changes to one lifecycle (benchmarks/lifecycle/methods.py). Weights, data order and the
choice among held-out samples follow the seed. Lifecycles that have ended are not repeated, and one that was
stopped goes on. The tables, of all that has ended so far, go to benchmarks/results/lifecycle.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.lifecycle import lives, methods, results
from opmix_dist.errors import UserError
from opmix_dist.lifecycle.config import load_lifecycle, resolve
from opmix_dist.settings import read_settings, to_yaml

ROOT = lives.ROOT


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return _main(arguments, " ".join(argv if argv is not None else sys.argv[1:]))
    except UserError as error:
        print(f"benchmarks.lifecycle: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.lifecycle", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "lifecycle-tiny.yaml")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"of {', '.join(methods.METHODS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="lifecycles at a time, a thread each")
    parser.add_argument("--tasks", type=int, default=100, help="most tasks that are scored of each domain")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "lifecycle", help="folder of them all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--dry-run", action="store_true", help="print every stage's settings, and run nothing"
    )
    return parser


def _main(arguments: argparse.Namespace, command: str) -> int:
    chosen = methods.chosen(arguments.methods)
    base = read_settings(arguments.config)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    root = lives.prepare(base, arguments.runs / "prepare.log")
    steps = [stage.config.train.steps for stage in resolve(load_lifecycle(arguments.config))]
    planned = [
        lives.life(base, steps, arguments.runs.resolve(), name, method, seed)
        for name, method in chosen.items()
        for seed in arguments.seeds
    ]
    if arguments.dry_run:
        _show(planned)
        return 0
    tasks = lives.tasks_of(base, root)
    run = partial(lives.run, others=planned, tasks=tasks, most_tasks=arguments.tasks)
    bad = _run_all(planned, run, arguments.jobs)
    ended = [life for life in planned if life not in bad]
    if ended:
        _write(ended, arguments.out, f"python -m benchmarks.lifecycle {command}".strip())
    for life in bad:
        print(f"{life.name}, seed {life.seed}: not ended, see {life.folder.with_suffix('.log')}")
    return 1 if bad else 0


def _show(planned: Sequence[lives.Life]) -> None:
    """All settings of every stage, checked."""
    for life in planned:
        print(f"### {life.name}, seed {life.seed}: {life.method.what}")
        for stage in resolve(lives.checked(life)):
            print(f"# stage {stage.name}\n{to_yaml(stage.config)}")


def _run_all(planned: Sequence[lives.Life], run: Any, jobs: int) -> list[lives.Life]:
    """Those that did not come to their end. A method with a teacher waits for it."""
    bad: list[lives.Life] = []
    for waits in (False, True):
        part = [life for life in planned if (life.method.teacher is not None) == waits]
        with ThreadPoolExecutor(jobs) as pool:
            for life, ended in zip(part, pool.map(run, part), strict=True):
                print(f"{life.name}, seed {life.seed}: {'ended' if ended else 'failed'}", flush=True)
                bad += [] if ended else [life]
    return bad


def _write(ended: Sequence[lives.Life], out: Path, command: str) -> None:
    compared = results.compare(ended)
    text = results.markdown(compared, ended, command)
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "lifecycle.md").write_text(text)
    (out / "lifecycle.json").write_text(json.dumps(results.as_json(compared), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
