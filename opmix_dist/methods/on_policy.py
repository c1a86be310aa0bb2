"""Learning from replies of the model's own, token by token, from what a teacher would have said there.

In each step a copy of the model replies to the prompts of the batch's conversations. The student reads each
prompt with the reply to it, the teacher reads the same reply behind a context of its own, and the loss is the
KL divergence between the two next-token distributions, summed over the reply's tokens. Documents without a
prompt, as those of text domains, keep their cross-entropy. All targets of the global batch weigh the same.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from opmix_dist.data.batch import TokenBatch
from opmix_dist.engines.single import DTYPES
from opmix_dist.errors import UserError
from opmix_dist.method_config import OnPolicyConfig
from opmix_dist.methods.base import Method, MethodAround, StepWork
from opmix_dist.methods.conversations import Conversation, Text, documents
from opmix_dist.methods.divergence import divergences
from opmix_dist.methods.generation import build_policy, mixed_in
from opmix_dist.methods.replied import Packing, RepliedBatch
from opmix_dist.models.documents import require_documents_apart
from opmix_dist.models.flops import count_flops
from opmix_dist.models.loss import sample_loss_sums, target_logits
from opmix_dist.seeds import derive_seed
from opmix_dist.tasks.generation import ATTENTION, most_positions
from opmix_dist.tasks.prompts import end_ids


@dataclass(frozen=True)
class _Asked:
    """A conversation to reply to: where it stands, what the teacher's reply follows, and the most tokens of
    the reply."""

    prompt: list[int]
    context: list[int]
    limit: int


@dataclass(frozen=True)
class _Counts:
    """Of one rank and step."""

    replies: int
    reply_tokens: int
    ended: int
    left_out: int
    generated: int
    student: int
    teacher: int

    def summed(self, around: MethodAround) -> _Counts:
        """Collective. Over the ranks."""
        mine = torch.tensor([getattr(self, field.name) for field in fields(self)])
        return _Counts(*map(int, around.world.sum(mine).tolist()))


class OnPolicy(Method):
    """What self-distillation and distillation have in common; each says what its teacher is and reads."""

    config: OnPolicyConfig
    teacher: PreTrainedModel
    """Whole, on this rank's device, in evaluation mode."""

    def __init__(self, around: MethodAround) -> None:
        """
        Raises:
            UserError: conversations cannot be told apart, there are none, or nothing would end a reply.
        """
        super().__init__(around)
        self._require_conversations()
        engine = around.engine
        self.end_ids = end_ids(around.catalogue.load_tokenizer())
        self.dtype = DTYPES[around.config.engine.param_dtype]
        self.policy = build_policy(around, self.config, self.end_ids)
        self._policy_step: int | None = None
        """Finished steps of the parameters that the policy has."""
        if self.config.refresh_steps > 1:  # not to be made again from a later checkpoint's parameters
            engine.beside = {**engine.beside, **self.policy.kept()}
        self._last: _Counts | None = None

    @abstractmethod
    def context(self, conversation: Conversation) -> list[int]:
        """Token ids that the reply follows where the teacher reads it."""

    def averaged(self) -> Sequence[tuple[PreTrainedModel, float]]:
        """Models that move towards the student's parameters at each refresh, and by which share."""
        return ()

    def begin(self, step: int) -> None:
        if step == 0:
            self._refresh([(model, 1.0) for model, _ in self.averaged()])
            self._policy_step = 0
        self._require_apart()

    def prepare(self, step: int, microbatches: Sequence[TokenBatch]) -> StepWork:
        refreshed = step - step % self.config.refresh_steps
        if self._policy_step != refreshed:  # after a resume or a rollback
            with self.around.ledger.timed("generation"):
                if refreshed == step:
                    self._refresh()
                else:
                    self.policy.restore()
            self._policy_step = refreshed
        batch = TokenBatch.cat(microbatches)
        with self.around.ledger.timed("generation"):
            replied, counts = self._reply(step, batch)
        self._last = counts.summed(self.around)
        self._book(self._last)
        return StepWork(replied.split(len(microbatches[0])), loss=self.losses)

    def applied(self, step: int) -> None:
        if (step + 1) % self.config.refresh_steps == 0:
            with self.around.ledger.timed("generation"):
                self._refresh(self.averaged())
            self._policy_step = step + 1

    def numbers(self) -> dict[str, float]:
        last = self._last
        if last is None or not last.replies:
            return {}
        return {
            "replies": float(last.replies),
            "reply_tokens": last.reply_tokens / last.replies,
            "replies_ended": last.ended / last.replies,
            "left_out": float(last.left_out),
        }

    def losses(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Sums over each sample's targets [B], nats: KL where the teacher corrects, else cross-entropy."""
        assert isinstance(batch, RepliedBatch)
        assert batch.distilled is not None
        logits = target_logits(cast(PreTrainedModel, model), batch)  # [R, V]
        picked = batch.loss_mask  # [B, T]; its True, row after row, are the R targets
        distilled = batch.distilled[picked]
        wide = torch.promote_types(logits.dtype, torch.float32)
        found = torch.zeros(len(logits), dtype=wide, device=logits.device)
        found[~distilled] = F.cross_entropy(
            logits[~distilled].to(wide), batch.tokens[picked][~distilled], reduction="none"
        )
        if distilled.any():
            found[distilled] = self._divergences(logits[distilled], batch.teacher)
        samples = picked.nonzero()[:, 0]
        return torch.zeros(len(batch), dtype=wide, device=logits.device).index_add(0, samples, found)

    def close(self) -> None:
        self.policy.close()

    def _refresh(self, averaged: Sequence[tuple[PreTrainedModel, float]] = ()) -> None:
        """Collective. Of the policy, while ``averaged`` move by their shares."""
        self.policy.refresh(mixed_in(self.around.engine.parameters(), averaged))

    def _divergences(self, student: Tensor, batch: TokenBatch) -> Tensor:
        with self.around.ledger.timed("teacher"), torch.no_grad():
            self._synchronise()  # so that the time is the teacher's
            with self._compute_context():
                teacher = target_logits(self.teacher, batch)
            self._synchronise()
        shared = min(student.shape[1], teacher.shape[1])  # of the tokenizer's tokens both have logits
        return divergences(
            student[:, :shared], teacher[:, :shared], self.config.divergence, top_k=self.config.top_k
        )

    def _reply(self, step: int, batch: TokenBatch) -> tuple[RepliedBatch, _Counts]:
        rows = [[one if isinstance(one, Text) else self._ask(one) for one in row] for row in documents(batch)]
        asked = [one for row in rows for one in row if isinstance(one, _Asked)]
        seed = derive_seed(self.around.config.seed, "replies", step, self.around.engine.replica.rank)
        made = self.policy.sample([one.prompt for one in asked], [one.limit for one in asked], seed)
        replies = iter(made.replies)
        student, teacher = Packing(self.config.skip_tokens), Packing(self.config.skip_tokens)
        for row in rows:
            student.begin()
            teacher.begin()
            for one in row:
                if isinstance(one, Text):
                    student.add_text(one)
                elif one is not None:
                    reply = next(replies)
                    student.add_reply(one.prompt, reply)
                    teacher.add_reply(one.context, reply)
        replied = RepliedBatch.of(student, teacher)
        counts = _Counts(
            replies=len(made.replies),
            reply_tokens=sum(map(len, made.replies)),
            ended=sum(reply[-1] in self.end_ids for reply in made.replies),
            left_out=sum(one is None for row in rows for one in row),
            generated=made.tokens,
            student=replied.tokens.numel(),
            teacher=replied.teacher.tokens.numel() if made.replies else 0,
        )
        return replied, counts

    def _ask(self, conversation: Conversation) -> _Asked | None:
        """None where either model has no position left for a reply."""
        context = self.context(conversation)
        student, teacher = self.around.source.hf_config, self.teacher.config
        rooms = (_room(student, conversation.prompt), _room(teacher, context))
        limit = min(self.config.max_new_tokens, *rooms)
        return _Asked(conversation.prompt, context, limit) if limit >= 1 else None

    def _book(self, counts: _Counts) -> None:
        """FLOPs and tokens of all ranks. The trainer books the tokens that were read; the student computes
        on others."""
        around = self.around
        flops, length = around.engine.flops.forward, around.catalogue.sequence_length
        around.ledger.add("generation", flops=counts.generated * flops, tokens=counts.generated)
        around.ledger.add("teacher", flops=counts.teacher * self._teacher_flops, tokens=counts.teacher)
        read = around.config.train.global_batch_size * length
        around.ledger.add("train", flops=(counts.student - read) * around.engine.train_flops)

    @cached_property
    def _teacher_flops(self) -> float:
        """Of a forward pass, per token; attention is that over T positions, as of the student's."""
        return count_flops(self.teacher, self.around.catalogue.sequence_length).forward

    def _compute_context(self) -> AbstractContextManager[None]:
        if self.dtype is torch.float32:
            return nullcontext()
        return cast(AbstractContextManager[None], torch.autocast(self.around.world.device.type, self.dtype))

    def _synchronise(self) -> None:
        if self.around.world.device.type == "cuda":
            torch.cuda.synchronize(self.around.world.device)

    def _require_apart(self) -> None:
        """UserError where the teacher does not keep a sample's documents apart, as the student was tried."""
        catalogue = self.around.catalogue
        require_documents_apart(
            lambda batch: sample_loss_sums(self.teacher, batch, len(batch)),
            vocab_size=catalogue.vocab_size,
            sequence_length=catalogue.sequence_length,
            architecture=f"the teacher, {type(self.teacher).__name__}",
            attention=ATTENTION,
        )

    def _require_conversations(self) -> None:
        around, name = self.around, self.around.config.method.name
        if not around.config.data.mask_documents:
            raise UserError(
                f"method.name {name} needs data.mask_documents, by which a sample's conversations are told "
                "apart: set it to true"
            )
        if around.config.engine.fsdp.tensor_parallel > 1:
            raise UserError(
                f"method.name {name} does not run with engine.fsdp.tensor_parallel of 2 or more: set it to 1"
            )
        domains = around.catalogue.domains
        if not any(info.packing == "best_fit" for info in domains.values()):
            raise UserError(
                f"method.name {name} replies to conversations, and none of data.domains has any "
                f"({', '.join(domains)}): add one that was prepared with --chat-domain or --builtin-chat"
            )


def _room(model: PretrainedConfig, tokens: Sequence[int]) -> int:
    """Positions that are left behind ``tokens``."""
    most = most_positions(model)
    return (1 << 30) if most is None else most - len(tokens)
