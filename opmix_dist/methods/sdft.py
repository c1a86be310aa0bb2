"""Self-distillation fine-tuning: the model corrects its own replies, given a demonstration.

I. Shenfeld et al., Self-Distillation Enables Continual Learning, arXiv 2601.19897. The student replies to a
prompt x; the teacher is the same model, its parameters averaged over the steps (or those at the start), and
reads x together with the demonstration c; the loss per token is KL(student(. | x) || teacher(. | x, c)).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from opmix_dist.methods.base import MethodAround
from opmix_dist.methods.contexts import DemonstrationContext
from opmix_dist.methods.conversations import Conversation
from opmix_dist.methods.generation import fill_from_source, named, whole_model
from opmix_dist.methods.on_policy import OnPolicy


class SDFT(OnPolicy):
    """The averaged teacher is kept in float32, in which small shares are not lost."""

    def __init__(self, around: MethodAround) -> None:
        self.settings = self.config = around.config.method.sdft
        super().__init__(around)
        self._context = DemonstrationContext(
            around.catalogue.load_tokenizer(), self.settings.demonstration, self.end_ids
        )
        averages = self.settings.teacher == "ema"
        dtype = torch.float32 if averages else self.dtype
        self.teacher = whole_model(around.source, around.world.device, dtype)
        if averages:
            around.engine.beside = {**around.engine.beside, **named("teacher", self.teacher)}
        else:
            fill_from_source(self.teacher, around.source)

    def context(self, conversation: Conversation) -> list[int]:
        return self._context(conversation.prompt, conversation.demonstration)

    def averaged(self) -> Sequence[tuple[PreTrainedModel, float]]:
        return [(self.teacher, self.settings.ema_rate)] if self.settings.teacher == "ema" else []
