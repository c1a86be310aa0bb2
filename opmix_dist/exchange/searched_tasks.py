"""searches/0001/tasks.json: the tasks that a search chose a mixture by, so that scores can leave them out."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from opmix_dist.exchange.schemas import Name, Record

FILE = "tasks.json"
"""In the search's folder; there before the first candidate replies."""


class SearchedTasks(Record):
    digests: dict[Name, list[Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]]
    """Of the tasks of each domain that has some (``Task.digest``)."""
