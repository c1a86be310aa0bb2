"""What somebody who watches a run should know, each in one sentence."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator

from opmix_dist.data.printable import first_words
from opmix_dist.exchange.schemas import SearchStage
from opmix_dist.observe.glance import Glance, SearchGlance
from opmix_dist.observe.phrases import duration

LEAST_QUIET_S = 60.0
QUIET_STEPS = 20
"""A run is quiet after as many times the time of a step, and the least time above."""
_HOLDER = re.compile(r"pid (\d{1,10}) on (\S+)")


def concerns(seen: Glance) -> list[str]:
    """Most urgent first; empty where all is well."""
    found = [*_of_the_job(seen)] if seen.summary is None else []
    for search in seen.searches:
        found += _of_search(seen, search)
    return [*found, *_of_numbers(seen), *_of_bad_steps(seen), *_of_checkpoints(seen), *seen.problems]


def _of_the_job(seen: Glance) -> Iterator[str]:
    if seen.stacks:
        times = f"{len(seen.stacks)} times" if len(seen.stacks) > 1 else "once"
        yield f"a rank hung and ended itself {times}; where it hung: hangs/{seen.stacks[-1]}"
    if seen.stopped is not None:
        yield seen.stopped.text
        return
    if leader_is_gone(seen):
        yield f"the trainers' leader ({seen.holder}) is gone: start the run again, and it resumes"
        return
    if seen.stepped_at is None or not seen.lines or _waits_for_search(seen):
        return
    quiet, limit = seen.now - seen.stepped_at, quiet_limit(seen)
    if quiet > limit:
        yield f"no step for {duration(quiet)}, where a step takes {duration(step_seconds(seen))}"


def leader_is_gone(seen: Glance) -> bool:
    """Where it ran on this machine and its process is no more; of other machines nothing is known."""
    holder = _HOLDER.fullmatch(seen.holder)
    return holder is not None and holder[2] == os.uname().nodename and not _lives(int(holder[1]))


def step_seconds(seen: Glance) -> float:
    """What the last step took; 0 where that is not known."""
    if not seen.lines:
        return 0.0
    last = seen.lines[-1]
    tokens = last.tokens - seen.lines[-2].tokens if len(seen.lines) > 1 else last.tokens / max(1, last.step)
    return tokens / last.tokens_per_second if last.tokens_per_second > 0 else 0.0


def quiet_limit(seen: Glance) -> float:
    return max(LEAST_QUIET_S, QUIET_STEPS * step_seconds(seen))


def _waits_for_search(seen: Glance) -> bool:
    training = seen.training
    waits = training is not None and (training.search.mode == "sync" or _searches_inline(seen))
    return waits and any(search.open for search in seen.searches)


def _searches_inline(seen: Glance) -> bool:
    training = seen.training
    return training is not None and training.pool.ranks == 0 and not training.pool.external


def _of_search(seen: Glance, search: SearchGlance) -> Iterator[str]:
    status = search.status
    if status is not None and status.stage is SearchStage.FAILED:
        yield f"search {search.name} failed, the mixture stays: {status.reason or 'no reason was recorded'}"
    elif search.decided is not None and " failed: " in search.decided.why:
        yield search.decided.why  # given up by the trainers, as one that fell silent
    elif search.open and not seen.ended and seen.training is not None:
        limit = seen.training.pool.heartbeat_timeout_s
        since = search.beat_at if search.beat_at is not None else search.asked_at
        if since is not None and seen.now - since > limit:
            what = "no sign of life" if search.beat_at is not None else "the pool has not begun"
            yield (
                f"search {search.name}: {what} for {duration(seen.now - since)} "
                f"(pool.heartbeat_timeout_s is {limit:g})"
            )


def _of_numbers(seen: Glance) -> Iterator[str]:
    wrong = [line.step for line in seen.lines if not math.isfinite(line.loss + line.grad_norm)]
    if wrong:
        yield f"loss or gradient norm not finite in {len(wrong)} recent step(s), last in step {wrong[-1]}"


def _of_bad_steps(seen: Glance) -> Iterator[str]:
    """The last one, as long as it is among the steps that are shown, or nothing followed it."""
    if not seen.bad_steps:
        return
    last = seen.bad_steps[-1]
    if not seen.lines or last.step >= seen.lines[0].step - 1:
        what = {
            "stop": "the run stopped",
            "skip": "its batch was left out",
            "rollback": f"the run went back to step {last.checkpoint}",
        }[last.action]
        yield f"step {last.step + 1} was bad: {first_words(last.reason, 200)}: {what}"


def _of_checkpoints(seen: Glance) -> Iterator[str]:
    if seen.damaged_checkpoints:
        steps = ", ".join(map(str, seen.damaged_checkpoints))
        yield f"checkpoints of these steps were set aside as damaged: {steps}"
    interval = seen.training.checkpoint.interval_steps if seen.training else 0
    behind = seen.step - (seen.checkpoint.step if seen.checkpoint else 0)
    if interval and behind > 2 * interval and seen.summary is None:
        newest = f"the newest is of step {seen.checkpoint.step}" if seen.checkpoint else "there is none"
        yield f"no checkpoint for {behind:,} steps ({newest}; checkpoint.interval_steps is {interval})"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's, or no number that a process can have
        return True
    return True
