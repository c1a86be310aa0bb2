"""The settings of training methods: what keeps a model from forgetting, besides the mixture.

Experience replay is none of them: a replay mixture (``mixture.initial: {old: 0.1, new: 0.9}``) is all of it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from opmix_dist.settings import Section

MethodName = Literal["plain"]


class MethodConfig(Section):
    name: MethodName = Field(
        "plain", description="how the model is trained; plain: the loss and nothing else"
    )
