"""On-policy distillation: another model corrects the replies of the one under training.

R. Agarwal et al., On-Policy Distillation of Language Models, arXiv 2306.13649, with the student's replies
alone (lambda = 1): per token KL(student || teacher), or KL(teacher || student). Both read the same prompt.
"""

from __future__ import annotations

from pathlib import Path

from opmix_dist.data.catalogue import tokenizer_fingerprint
from opmix_dist.data.tokenizer import load_tokenizer
from opmix_dist.errors import UserError
from opmix_dist.methods.base import MethodAround
from opmix_dist.methods.conversations import Conversation
from opmix_dist.methods.generation import fill_from_source, whole_model
from opmix_dist.methods.on_policy import OnPolicy
from opmix_dist.models.source import checkpoint_source


class Distill(OnPolicy):
    def __init__(self, around: MethodAround) -> None:
        """
        Raises:
            UserError: there is no teacher, it cannot be loaded, or it has another tokenizer than the data.
        """
        self.config = settings = around.config.method.distill
        if settings.teacher is None:
            raise UserError("method.name distill needs method.distill.teacher: a folder or hub id of a model")
        super().__init__(around)
        _require_tokenizer(settings.teacher, around)
        source = checkpoint_source(settings.teacher)
        self.teacher = whole_model(source, around.world.device, self.dtype)
        fill_from_source(self.teacher, source)

    def context(self, conversation: Conversation) -> list[int]:
        return conversation.prompt


def _require_tokenizer(teacher: str, around: MethodAround) -> None:
    """UserError unless the teacher's tokenizer makes the same ids of a text as the data's."""
    if (Path(teacher) / "tokenizer.json").is_file():
        same = tokenizer_fingerprint(Path(teacher)) == around.catalogue.tokenizer_fingerprint
    else:
        same = load_tokenizer(teacher).get_vocab() == around.catalogue.load_tokenizer().get_vocab()
    if not same:
        raise UserError(
            f"method.distill.teacher {teacher} has another tokenizer than the data: take a teacher with that "
            "of data.root, or prepare the data with the teacher's"
        )
