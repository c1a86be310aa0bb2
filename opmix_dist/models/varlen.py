"""``model.attention: varlen``: causal attention within documents, without a mask of T x T.

On a GPU in 16 bits it is torch's own kernel for pieces of variable length (``torch.nn.attention.varlen``),
which needs no flash-attn package; elsewhere each document is an ordinary causal attention by itself. Work and
memory are those of the documents: sum of n^2 and of n over their lengths n.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import varlen as kernel
from transformers import AttentionInterface

VARLEN = "varlen"


@dataclass(frozen=True)
class Pieces:
    """Where documents begin among the tokens of all samples, one behind the other: int32 [D + 1], with the
    number of tokens at the end; no document is longer than ``longest``."""

    starts: Tensor
    longest: int

    @classmethod
    def of_positions(cls, positions: Tensor) -> Pieces:
        """Of position ids [B, T]: a piece begins at each 0, and each row at one. The host waits for the
        device once.

        ``longest`` is T: the exact number would make compiled blocks be compiled for each.
        """
        begun = positions == 0
        begun[:, 0] = True
        (places,) = begun.flatten().nonzero(as_tuple=True)
        return cls(F.pad(places, (0, 1), value=positions.numel()).int(), positions.shape[1])

    @classmethod
    def of_rows(cls, rows: int, length: int, device: torch.device) -> Pieces:
        """Each sample a document."""
        starts = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)
        return cls(starts, length)

    def arguments(self) -> dict[str, Any]:
        """As transformers hands them through a model to its attention."""
        return {"cu_seq_lens_q": self.starts, "max_length_q": self.longest}


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """For transformers' ``AttentionInterface``.

    Args:
        query: [B, H, T, K]; key and value [B, H_kv, T, K].
        sliding_window: each token looks at so many at most, itself included.
        cu_seq_lens_q, max_length_q: of :class:`Pieces`; None: each row is a document.

    Returns:
        [B, T, H, K], and no weights.

    Raises:
        ValueError: something is asked for that it does not compute.
    """
    asked = [name for name in ("softcap", "s_aux", "head_mask") if others.get(name) is not None]
    if attention_mask is not None or dropout or asked or query.shape[2] != key.shape[2]:
        raise ValueError(f"varlen attention has no masks, dropout or cache, nor {asked or 'anything beyond'}")
    batch, heads, length, _ = query.shape
    if torch.is_autocast_enabled(query.device.type):  # rotated queries and keys are float32 in it
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if cu_seq_lens_q is None or max_length_q is None:
        pieces = Pieces.of_rows(batch, length, query.device)
    else:
        pieces = Pieces(cu_seq_lens_q, max_length_q)
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    by_kernel = query.is_cuda and query.dtype.itemsize == 2
    attend = _by_kernel if by_kernel else _one_by_one
    found = attend(query, key, value, pieces, scaling, sliding_window)  # of [B * T, H, K]
    return found.view(batch, length, heads, -1), None


AttentionInterface.register(VARLEN, varlen_attention)


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, pieces: Pieces, scaling: float | None, window: int | None
) -> Tensor:
    before = -1 if window is None or window >= pieces.longest else window - 1
    starts, longest = pieces.starts, pieces.longest
    options: dict[str, Any] = {"scale": scaling, "window_size": (before, 0)}
    shared = query.shape[1] // key.shape[1]
    if "enable_gqa" in inspect.signature(kernel.varlen_attn).parameters:
        options["enable_gqa"] = shared > 1
    else:  # torch 2.11
        key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    found = kernel.varlen_attn(query, key, value, starts, starts, longest, longest, **options)
    return cast(Tensor, found)


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, pieces: Pieces, scaling: float | None, window: int | None
) -> Tensor:
    found = []
    for begin, end in pairwise(pieces.starts.tolist()):
        q, k, v = (tensor[begin:end].transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
        limited = window is not None and window < end - begin
        mask = _band(end - begin, window, query.device) if limited else None
        found.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )[0]
        )
    return torch.cat(found, dim=1).transpose(0, 1).contiguous()


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [n, n]: true where a token looks, at itself and the ``window - 1`` before it."""
    assert window is not None
    every = torch.ones(length, length, dtype=torch.bool, device=device)
    return every.tril().triu(1 - window)
