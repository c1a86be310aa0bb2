"""norm_shrink_gate against float64: dtypes, odd shapes and strides, the norm's rounding, torch's graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from opmix_kernels import norm_shrink_gate, shrink
from opmix_kernels.runtime import Config
from opmix_kernels.shrink import SHRINK
from opmix_kernels.wide import WideLayout, padded_rows
from tests.kernels.checking import DEVICE, NoWaiting, assert_close, broken, poisoned_memory, random

SMALL = Config({"BR": 16, "BJ": 16, "BK": 16}, warps=1, stages=1)
WIDE = Config({"BR": 16, "BJ": 64, "BK": 32}, warps=2, stages=2)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 0.25


@dataclass(frozen=True)
class Case:
    """Sizes and dtypes of one call."""

    dtype: torch.dtype = torch.float32
    stream: torch.dtype | None = None
    """Of x, where not ``dtype``."""
    normed: bool = True
    consumers: int = 3
    candidates: int = 2
    tokens: int = 17
    adapters: int = 3
    rank: int = 5
    width: int = 37

    def arguments(self) -> dict[str, Any]:
        return {
            "x": random(self.candidates * self.tokens, self.width, dtype=self.stream or self.dtype),
            "A": random(self.consumers, self.adapters, self.rank, self.width, dtype=self.dtype, seed=1),
            "coefficients": random(self.candidates, self.adapters, seed=2),
            "norm_weight": random(self.width, dtype=self.dtype, seed=3) if self.normed else None,
        }

    def check(self, **changes: Tensor) -> None:
        given = self.arguments() | changes
        with poisoned_memory():
            wide = norm_shrink_gate(**given, scale=0.7, eps=EPS, out_dtype=self.dtype)
        assert wide.dtype == self.dtype
        assert_close(wide, expected(given), self.dtype)


def expected(given: dict[str, Any]) -> Tensor:
    exact = {k: None if v is None else v.double() for k, v in given.items()}
    return shrink.reference(**exact, scale=0.7, eps=EPS)


@pytest.fixture
def small() -> Iterator[None]:
    with SHRINK.using(SMALL):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("config", [None, SMALL, WIDE], ids=str)
def test_equals_float64(dtype: torch.dtype, normed: bool, config: Config | None) -> None:
    if config is None:
        Case(dtype, normed=normed).check()
        return
    with SHRINK.using(config):
        Case(dtype, normed=normed).check()


@settings(max_examples=10, deadline=None)
@given(
    st.builds(
        Case,
        dtype=st.sampled_from(DTYPES),
        stream=st.sampled_from([None, torch.float32]),
        normed=st.booleans(),
        consumers=st.integers(1, 4),
        candidates=st.integers(1, 4),
        tokens=st.integers(1, 20),
        adapters=st.integers(1, 4),
        rank=st.sampled_from([1, 3, 4, 16, 33]),
        width=st.integers(1, 40),
    )
)
def test_any_sizes(case: Case) -> None:
    with SHRINK.using(WIDE):
        case.check()


@pytest.mark.parametrize(
    "case",
    [
        Case(candidates=32, tokens=1, consumers=1, adapters=2, width=16),
        Case(candidates=1, tokens=2, consumers=1, adapters=64, rank=4, width=16),
        Case(candidates=1, tokens=2, consumers=1, adapters=1, rank=128, width=16),
        Case(tokens=0),
    ],
    ids=["many candidates", "many adapters", "a high rank", "no rows"],
)
def test_ends_of_the_ranges(case: Case) -> None:
    if case.tokens:
        case.check()
    else:
        layout = WideLayout(case.width, case.consumers, case.adapters * case.rank)
        assert norm_shrink_gate(**case.arguments(), scale=1.0).shape == (0, layout.width)


def test_layers_are_products_of_spans(small: None) -> None:
    """What the buffer is for: W_i x + s * sum_c u_c B_c A_c x of each consumer."""
    case = Case(normed=False)
    given, layout = case.arguments(), WideLayout(case.width, 3, 15)
    wide = norm_shrink_gate(**given, scale=0.7)
    for i in range(3):
        W, B = random(11, case.width, seed=10 + i), random(3, 11, 5, seed=20 + i)
        deltas = torch.einsum("mc,cor,cri->moi", given["coefficients"], B, given["A"][i]).double()
        x = given["x"].view(2, -1, case.width).double()
        direct = torch.bmm(x, (W.double() + 0.7 * deltas).mT).flatten(0, 1)
        found = F.linear(wide[:, layout.span(i)], layout.matrix(i, W, B))
        assert_close(found, direct, torch.float32, f"consumer {i}")


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
def test_norm_rounds_like_the_models(stream: torch.dtype, weight_dtype: torch.dtype) -> None:
    """X' is LlamaRMSNorm's result in bfloat16 but where the last bit of 1 / sqrt moves a tie."""
    x = random(16, 96, dtype=stream)
    theirs = LlamaRMSNorm(96, eps=1e-5).to(DEVICE)
    theirs.weight.data = random(96, dtype=weight_dtype, seed=1)
    wide = norm_shrink_gate(x, random(1, 1, 4, 96), random(1, 1), scale=1.0, eps=1e-5,
                            norm_weight=theirs.weight.detach(), out_dtype=torch.bfloat16)  # fmt: skip
    found = wide[:, WideLayout(96, 1, 4).x]
    assert (found == theirs(x).bfloat16()).float().mean() > 0.995


def test_low_rank_part_is_of_the_rounded_activations() -> None:
    """Z [R, r] is that of X' in bfloat16, rounded once; from the float32 norm it would be another."""
    given = Case(torch.bfloat16, torch.float32, consumers=1, adapters=1, width=96).arguments()
    layout = WideLayout(96, 1, 5)
    wide = norm_shrink_gate(**given, scale=1.0, eps=EPS, out_dtype=torch.bfloat16).double()

    def rounds_to_z(x: Tensor) -> bool:
        low = x @ given["A"][0, 0].double().T * given["coefficients"].double().repeat_interleave(17, dim=0)
        return bool(((wide[:, layout.z(0)] - low).abs() <= low.abs() * 2**-8 + 1e-5).all())

    assert rounds_to_z(wide[:, layout.x])
    unrounded = F.rms_norm(given["x"].double(), (96,), given["norm_weight"].double(), EPS)
    assert not rounds_to_z(unrounded)


def test_strided_rows_and_adapters(small: None) -> None:
    """x as a slice of a wider buffer and as transposed heads; A as every second of a stack."""
    case = Case()
    given = case.arguments()
    beside = torch.cat([given["x"], random(34, 30, seed=7)], dim=1)
    case.check(x=beside[:, : case.width], A=given["A"].repeat_interleave(2, dim=0)[::2])
    heads = random(2, 4, 17, 8, seed=8).transpose(1, 2).flatten(2)  # [B, T, H * K]
    replace(case, width=32).check(x=heads.mT.contiguous().mT)


def test_candidates_do_not_meet(small: None) -> None:
    """A candidate's rows are bit for bit the same alone and beside others."""
    given = Case(candidates=3).arguments()
    together = norm_shrink_gate(**given, scale=0.7, eps=EPS)
    for m in range(3):
        rows = slice(17 * m, 17 * (m + 1))
        alone = given | {"x": given["x"][rows], "coefficients": given["coefficients"][m : m + 1]}
        assert torch.equal(norm_shrink_gate(**alone, scale=0.7, eps=EPS), together[rows])


def test_rows_beyond_two_to_the_31_elements() -> None:
    """Row strides past 2^31 / rows, in and out: only touched pages of the tensors are there."""
    rows, width, stride = 5, 16, 2**29 + 16
    storage = torch.empty(4 * stride + 64, dtype=torch.float16, device=DEVICE)
    x, out = (storage[i : i + 4 * stride + 32].as_strided((rows, 32), (stride, 1)) for i in (0, 32))
    x[:, :width] = random(rows, width, dtype=torch.float16)
    A, U = random(1, 1, 16, width, dtype=torch.float16, seed=1), random(1, 1, seed=2)
    SHRINK(
        (1,), like=A, constexprs={"C": 1, "RANK": 16, "JP": 16, "N": 1}, X=x, A=padded_rows(A), U=U, G=None,
        OUT=out, PRODUCTS=None, SAVED=None, PARTIALS=None, T=rows, D=width, DP=width, tiles=1, scale=0.7,
        eps=0.0, x_row=stride, a_row=width, a_column=1, out_row=stride,
    )  # fmt: skip
    exact = shrink.reference(x[:, :width].double(), A.double(), U.double(), 0.7)
    assert_close(out, exact, torch.float16)


BREAKS = [
    ("t = (tl.program_id(0) % tiles) * BR", "t = (tl.program_id(0) % tiles) * (BR + 1)"),
    ("in_rows = t < T", "in_rows = t < T - 1"),
    ("squares += x * x", "squares = x * x"),
    ("/ D + eps", "/ (D + 1) + eps"),
    ("/ D + eps", "/ D + eps * 0.99"),
    ("g[None, :]", "(g[None, :] + 1e-3)"),
    ("in_ks = ks < D", "in_ks = ks < D - 1"),
    ("(ks < DP)", "(ks < DP - 1)"),
    ("OUT.dtype.element_ty)\n            elif", "tl.float16).to(tl.float32)\n            elif"),
    ("dot(x, a, total)", "dot(x, a, tl.zeros_like(total))"),
    ("within = js % JP", "within = js % (JP + 1)"),
    ("within // RANK", "within // (RANK + 1)"),
    ("candidate * C", "candidate * (C - 1)"),
    ("(scale * gates)", "(scale * gates + 1e-3)"),
    ("js < JP, js", "js <= JP, js"),
    ("js + DP)", "js + DP - 1)"),
]


@pytest.mark.parametrize(("old", "new"), BREAKS, ids=lambda text: text.split("\n")[0])
def test_a_broken_copy_fails(old: str, new: str) -> None:
    """Two consumers, 17 rows in tiles of 16 and 15 of 16 columns: every mask and every loop counts."""
    with broken(SHRINK, old, new), SHRINK.using(SMALL), pytest.raises(AssertionError, match="relative"):
        Case(consumers=2).check()


def test_the_rounding_before_the_weight_is_seen() -> None:
    with (
        broken(SHRINK, "inverse[:, None], X.dtype.element_ty)", "inverse[:, None], tl.float32)"),
        pytest.raises(AssertionError),
    ):
        test_norm_rounds_like_the_models(torch.bfloat16, torch.bfloat16)


def test_torch_knows_the_operation(small: None) -> None:
    given = Case().arguments()
    torch.library.opcheck(
        shrink._operation, (*[given[k] for k in ("x", "A", "coefficients")], 0.7, given["norm_weight"], EPS,
                            torch.float16)
    )  # fmt: skip


def test_compiled_gives_the_same(small: None) -> None:
    def layer(x: Tensor, **others: Tensor) -> Tensor:
        return norm_shrink_gate(x.view(2, 17, -1), scale=0.7, eps=EPS, **others) + 1

    given = Case().arguments()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given), layer(**given))


def test_the_host_does_not_wait(small: None) -> None:
    given = Case().arguments()
    with NoWaiting():
        with pytest.raises(AssertionError, match="waits"):
            given["x"].sum().item()
        norm_shrink_gate(**given, scale=0.7, eps=EPS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(3, 5, 37)}, r"A must be \[n, C, r, 37\]"),
        ({"A": torch.zeros(1, 3, 5, 36)}, r"A must be \[n, C, r, 37\]"),
        ({"norm_weight": torch.zeros(36)}, r"norm_weight must be \[37\]"),
        ({"coefficients": torch.zeros(2, 4)}, r"coefficients must be \[M, 3\]"),
        ({"coefficients": torch.zeros(3, 3)}, "34 rows of x are not 3 equal groups"),
        ({"coefficients": torch.zeros(0, 3)}, "34 rows of x are not 0 equal groups"),
        ({"x": torch.zeros(34, 37, dtype=torch.float64)}, "x must be bfloat16, float16 or float32"),
        ({"out_dtype": torch.float64}, "out_dtype must be"),
        ({"coefficients": torch.zeros(2, 3, requires_grad=True)}, "coefficients requires gradients"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norm_shrink_gate(**(Case().arguments() | change), scale=1.0)
