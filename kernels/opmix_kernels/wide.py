"""Where activations and gated low-rank activations stand in one buffer, so that a layer is one product.

A row of the buffer holds what n linear layers (the consumers) that read the same input need:

    [ Z_0 | X' | Z_1 | ... | Z_{n-1} ]

X' [d] is the input and Z_i [J] consumer i's gated low-rank activations, J = C * r. Consumer i computes
y_i = [.. X' .. Z_i ..] [.. W_i .. B_i ..]^T. Z_0 stands left of X' and the others right, so that the first
two each read one span of neighbouring columns without waste; consumer i > 1 reads past Z_1 .. Z_{i-1}, where
its matrix is 0. Every part is padded with zeros to a multiple of 16 columns: rows and parts then start at
multiples of 32 bytes in 16 bits, which vector loads and library products want.

Tiny example: d = 16, n = 2, J = 16: columns 0..15 are Z_0, 16..31 X', 32..47 Z_1. Consumer 0 reads 0..31 with
the matrix [B_0 | W_0], consumer 1 reads 16..47 with [W_1 | B_1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT = 16
"""Columns; parts of a wide row start at multiples of it."""


def padded(columns: int) -> int:
    """``columns`` rounded up to a multiple of :data:`ALIGNMENT`."""
    return (columns + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def stacked_columns(B: Tensor) -> Tensor:
    """B [C, d_out, r] as [d_out, C * r]: adapter c's columns are c * r .. (c + 1) * r."""
    return B.permute(1, 0, 2).reshape(B.shape[1], -1)


@dataclass(frozen=True)
class WideLayout:
    """Columns of the wide buffer.

    Args:
        features: d, columns of the input.
        consumers: n, linear layers that read it, at least 1.
        columns: J = C * r, low-rank columns of each consumer, at least 1.
    """

    features: int
    consumers: int
    columns: int

    @property
    def gated(self) -> int:
        """Columns of one Z_i with its padding."""
        return padded(self.columns)

    @property
    def width(self) -> int:
        """Columns of the whole buffer."""
        return padded(self.features) + self.consumers * self.gated

    @property
    def x(self) -> slice:
        """Columns of X', without padding."""
        return slice(self.gated, self.gated + self.features)

    def z(self, consumer: int) -> slice:
        """Columns of Z_i, without padding."""
        start = 0 if consumer == 0 else padded(self.features) + consumer * self.gated
        return slice(start, start + self.columns)

    def span(self, consumer: int) -> slice:
        """Columns that consumer i reads, padding included.

        Raises:
            IndexError: no such consumer.
        """
        if not 0 <= consumer < self.consumers:
            raise IndexError(f"consumer {consumer} of {self.consumers}")
        end = padded(self.features) + (consumer + 1) * self.gated
        return slice(0 if consumer == 0 else self.gated, end)

    def matrix(self, consumer: int, weight: Tensor, B: Tensor) -> Tensor:
        """What consumer i multiplies its span by: y_i = F.linear(wide[:, layout.span(i)], matrix, bias).

        The scale s is in Z (:func:`opmix_kernels.norm_shrink_gate`) and not in here. To be made once per
        layer: it copies the weight.

        Args:
            weight: W [d_out, d].
            B: [C, d_out, r], cast to the weight's dtype.

        Returns:
            [d_out, span] in the weight's dtype.

        Raises:
            ValueError: shapes that do not fit the layout.
        """
        if weight.dim() != 2 or weight.shape[1] != self.features:
            raise ValueError(f"weight must be [d_out, {self.features}], got {list(weight.shape)}")
        if B.dim() != 3 or B.shape[1] != len(weight) or B.shape[0] * B.shape[2] != self.columns:
            raise ValueError(
                f"B must be [C, {len(weight)}, r] with C * r = {self.columns}, got {list(B.shape)}"
            )
        span = self.span(consumer)
        matrix = weight.new_zeros(len(weight), span.stop - span.start)
        matrix[:, _within(self.x, span)] = weight
        matrix[:, _within(self.z(consumer), span)] = stacked_columns(B).to(weight.dtype)
        return matrix


def _within(part: slice, span: slice) -> slice:
    """A slice of the buffer's columns as one of the span's."""
    return slice(part.start - span.start, part.stop - span.start)


@dataclass(frozen=True)
class LowRankStack:
    """The matrices of one layer's forward and backward products in one storage
    [padded J + padded d_out, padded J + padded d_in], zeros elsewhere:

        [ 0 | A ]
        [ B | W ]

    The lower rows [B | W] turn [Z | X] into y; the right columns [A; W] turn [s u (G B) | G] into the
    gradient of x. Memory: (J + d_out) (J + d_in) elements; who builds it may keep :attr:`weight` in place of
    the W that it copied. Constant: it does not follow later changes of W, A or B.
    """

    storage: Tensor
    rank: int
    adapters: int
    in_features: int
    out_features: int

    @classmethod
    @torch.no_grad()
    def build(cls, weight: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype | None = None) -> LowRankStack:
        """From W [d_out, d_in], A [C, r, d_in], B [C, d_out, r] (see :func:`require_layer`).

        Args:
            dtype: of the products; the weight's if None.
        """
        require_layer(weight, A, B)
        (out_features, in_features), (adapters, rank) = weight.shape, A.shape[:2]
        inner, outer = (
            WideLayout(in_features, 1, adapters * rank),
            WideLayout(out_features, 1, adapters * rank),
        )
        storage = torch.zeros(outer.width, inner.width, dtype=dtype or weight.dtype, device=weight.device)
        storage[outer.x, inner.x] = weight.to(storage.dtype)
        storage[outer.x, inner.z(0)] = stacked_columns(B).to(storage.dtype)
        storage[outer.z(0), inner.x] = A.flatten(0, 1).to(storage.dtype)
        return cls(storage, rank, adapters, in_features, out_features)

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def inner(self) -> WideLayout:
        """Of [Z | X], and of the storage's columns."""
        return WideLayout(self.in_features, 1, self.adapters * self.rank)

    @property
    def outer(self) -> WideLayout:
        """Of [s u (G B) | G], and of the storage's rows."""
        return WideLayout(self.out_features, 1, self.adapters * self.rank)

    @property
    def weight(self) -> Tensor:
        """W [d_out, d_in], a view."""
        return self.storage[self.outer.x, self.inner.x]

    @property
    def forward_matrix(self) -> Tensor:
        """[B | W], [d_out, padded J + padded d_in], a view."""
        return self.storage[self.outer.x]

    @property
    def backward_matrix(self) -> Tensor:
        """[A; W], [padded J + padded d_out, d_in], a view."""
        return self.storage[:, self.inner.x]

    @property
    def down(self) -> Tensor:
        """A with zero rows to the padding, [padded J, d_in], a view."""
        return self.storage[: self.inner.gated, self.inner.x]

    @property
    def up(self) -> Tensor:
        """B^T with zero rows to the padding, [padded J, d_out], a view whose rows are 1 element apart."""
        return self.storage[self.outer.x, : self.inner.gated].T


def require_layer(weight: Tensor, A: Tensor, B: Tensor) -> None:
    """ValueError naming what does not fit W [d_out, d_in], A [C, r, d_in], B [C, d_out, r]."""
    if weight.dim() != 2:
        raise ValueError(f"weight must be [d_out, d_in], got {list(weight.shape)}")
    if A.dim() != 3 or A.shape[2] != weight.shape[1]:
        raise ValueError(f"A must be [C, r, {weight.shape[1]}], got {list(A.shape)}")
    if B.shape != (A.shape[0], weight.shape[0], A.shape[1]):
        raise ValueError(
            f"B must be {[A.shape[0], weight.shape[0], A.shape[1]]} beside A, got {list(B.shape)}"
        )


def padded_rows(A: Tensor) -> Tensor:
    """A [n, C, r, d] as [n * padded(C * r), d], zero rows after each consumer's own; a view where r C is a
    multiple of the alignment and A is contiguous."""
    rows = A.flatten(1, 2)  # [n, J, d]
    missing = padded(rows.shape[1]) - rows.shape[1]
    return (F.pad(rows, (0, 0, 0, missing)) if missing else rows).flatten(0, 1)
