"""segment_sums: exact values, the same bits whatever is beside a candidate, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opmix_kernels import segment_sums, segments
from opmix_kernels.runtime import Config
from opmix_kernels.segments import SEGMENT_SUMS
from tests.kernels.checking import DEVICE, assert_close, broken, poisoned_memory, random

SMALL = Config({"BT": 16}, warps=1, stages=1)
COUNT = 5


@pytest.fixture
def small() -> Iterator[None]:
    with SEGMENT_SUMS.using(SMALL):
        yield


def data(
    candidates: int = 3, positions: int = 157, count: int = COUNT, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """float64 losses whose sums depend on the order; some positions belong to no segment."""
    losses = random(candidates, positions, dtype=torch.float64, seed=seed) / 3  # all 53 bits
    generator = torch.Generator().manual_seed(seed)
    return losses, torch.randint(-1, count + 1, (positions,), generator=generator).to(DEVICE)


def check(losses: Tensor, places: Tensor, count: int = COUNT) -> None:
    with poisoned_memory():
        found = segment_sums(losses, places, count)
    exact = segments.reference(losses, places, count)
    assert found.dtype == torch.float64
    assert found.shape == exact.shape
    assert (found - exact).abs().max() <= 1e-12 * exact.abs().max(), "the sums differ"


def test_by_hand() -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0], [3.0, 5.0, 7.0, 9.0, 11.0]], device=DEVICE)
    places = torch.tensor([1, 0, 1, -100, 3], device=DEVICE)
    found = segment_sums(losses, places, 3)
    assert found.tolist() == [[2.0, 5.0, 0.0], [5.0, 10.0, 0.0]]


def test_small_losses_beside_large_ones_keep_their_digits() -> None:
    losses = torch.tensor([[2.0**30, 2.0**-20, -(2.0**30)]], device=DEVICE)
    assert segment_sums(losses, torch.zeros(3, dtype=torch.int64, device=DEVICE), 1).item() == 2.0**-20


@pytest.mark.parametrize("config", [SMALL, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_reference(config: Config | None, dtype: torch.dtype) -> None:
    losses, places = data(positions=1300)
    with SEGMENT_SUMS.using(config or SEGMENT_SUMS.shipped["sm_80"][4][0]):
        check(losses.to(dtype), places)


@pytest.mark.usefixtures("small")
@settings(max_examples=12, deadline=None)
@given(
    candidates=st.integers(1, 5),
    positions=st.integers(1, 60),
    count=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_every_shape(candidates: int, positions: int, count: int, seed: int) -> None:
    losses, places = data(candidates, positions, count, seed)
    places[0] = 0  # a sum that is not 0, for the relative error
    check(losses, places, count)


@pytest.mark.usefixtures("small")
def test_many_segments_of_equal_size() -> None:
    losses, _ = data(positions=600)
    places = torch.arange(600, device=DEVICE) // 4
    assert torch.allclose(
        segment_sums(losses, places, 150), losses.view(3, 150, 4).sum(2), rtol=1e-13, atol=1e-14
    )


@pytest.mark.usefixtures("small")
def test_the_same_bits_whatever_is_beside_a_candidate() -> None:
    losses, places = data(candidates=7)
    together = segment_sums(losses, places, COUNT)
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3], device=DEVICE)
    assert torch.equal(segment_sums(losses[order], places, COUNT), together[order])
    for rows in (slice(0, 1), slice(1, 3), slice(3, 7)):
        assert torch.equal(segment_sums(losses[rows], places, COUNT), together[rows])
    shuffled = torch.randperm(losses.shape[1], generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert not torch.equal(segment_sums(losses[:, shuffled], places[shuffled], COUNT), together), (
        "sums of these losses do not depend on the order, so that the test shows nothing"
    )


@pytest.mark.usefixtures("small")
def test_segments_of_no_candidates_or_positions() -> None:
    losses, places = data()
    assert segment_sums(losses[:0], places, COUNT).shape == (0, COUNT)
    assert segment_sums(losses[:, :0], places[:0], COUNT).tolist() == [[0.0] * COUNT] * 3
    assert segment_sums(losses, places, 0).shape == (3, 0)


@pytest.mark.usefixtures("small")
def test_nan_stays_in_its_segment() -> None:
    losses, places = data()
    expected = segments.reference(losses, places, COUNT)
    losses[1, (places == 2).nonzero()[0]] = math.nan
    losses[2, (places == -1).nonzero()[0]] = math.nan
    found = segment_sums(losses, places, COUNT)
    assert found[1, 2].isnan()
    found[1, 2] = expected[1, 2]
    assert_close(found, expected, torch.float32)


@pytest.mark.usefixtures("small")
def test_strides() -> None:
    losses, places = data(positions=40)
    check(losses.T.contiguous().T, places)
    check(losses[:, ::2], places[::2])
    check(losses[:1].expand(3, 40), places)


@pytest.mark.usefixtures("small")
def test_places_beyond_2_to_the_31() -> None:
    losses, places = data(positions=5)
    places[0] = 0
    apart = 2**30 + 2**29  # only pages that are touched exist
    for strides in ((apart, 1), (1, apart // 2)):
        span = 1 + sum((n - 1) * stride for n, stride in zip(losses.shape, strides, strict=True))
        view = torch.empty(span, dtype=torch.float32, device=DEVICE).as_strided(losses.shape, strides)
        view.copy_(losses)
        check(view, places)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient(dtype: torch.dtype) -> None:
    losses, places = data()
    weights = random(3, COUNT, dtype=torch.float64, seed=9)
    gradients = []
    for function in (segment_sums, segments.reference):
        leaf = losses.to(dtype).requires_grad_()
        gradients.append(torch.autograd.grad((function(leaf, places, COUNT) * weights).sum(), leaf)[0])
    assert gradients[0].dtype == dtype
    assert torch.equal(*gradients)
    assert (gradients[0] == 0).any()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("// S", "// (S + 1)"),
        ("FIRST + s + 1", "FIRST + s"),
        ("range(first, end, BT)", "range(first, end - BT, BT)"),
        ("ORDER + ks, mask=ks < end", "ORDER + ks // 2, mask=ks < end"),
        ("positions, losses_column), mask=ks < end", "positions, losses_column), mask=ks <= end"),
        ("offset(m, losses_row)", "offset(m // 2, losses_row)"),
        ("losses.to(tl.float64)", "losses.to(tl.float32).to(tl.float64)"),
        ("OUT + tl.program_id(0)", "OUT + s + m // 2 * S"),
    ],
)
@pytest.mark.usefixtures("small")
def test_a_broken_copy_fails(old: str, new: str) -> None:
    with broken(SEGMENT_SUMS, old, new), pytest.raises(AssertionError, match="the sums differ"):
        check(*data())


@pytest.mark.usefixtures("small")
def test_is_an_operator_of_torch() -> None:
    losses, places = data(positions=20)
    torch.library.opcheck(torch.ops.opmix_kernels.segment_sums, (losses.requires_grad_(), places, COUNT))


@pytest.mark.usefixtures("small")
def test_compiled_whole() -> None:
    losses, places = data(positions=20)

    def doubled(losses: Tensor, places: Tensor) -> Tensor:
        return 2 * segment_sums(losses + 1, places, COUNT)

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(losses, places), doubled(losses, places))


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], object], str]] = {
    "vector": (lambda x, s: segment_sums(x[0], s, 3), r"losses is \[157\]"),
    "dtype": (lambda x, s: segment_sums(x.half(), s, 3), "losses is .* torch.float16"),
    "count": (lambda x, s: segment_sums(x, s[1:], 3), r"segments is \[156\]"),
    "int32": (lambda x, s: segment_sums(x, s.int(), 3), "segments is .* torch.int32"),
    "negative": (lambda x, s: segment_sums(x, s, -1), "num_segments is -1"),
    "device": (lambda x, s: segment_sums(x, s.to("meta"), 3), "segments is on meta"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_named(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call(*data())
