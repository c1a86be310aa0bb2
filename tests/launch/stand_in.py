#!/usr/bin/env python3
"""Stands in for the interpreter that starts ranks, where a test is about the job script.

It plays an attempt at a run as a line of RUN/launch/play says: ``fail``, ``fail early``, ``save and fail``,
``end``, ``wait``.
"""

import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    run = Path(sys.argv[-1]).parents[1]  # the last argument is RUN/launch/config.yaml
    attempts = run / "launch" / "attempts"
    with open(attempts, "a") as file:
        file.write(" ".join(sys.argv[1:]) + "\n")
    attempt = len(attempts.read_text().splitlines())
    play = (run / "launch" / "play").read_text().splitlines()[attempt - 1]
    if play == "end":
        (run / "summary.json").write_text("{}")
        return 0
    if play == "fail early":
        return 2
    if play == "wait":
        return wait(run)
    time.sleep(0.1)  # the attempt's own time must be another
    (run / "metrics").mkdir(exist_ok=True)
    (run / "metrics" / "train.jsonl").write_text("{}\n")
    if play == "save and fail":
        (run / "checkpoints" / f"step_{attempt}").mkdir(parents=True)
    return 3


def wait(run: Path) -> int:
    """As ranks do: until a signal, and then a note about it."""
    signals = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    for number in signals:
        signal.signal(number, signal.SIG_DFL)
    signal.sigwait(signals)
    (run / "stopped.json").write_text("{}")
    return 0


if __name__ == "__main__":
    os._exit(main())
