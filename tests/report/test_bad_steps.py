"""What a report says of steps that were not applied."""

from __future__ import annotations

from opmix_dist.exchange.schemas import BadStep
from opmix_dist.report.bad_steps_section import MOST_ROWS, bad_steps_section


def met(step: int, action: str, **more: object) -> BadStep:
    return BadStep(
        kind="spike", action=action, step=step, batch=step + 1, reason="<b>the loss is 9</b>", at="2026",
        domain_loss={"web": 2.5, "code": 9.25, "books": None}, **more,
    )  # fmt: skip


def test_nothing_is_said_where_all_steps_were_good() -> None:
    assert list(bad_steps_section([])) == []


def test_each_is_a_row_with_what_followed() -> None:
    back = met(1199, "rollback", checkpoint=1000, loader={}, domain_tokens={"web": 1})
    (section,) = bad_steps_section([met(4, "skip"), back])
    text = str(section)
    assert "2 attempts at a step were not applied: 1 whose batch was left out, 1 after which" in text
    for cell in ("5", "1,200", "rollback to step 1,000", "code 9.2500", "&lt;b&gt;the loss is 9&lt;/b&gt;"):
        assert f"<td>{cell}</td>" in text
    assert "<b>the loss" not in text


def test_of_many_the_newest_are_shown() -> None:
    (section,) = bad_steps_section([met(step, "skip") for step in range(MOST_ROWS + 10)])
    assert str(section).count("<tr>") == MOST_ROWS + 1
    assert "<td>11</td>" in str(section)
    assert "<td>10</td>" not in str(section)
