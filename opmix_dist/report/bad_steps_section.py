"""The section of a report on steps that were not applied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from opmix_dist.exchange.schemas import BadStep
from opmix_dist.ledger import LEFT_OUT
from opmix_dist.report import page, words
from opmix_dist.report.page import Html

MOST_ROWS = 50
_ACTIONS = {
    "skip": "whose batch was left out",
    "rollback": "after which the run went back to a checkpoint",
    "stop": "at which the run stopped",
}


def bad_steps_section(met: Sequence[BadStep]) -> Iterator[Html]:
    """Nothing where there were none; of many, the newest are shown."""
    if not met:
        return
    counts: Counter[str] = Counter(step.action for step in met)
    parts = [f"{counts[action]:,} {what}" for action, what in _ACTIONS.items() if counts[action]]
    text = f"{len(met):,} attempts at a step were not applied: {', '.join(parts)}."
    text += f" What they cost is the line \u201c{LEFT_OUT}\u201d of the compute table."
    if len(met) > MOST_ROWS:
        text += f" The last {MOST_ROWS} of them:"
    header = ["when", "step", "batch", "kind", "followed by", "highest loss", "reason"]
    rows = [_cells(step) for step in met[-MOST_ROWS:]]
    yield page.section("Steps that were not applied", page.caption(text), page.table(header, rows))


def _cells(step: BadStep) -> list[str]:
    action = step.action if step.checkpoint is None else f"{step.action} to step {step.checkpoint:,}"
    known = {name: loss for name, loss in step.domain_loss.items() if loss is not None}
    worst = max(known, key=lambda name: known[name], default=None)
    loss = words.ABSENT if worst is None else f"{worst} {known[worst]:.4f}"
    return [step.at, f"{step.step + 1:,}", f"{step.batch:,}", step.kind, action, loss, step.reason]
