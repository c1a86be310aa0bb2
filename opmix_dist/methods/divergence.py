"""KL divergence of a student's next-token distributions from a teacher's, row by row, with its gradient.

With q the student's and p the teacher's distribution, of logits z and a teacher that is constant,

    reverse  KL(q || p) = sum_v q_v (log q_v - log p_v)     d / dz_v = q_v (log q_v - log p_v - KL)
    forward  KL(p || q) = sum_v p_v (log p_v - log q_v)     d / dz_v = q_v - p_v

Rows are taken in chunks, so that float32 copies of all logits are never in memory; what the backward pass
needs, d / dz, is kept in the dtype of the student's logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opmix_dist.method_config import Direction

CHUNK_BYTES = 64 << 20
"""Of a chunk's logits in float32."""


def divergences(
    student: Tensor,
    teacher: Tensor,
    direction: Direction,
    *,
    top_k: int | None = None,
    rows: int | None = None,
) -> Tensor:
    """KL of each row, nats: [R] float32, or float64 of float64; no gradient goes to the teacher.

    Args:
        student: logits [R, V].
        teacher: logits [R, V].
        top_k: both distributions are restricted to the teacher's likeliest tokens and sum to 1 over these;
            None: all tokens, which is exact.
        rows: of a chunk; None: as many as ``CHUNK_BYTES`` hold.
    """
    if rows is None:
        rows = max(1, CHUNK_BYTES // (4 * student.shape[1]))
    kept = top_k if top_k is not None and top_k < student.shape[1] else None
    with torch.autocast(student.device.type, enabled=False):
        return _Divergences.apply(student, teacher, direction, kept, rows)


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, direction: Direction, top_k: int | None, rows: int
    ) -> Tensor:
        width = student.shape[1] if top_k is None else top_k
        found = student.new_empty(len(student), dtype=torch.promote_types(student.dtype, torch.float32))
        slopes = student.new_empty(len(student), width)
        chosen = None if top_k is None else torch.empty_like(slopes, dtype=torch.int64)
        for part in _chunks(len(student), rows):
            z, t = student[part], teacher[part]
            if chosen is not None:
                chosen[part] = t.topk(width, dim=1).indices
                z, t = z.gather(1, chosen[part]), t.gather(1, chosen[part])
            log_q, log_p = z.to(found.dtype).log_softmax(1), t.to(found.dtype).log_softmax(1)
            found[part], slopes[part] = _of_chunk(log_q, log_p, direction)
        ctx.shape = student.shape
        ctx.save_for_backward(slopes, chosen)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slopes, chosen = ctx.saved_tensors
        scaled = slopes * gradient.to(slopes.dtype).unsqueeze(1)
        if chosen is not None:
            scaled = slopes.new_zeros(ctx.shape).scatter_(1, chosen, scaled)
        return scaled, None, None, None, None


def _of_chunk(log_q: Tensor, log_p: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
    """KL [rows], and its gradient to the student's logits [rows, V]."""
    if direction == "reverse":
        q, ratio = log_q.exp(), log_q - log_p
        kl = (q * ratio).sum(1)
        return kl, q * (ratio - kl.unsqueeze(1))
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(1), log_q.exp() - p


def _chunks(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))
