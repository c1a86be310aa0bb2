"""merge_deltas against float64: every dtype, odd shapes and strides, stochastic rounding, graphs of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opmix_kernels import merge
from opmix_kernels.merge import MERGE, merge_deltas
from opmix_kernels.runtime import Config
from tests.kernels.checking import DEVICE, assert_close, broken, poisoned_memory, random, relative_error

SMALL = Config({"BN": 16, "BD": 16}, warps=1, stages=1)
WIDE = Config({"BN": 16, "BD": 32}, warps=2, stages=2)
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]

Arguments = tuple[Tensor, Tensor, Tensor, Tensor]


def arguments(
    dtype: torch.dtype = torch.float32,
    candidates: int = 2,
    adapters: int = 3,
    rank: int = 5,
    shape: tuple[int, int] = (17, 37),
    adapter_dtype: torch.dtype | None = None,
) -> Arguments:
    return (
        random(*shape, dtype=dtype),
        random(adapters, rank, shape[1], dtype=adapter_dtype or dtype, seed=1),
        random(adapters, shape[0], rank, dtype=adapter_dtype or dtype, seed=2),
        random(candidates, adapters, seed=3),
    )


def expected(weight: Tensor, A: Tensor, B: Tensor, coefficients: Tensor, scale: float = 0.7) -> Tensor:
    return merge.reference(*(x.double() for x in (weight, A, B, coefficients)), scale)


def check(data: Arguments, dtype: torch.dtype) -> None:
    with poisoned_memory():
        found = merge_deltas(*data, scale=0.7, out_dtype=dtype)
    assert found.dtype == dtype
    assert_close(found, expected(*data), dtype)


@pytest.fixture
def small() -> Iterator[None]:
    with MERGE.using(SMALL):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [None, SMALL, WIDE], ids=str)
def test_equals_float64(dtype: torch.dtype, config: Config | None) -> None:
    if config is None:
        check(arguments(dtype), dtype)
        return
    with MERGE.using(config):
        check(arguments(dtype), dtype)


@settings(max_examples=10, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    candidates=st.integers(1, 3),
    adapters=st.integers(1, 3),
    rank=st.sampled_from([1, 3, 4, 16, 33, 48]),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 40)),
)
def test_every_shape(
    dtype: torch.dtype, candidates: int, adapters: int, rank: int, shape: tuple[int, int]
) -> None:
    with MERGE.using(WIDE):
        check(arguments(dtype, candidates, adapters, rank, shape), dtype)


@pytest.mark.usefixtures("small")
def test_many_candidates_in_few_programs_and_many_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "PROGRAMS", 3)  # 5 candidates: two for each program, the last has one
    check(arguments(candidates=5, adapters=20, rank=4, shape=(5, 6)), torch.float32)


def test_no_candidates_and_one_without_a_first_dimension() -> None:
    weight, A, B, coefficients = arguments()
    assert merge_deltas(weight, A, B, coefficients[:0], scale=0.7).shape == (0, 17, 37)
    one = merge_deltas(weight, A, B, coefficients[1], scale=0.7)
    assert torch.equal(one, merge_deltas(weight, A, B, coefficients, scale=0.7)[1])
    assert torch.equal(merge_deltas(weight, A, B, coefficients[1] * 0, scale=0.7), weight)


@pytest.mark.parametrize("half", HALVES)
def test_a_master_in_float32_is_rounded_once(half: torch.dtype) -> None:
    weight, A, B, coefficients = arguments(adapter_dtype=half)
    exact = merge_deltas(weight, A, B, coefficients, scale=0.7)
    assert exact.dtype == torch.float32
    # adapters of 16 bits are multiplied exactly, coefficients are never rounded
    assert_close(exact, expected(weight, A, B, coefficients), torch.float32)
    assert torch.equal(merge_deltas(weight, A, B, coefficients, scale=0.7, out_dtype=half), exact.to(half))


def test_adapters_in_float32_beside_a_weight_in_bfloat16() -> None:
    data = arguments(torch.bfloat16, adapter_dtype=torch.float32)
    check(data, torch.bfloat16)
    check(data, torch.float32)
    weight, A, B, coefficients = data
    check((weight, A.bfloat16(), B, coefficients), torch.bfloat16)


def test_small_adapters_keep_their_digits_in_float16() -> None:
    """The coefficient is not multiplied into B, whose products with it would be subnormal or zero."""
    weight, A, B, coefficients = arguments(torch.float16)
    B, coefficients = (B * 1e-4).half(), coefficients * 1e-3
    found = merge_deltas(torch.zeros_like(weight), A, B, coefficients, scale=1.0, out_dtype=torch.float32)
    assert relative_error(found, expected(weight * 0, A, B, coefficients, 1.0)) < 1e-6


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "rows of a larger one": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "every other": lambda x: torch.stack((x, x), -1)[..., 0],
    "expanded": lambda x: x[..., :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("small")
def test_strides(layout: str) -> None:
    strided = LAYOUTS[layout]
    weight, A, B, coefficients = (strided(x) for x in arguments(shape=(20, 18)))
    assert not weight.is_contiguous()
    check((weight, A, B, coefficients), torch.float32)
    if layout == "expanded":
        return
    for candidates in (coefficients, coefficients[0]):
        shape = (*candidates.shape[:-1], 20, 18)
        out = strided(torch.full(shape, torch.nan, device=DEVICE))
        given = merge_deltas(weight, A, B, candidates, scale=0.7, out=out)
        assert given is out
        assert_close(out.reshape(shape), expected(weight, A, B, candidates.reshape(-1, 3)).reshape(shape),
                     torch.float32)  # fmt: skip


@pytest.mark.usefixtures("small")
def test_out_leaves_its_surroundings_alone() -> None:
    data = arguments(shape=(20, 18))
    around = torch.full((2, 22, 23), 7.0, device=DEVICE)
    merge_deltas(*data, scale=0.7, out=around[:, 1:21, 2:20])
    assert_close(around[:, 1:21, 2:20], expected(*data), torch.float32)
    around[:, 1:21, 2:20] = 7.0
    assert (around == 7.0).all()


@pytest.mark.usefixtures("small")
def test_places_beyond_2_to_the_31() -> None:
    """Only the pages that are touched exist: 4 x 3 rows, each 2^30 elements after the one before."""
    apart = 2**30
    data = arguments(torch.bfloat16, candidates=2, adapters=2, rank=2, shape=(4, 3))
    storage = torch.empty(8 * apart + 16, dtype=torch.bfloat16, device=DEVICE)
    weight = storage.as_strided((4, 3), (apart, 1))
    out = storage.as_strided((2, 4, 3), (4 * apart, apart, 1), 8)
    A = storage.as_strided((2, 2, 3), (2 * apart, apart, 1), 4 * apart + 3)
    B = storage.as_strided((2, 4, 2), (1, apart, 2), 4 * apart - 5 * apart // 2)
    for view, values in zip((weight, A, B), data[:3], strict=True):
        view.copy_(values)
    merge_deltas(weight, A, B, data[3], scale=0.7, out=out)
    assert_close(out.clone(), expected(*data), torch.bfloat16)


SEED = 123_456_789_012


def check_stochastic_rounding() -> None:
    data = arguments(adapter_dtype=torch.bfloat16, candidates=2, adapters=2)
    exact = merge_deltas(*data, scale=0.7)
    found = merge_deltas(*data, scale=0.7, out_dtype=torch.bfloat16, seed=SEED)
    assert torch.equal(found, merge.stochastic.reference(exact, SEED)), "not the reference's bits"
    assert not torch.equal(found, exact.bfloat16())


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=str)
def test_stochastic_rounding_is_that_of_the_reference(config: Config) -> None:
    with MERGE.using(config):
        check_stochastic_rounding()


def test_stochastic_rounding_uses_all_of_the_seed() -> None:
    x = random(1000)
    results = [merge.stochastic.reference(x, seed) for seed in (SEED, SEED + 1, SEED + 2**32)]
    assert all((results[i] != results[j]).float().mean() > 0.2 for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of NaN in the interpreter
@pytest.mark.usefixtures("small")
def test_stochastic_rounding_keeps_what_is_not_finite_and_the_largest() -> None:
    largest = torch.finfo(torch.float32).max
    values = [torch.inf, -torch.inf, torch.nan, largest, -largest, 0.0, -0.0, 1e-40, 1.5]
    weight = torch.tensor([values] * 2, device=DEVICE)
    payload = torch.tensor([0x7F800001, -1], dtype=torch.int32, device=DEVICE).view(torch.float32)
    weight = torch.cat((weight, payload[:, None].expand(2, 2)), dim=1)  # NaNs that a carry would change
    A, B = torch.zeros(1, 1, 11, device=DEVICE), torch.zeros(1, 2, 1, device=DEVICE)
    found = merge_deltas(
        weight, A, B, torch.ones(1, device=DEVICE), scale=1.0, out_dtype=torch.bfloat16, seed=3
    )
    assert torch.equal(found.isnan(), weight.isnan())
    assert torch.equal(found.isinf(), weight.isinf())
    biggest = torch.finfo(torch.bfloat16).max
    assert found[:, [0, 1, 3, 4, 5, 8]].tolist() == [[torch.inf, -torch.inf, biggest, -biggest, 0.0, 1.5]] * 2
    assert torch.equal(found.isnan(), merge.stochastic.reference(weight, 3).isnan())


def test_stochastic_rounding_is_right_on_the_mean() -> None:
    """Of n roundings the mean is within 5 standard errors, at most half a step each: step / (2 sqrt n)."""
    exact = random(64).abs() + 1.0  # steps of bfloat16: 2^-7 below 2, twice that below 4, and so on
    rows = exact.expand(4000, 64)
    found = merge.stochastic.reference(rows, SEED).double()
    step = 2.0 ** (exact.double().log2().floor() - 7)
    assert (((found - rows) / step).abs() < 1).all()
    error = (found.mean(dim=0) - exact).abs() / step
    assert (error < 5 / (2 * 4000**0.5)).all()
    assert ((exact.bfloat16() - exact).abs() / step).max() > 0.4  # which rounding to nearest is not


TELLING = arguments(candidates=3, rank=33, adapters=2, shape=(17, 18))


@pytest.mark.usefixtures("small")
def test_what_breaks_a_broken_copy_passes_unbroken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "PROGRAMS", 2)
    check(TELLING, torch.float32)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("scale * delta", "(scale + 1e-3) * delta"),
        ("adapter = step // PARTS", "adapter = step % C"),
        ("range(0, C * PARTS)", "range(0, C * PARTS - 1)"),
        ("(js[None, :] < RANK)", "(js[None, :] < RANK - 1)"),
        ("(step % PARTS) * BR", "0"),
        ("* BD\n    rows", "* BD + 1\n    rows"),
        ("U + m * C", "U + first * C"),
        ("first + candidates, M", "first + candidates - 1, M"),
        ("weight + scale", "scale"),
        ("offset(m, out_candidate)", "offset(first, out_candidate)"),
        ("mask=inside)", "mask=inside & (rows[:, None] < N - 1))"),
    ],
)
@pytest.mark.usefixtures("small")
def test_a_broken_copy_fails(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "PROGRAMS", 2)
    with broken(MERGE, old, new), pytest.raises(AssertionError, match="relative"):
        check(TELLING, torch.float32)


@pytest.mark.usefixtures("small")
def test_a_broken_stochastic_copy_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "PROGRAMS", 1)
    with (
        broken(MERGE, "offset(m, N) + rows", "offset(first, N) + rows"),
        pytest.raises(AssertionError, match="not the ref"),
    ):
        check_stochastic_rounding()


@pytest.mark.usefixtures("small")
def test_is_an_operator_of_torch() -> None:
    weight, A, B, coefficients = arguments(shape=(6, 5))
    torch.library.opcheck(
        torch.ops.opmix_kernels.merge_deltas, (weight, A, B, coefficients, 0.7, torch.bfloat16, 5)
    )
    out = torch.empty(2, 6, 5, device=DEVICE)
    torch.library.opcheck(
        torch.ops.opmix_kernels.merge_deltas_into, (weight, A, B, coefficients, 0.7, None, out)
    )


@pytest.mark.usefixtures("small")
def test_compiled_whole() -> None:
    data = arguments(shape=(6, 5))

    def both(weight: Tensor, A: Tensor, B: Tensor, coefficients: Tensor, out: Tensor) -> Tensor:
        merge_deltas(weight, A, B, coefficients[0], scale=0.7, out=out)
        return merge_deltas(weight, A, B, coefficients, scale=0.7).sum(0) + out

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    out, other = torch.empty(6, 5, device=DEVICE), torch.empty(6, 5, device=DEVICE)
    assert torch.equal(compiled(*data, out), both(*data, other))
    assert torch.equal(out, other)


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor, Tensor], object], str]] = {
    "weight": (lambda w, a, b, u: merge_deltas(w[0], a, b, u, scale=1.0), r"weight is \(5,\)"),
    "A": (lambda w, a, b, u: merge_deltas(w, a[..., :4], b, u, scale=1.0), r"A is \(2, 3, 4\)"),
    "A of one adapter": (lambda w, a, b, u: merge_deltas(w, a[0], b, u, scale=1.0), r"A is \(3, 5\)"),
    "B": (lambda w, a, b, u: merge_deltas(w, a, b[:1], u, scale=1.0), r"B is \(1, 6, 3\)"),
    "coefficients": (lambda w, a, b, u: merge_deltas(w, a, b, u[:, :1], scale=1.0), r"are \(2, 1\)"),
    "dtype": (lambda w, a, b, u: merge_deltas(w.double(), a, b, u, scale=1.0), "weight is torch.float64"),
    "device": (lambda w, a, b, u: merge_deltas(w, a, b, u.to("meta"), scale=1.0), "coefficients is on meta"),
    "out_dtype": (lambda w, a, b, u: merge_deltas(w, a, b, u, scale=1.0, out_dtype=torch.int8), "out_dtype"),
    "out's shape": (lambda w, a, b, u: merge_deltas(w, a, b, u, scale=1.0, out=w), r"out is \(6, 5\)"),
    "out's dtype": (
        lambda w, a, b, u: merge_deltas(w, a, b, u[0], scale=1.0, out=w, out_dtype=torch.bfloat16),
        "and out is torch.float32",
    ),
    "seed": (lambda w, a, b, u: merge_deltas(w, a, b, u, scale=1.0, seed=1), "seed is 1"),
    "negative seed": (
        lambda w, a, b, u: merge_deltas(w, a, b, u, scale=1.0, seed=-1, out_dtype=torch.bfloat16),
        "seed is -1",
    ),
    "gradient": (
        lambda w, a, b, u: merge_deltas(w, a, b, u.requires_grad_(), scale=1.0),
        "coefficients requires a gradient",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_named(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call(*arguments(adapters=2, rank=3, shape=(6, 5)))


@pytest.mark.usefixtures("small")
def test_merges_without_gradients_where_none_are_asked_for() -> None:
    weight, A, B, coefficients = arguments(shape=(6, 5))
    with torch.no_grad():
        found = merge_deltas(weight, A.requires_grad_(), B, coefficients, scale=0.7)
    assert not found.requires_grad
