"""linear_cross_entropy against float64: losses as precise as float32 in any dtype, gradients as the dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opmix_kernels import cross_entropy, linear_cross_entropy
from opmix_kernels.cross_entropy import COMBINE, PARTIALS, PARTIALS_TILED, PROBABILITIES, PROBABILITIES_TILED
from opmix_kernels.runtime import Config, Kernel
from tests.kernels.checking import DEVICE, assert_close, broken, poisoned_memory, random

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]
IGNORED = -100

Data = tuple[Tensor, Tensor, Tensor]


@contextmanager
def tiles(config: Config) -> Iterator[None]:
    """Tiles of this configuration, and partial results combined two at a time."""
    with ExitStack() as stack:
        for kernel in (PARTIALS, PARTIALS_TILED, PROBABILITIES, PROBABILITIES_TILED):
            stack.enter_context(kernel.using(config))
        stack.enter_context(COMBINE.using(Config({"BR": 16, "BT": 2}, warps=1, stages=1)))
        yield


SMALL = Config({"BR": 16, "BV": 32, "BD": 16, "GROUP": 2}, warps=1, stages=1)
WIDE = Config({"BR": 32, "BV": 16, "BD": 32, "GROUP": 3}, warps=2, stages=2)


@pytest.fixture
def small() -> Iterator[None]:
    with tiles(SMALL):
        yield


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices whose rows begin at 16 bytes are read through tensor descriptors, as on sm_90."""
    monkeypatch.setattr(cross_entropy, "architecture_of", lambda device: "sm_90")


def data(
    dtype: torch.dtype = torch.float32, rows: int = 21, words: int = 70, width: int = 24, seed: int = 0
) -> Data:
    """Logits spread over some +-6, a third of the targets in the last words, two rows ignored."""
    hidden = random(rows, width, dtype=dtype, seed=seed)
    weight = random(words, width, dtype=dtype, seed=seed + 1, scale=2 / width**0.5)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, words, (rows,), generator=generator)
    targets[::3] = words - 1
    targets[1 : 1 + 4 : 3] = IGNORED
    return hidden, weight, targets.to(DEVICE)


def gradient_of(losses: Tensor, hidden: Tensor) -> Tensor:
    """Of a weighted sum whose weights are no powers of two."""
    weights = torch.linspace(-1.0, 2.3, losses.numel(), device=losses.device).view(losses.shape)
    return torch.autograd.grad((losses * weights).sum(), hidden)[0]


def expected(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORED
) -> tuple[Tensor, Tensor]:
    """Losses and gradient in float64."""
    exact = hidden.detach().double().requires_grad_()
    losses = cross_entropy.reference(exact, weight.double(), targets, ignore_index)
    return losses.detach(), gradient_of(losses, exact)


def check(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORED) -> None:
    hidden = hidden.detach().requires_grad_()
    exact_losses, exact_gradient = expected(hidden, weight, targets, ignore_index)
    ignored = targets == ignore_index
    with poisoned_memory():
        losses = linear_cross_entropy(hidden, weight, targets, ignore_index=ignore_index)
    assert losses.dtype == torch.float32
    # inputs are exact and the softmax is float32 in every dtype
    assert_close(losses, exact_losses, torch.float32, "losses")
    assert not losses[ignored].any()
    with poisoned_memory():
        gradient = gradient_of(losses, hidden)
    assert gradient.dtype == hidden.dtype
    assert_close(gradient, exact_gradient, weight.dtype, "gradient")
    assert not gradient[ignored].any()


def test_the_example_by_hand() -> None:
    hidden = torch.ones(1, 1, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(4.0)]], device=DEVICE)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1], device=DEVICE))
    assert loss.item() == pytest.approx(math.log(5.0) - math.log(4.0), rel=1e-6)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.item() == pytest.approx((4 / 5 - 1) * math.log(4.0), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(dtype: torch.dtype) -> None:
    check(*data(dtype, rows=131, words=130, width=70))  # with the shipped tiles
    for config in (SMALL, WIDE):
        with tiles(config):
            check(*data(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("described")
def test_equals_float64_through_descriptors(dtype: torch.dtype) -> None:
    for config in (SMALL, WIDE):
        with tiles(config):
            check(*data(dtype))
    with tiles(PARTIALS_TILED.shipped["sm_90"][2][0]):
        check(*data(dtype, rows=131, words=260, width=72))


@pytest.mark.usefixtures("small")
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(8, 34),  # of two or three rows, all losses may be near 0: differences of large logits
    words=st.integers(2, 70),
    width=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_every_shape(rows: int, words: int, width: int, dtype: torch.dtype, seed: int) -> None:
    check(*data(dtype, rows, words, width, seed))


@pytest.mark.usefixtures("small")
def test_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_MULTIPLE", 16)
    monkeypatch.setattr(cross_entropy, "PARTIALS_BYTES", 0)
    monkeypatch.setattr(cross_entropy, "PROBABILITIES_BYTES", 0)
    assert cross_entropy.forward_chunk(21, 70, 32) == cross_entropy.backward_chunk(21, 70, 4) == 16
    check(*data())


def test_scratch_is_bounded() -> None:
    """2^16 rows, and more than any batch has, over vocabularies of 128k and 256k words."""
    sizes = (65_536, 128_256, 128)
    assert cross_entropy.forward_scratch_bytes(*sizes) == 8 * 1002 * 65_536 + 4 * 65_536 < 2**29 + 2**20
    assert cross_entropy.forward_scratch_bytes(65_536, 128_256, 256) < 2**28 + 2**20
    assert cross_entropy.forward_scratch_bytes(10**7, 256_000, 128) < 10**9
    assert (
        cross_entropy.backward_chunk(65_536, 128_256, 2) == 16 * 128
    )  # 512 MiB over 128,256 words of 2 bytes
    assert cross_entropy.backward_chunk(65_536, 256_000, 4) == 4 * 128
    assert cross_entropy.backward_chunk(5, 256_000, 4) == 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small")
def test_a_row_does_not_depend_on_others(dtype: torch.dtype) -> None:
    hidden, weight, targets = data(dtype)
    together = linear_cross_entropy(hidden, weight, targets)
    order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    assert torch.equal(linear_cross_entropy(hidden[order], weight, targets[order]), together[order])
    for rows in (slice(0, 1), slice(11, 21)):
        assert torch.equal(linear_cross_entropy(hidden[rows], weight, targets[rows]), together[rows])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("factor", [1e-6, 1e4])
@pytest.mark.usefixtures("small")
def test_precision_of_the_gradient(dtype: torch.dtype, factor: float) -> None:
    """Relative root mean square; rounded in three places by up to 2^-9, 2^-12 in float16."""
    hidden, weight, targets = data(dtype, words=200)
    hidden = hidden.float().requires_grad_()
    gradient = gradient_of(linear_cross_entropy(hidden, weight, targets) * factor, hidden)
    exact = expected(hidden, weight, targets)[1] * factor
    error = (gradient.double() - exact).norm() / exact.norm()
    assert error < (5e-4 if dtype == torch.float16 else 4e-3)


@pytest.mark.usefixtures("small")
def test_hidden_in_float32_is_cast_to_the_head() -> None:
    hidden, weight, targets = data(torch.bfloat16)
    wide = (hidden.float() * (1 + 2**-12)).requires_grad_()  # rounds to the same bfloat16
    losses = linear_cross_entropy(wide, weight, targets)
    assert torch.equal(losses, linear_cross_entropy(hidden, weight, targets))
    assert gradient_of(losses, wide).dtype == torch.float32


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.usefixtures("small")
def test_strides(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "architecture_of", lambda device: architecture)
    hidden, weight, targets = data(torch.bfloat16, rows=18)
    sequences, words = hidden.view(2, 9, 24), targets.view(2, 9)
    check(sequences[:, :-1], weight, words[:, 1:])  # the next token's
    check(hidden[:, 1:17], weight[:, 3:19], targets)  # rows that begin anywhere
    check(hidden[::2], weight[::3], targets[::2].clamp(max=23))
    check(hidden.T.contiguous().T, weight.T.contiguous().T, targets)
    check(hidden[:1].expand(18, 24), weight, targets)
    check(hidden[0], weight, targets[0])


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.usefixtures("small")
def test_few_rows(rows: int) -> None:
    hidden, weight, targets = data()
    hidden = hidden[:rows].requires_grad_()
    losses = linear_cross_entropy(hidden, weight, targets[:rows])
    assert losses.shape == (rows,)
    assert gradient_of(losses, hidden).shape == (rows, 24)


@pytest.mark.usefixtures("small")
def test_a_word_may_be_what_is_ignored() -> None:
    hidden, weight, targets = data()
    check(hidden, weight, targets.clamp(min=0), ignore_index=69)


@pytest.mark.usefixtures("small")
def test_ignored_rows_may_hold_anything() -> None:
    hidden, weight, targets = data(torch.bfloat16)
    hidden[1], hidden[4] = math.nan, math.inf
    assert (targets[[1, 4]] == IGNORED).all()
    hidden.requires_grad_()
    losses = linear_cross_entropy(hidden, weight, targets)
    gradient = gradient_of(losses, hidden)
    assert losses.isfinite().all()
    assert not losses[[1, 4]].any()
    assert gradient.isfinite().all()
    assert not gradient[[1, 4]].any()


@pytest.mark.parametrize("target", [-1, 70, 95, 2**32 + 3])
@pytest.mark.usefixtures("small")
def test_a_target_that_is_no_word_makes_its_row_nan(target: int) -> None:
    hidden, weight, targets = data()
    right = expected(hidden, weight, targets)
    targets[7] = target
    hidden.requires_grad_()
    losses = linear_cross_entropy(hidden, weight, targets)
    gradient = gradient_of(losses, hidden)
    others = torch.arange(21, device=DEVICE) != 7
    assert losses[7].isnan()
    assert gradient[7].isnan().all()
    assert_close(losses[others], right[0][others], torch.float32)
    assert_close(gradient[others], right[1][others], torch.float32)


@pytest.mark.usefixtures("small")
def test_logits_that_are_not_finite_give_what_cross_entropy_gives() -> None:
    """The logits are weight * h, so that words have +inf, -inf or NaN; tiles have 32 words."""
    weight = torch.linspace(-2, 2, 100, device=DEVICE)[:, None].repeat(1, 2)
    weight[:, 1] = 0.0
    cases: list[Tensor] = []
    for words in (slice(40, 41), slice(32, 64), slice(0, 64), slice(0, 100)):
        cases += [weight.clone() for _ in range(2)]
        cases[-2][words, 1] = math.inf
        cases[-1][words, 1] = math.nan
    hidden = torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.5, 0.0]], device=DEVICE)
    seen = set()
    for word in (40, 99):
        targets = torch.full((3,), word, device=DEVICE)
        for case in cases:
            right = cross_entropy.reference(hidden.double(), case.double(), targets)
            found = linear_cross_entropy(hidden, case, targets)
            torch.testing.assert_close(found.double(), right, equal_nan=True)
            seen |= {str(value) for value in right.tolist() if not math.isfinite(value)}
    assert seen == {"nan", "inf"}


def apart(values: Tensor, stride: int) -> Tensor:
    """The rows so many elements from each other; only pages that are touched exist."""
    storage = torch.empty((len(values) - 1) * stride + values.shape[1], dtype=values.dtype, device=DEVICE)
    view = storage.as_strided(values.shape, (stride, 1))
    view.copy_(values)
    return view


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.usefixtures("small")
def test_places_beyond_2_to_the_31(which: int) -> None:
    hidden, weight, targets = data(torch.bfloat16, rows=3, words=3, width=5)
    matrices = [hidden, weight]
    matrices[which] = apart(matrices[which], 2**30 + 2**29)
    check(*matrices, targets)


@pytest.mark.usefixtures("small")
def test_probabilities_beyond_2_to_the_31() -> None:
    hidden, weight, targets = data(torch.bfloat16, rows=3, words=5, width=16)
    targets = targets.clamp(min=0)
    logits = hidden.double() @ weight.double().T
    out = apart(torch.zeros(3, 5, dtype=torch.bfloat16, device=DEVICE), 2**30 + 2**29)
    _, operands = cross_entropy._operands(PROBABILITIES, PROBABILITIES_TILED, hidden, weight)
    PROBABILITIES(
        **operands, TARGETS=targets, LSE=logits.logsumexp(1).float(),
        OUT=out, out_row=out.stride(0), ignore_index=IGNORED,
    )  # fmt: skip
    onehot = torch.nn.functional.one_hot(targets, 5)
    assert_close(out.clone(), logits.softmax(1) - onehot, torch.bfloat16)


TELLING = (37, 70, 24)
"""Three tiles of rows in groups of two; the last ones of words and of the width are not full."""


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        (PARTIALS, "if first + BV > V:", "if first + BV > V + 40:"),
        (PARTIALS, "tl.arange(0, BV) < V)", "tl.arange(0, BV) < V + 1)"),
        (PARTIALS, " - base[:, None]", ""),
        (PARTIALS, "offset(word_block, R)", "offset(word_block, R - 1)"),
        (PARTIALS, "(target - first)", "(target - first + 1)"),
        (PARTIALS, "here = (target >= first)", "here = (target > first + 3)"),
        (PARTIALS, "tl.sum(tl.exp2", "1.0001 * tl.sum(tl.exp2"),
        (COMBINE, "tl.log2(total)", "tl.log2(total * 1.0001)"),
        (COMBINE, "z * tl.exp2(a - largest[None, :])", "z"),
        (COMBINE, "target == ignore_index", "target == ignore_index - 1"),
        (COMBINE, "lse - chosen", "lse"),
        (COMBINE, "tl.minimum(rows, R - 1)", "tl.minimum(rows, R - 2)"),
        (COMBINE, "z = tl.load(SUMS + at, mask=(tiles < TILES)", "z = tl.load(SUMS + at, mask=(tiles < 2)"),
        (PROBABILITIES, "values - 1.0", "values - 1.001"),
        (PROBABILITIES, " - lse[:, None]", ""),
        (PROBABILITIES, "words[None, :] == target", "words[None, :] == 1 + target"),
        (PROBABILITIES, "offset(rows, out_row)", "offset(rows // 2, out_row)"),
        (PROBABILITIES, "(words < V)", "(words < V - 1)"),
    ],
)
@pytest.mark.usefixtures("small")
def test_a_broken_copy_fails(kernel: Kernel, old: str, new: str) -> None:
    with broken(kernel, old, new), pytest.raises(AssertionError):
        check(*data(torch.float32, *TELLING))


@pytest.mark.usefixtures("small")
def test_ignored_rows_spread_what_they_hold_in_a_broken_copy() -> None:
    with (
        broken(PROBABILITIES, "(target == ignore_index)", "(target == ignore_index - 1)"),
        pytest.raises(AssertionError),
    ):
        test_ignored_rows_may_hold_anything()


@pytest.mark.parametrize(
    ("part", "old", "new"),
    [
        ("_logits", "start + ks < D", "start + ks < D - 1"),
        ("_logits", "total = dot(h, e, total)", "total = dot(h, e, total * 1.0001)"),
        ("_logits", "(words < V)", "(words < V - 1)"),
        ("_logits", "ks[:, None]", "ks[:, None] // 2"),
        ("_tile_of_program", "% size", "% GROUP"),
        ("_tile_of_program", "first, GROUP)", "first, GROUP + 1)"),
        ("_tile_of_program", "// in_group * GROUP", "// in_group"),
    ],
)
@pytest.mark.usefixtures("small")
def test_a_copy_with_a_broken_part_fails(
    part: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_broken_part(PARTIALS, part, old, new, monkeypatch), pytest.raises(AssertionError):
        check(*data(torch.float32, *TELLING))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("H.load([row_block * BR, start])", "H.load([row_block * BR, 0])"),
        ("E.load([word_block * BV, start])", "E.load([word_block * BV + 1, start])"),
    ],
)
@pytest.mark.usefixtures("small", "described")
def test_a_copy_with_broken_descriptors_fails(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_broken_part(PARTIALS_TILED, "_logits", old, new, monkeypatch), pytest.raises(AssertionError):
        check(*data(torch.bfloat16, *TELLING))


def test_what_breaks_broken_copies_passes_unbroken(monkeypatch: pytest.MonkeyPatch) -> None:
    with tiles(SMALL), a_broken_part(PARTIALS, "_logits", "start + ks < D", "start + ks < D", monkeypatch):
        check(*data(torch.float32, *TELLING))


@contextmanager
def a_broken_part(
    kernel: Kernel, part: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """``kernel`` runs as a copy that calls a broken copy of a function that it is made of."""
    made_of: Any = SimpleNamespace(name=part, fn=getattr(cross_entropy, part))  # no kernel to be tuned
    with broken(made_of, old, new), monkeypatch.context() as patch:
        patch.setattr(cross_entropy, part, made_of.fn)
        with broken(kernel, "def ", "def "):
            yield


class Forbidding(TorchDispatchMode):
    """AssertionError where the host would wait for the device, or a shape would depend on data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique")
        assert not any(name in str(func).split(".") for name in waits), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("small")
def test_nothing_waits_for_the_device() -> None:
    hidden, weight, targets = data()
    with Forbidding():
        losses, lse = cross_entropy.losses_and_lse(hidden, weight, targets, IGNORED)
        cross_entropy.hidden_gradient(torch.ones_like(losses), hidden, weight, targets, lse, IGNORED)
        with pytest.raises(AssertionError, match="waits"):
            losses.sum().item()


@pytest.mark.usefixtures("small")
def test_is_an_operator_of_torch() -> None:
    hidden, weight, targets = data(torch.bfloat16, rows=5, words=9, width=8)
    operators = torch.ops.opmix_kernels
    arguments = (hidden.requires_grad_(), weight, targets, IGNORED)
    torch.library.opcheck(operators.linear_cross_entropy, arguments)
    with torch.no_grad():
        losses, lse = operators.linear_cross_entropy(*arguments)
    torch.library.opcheck(
        operators.linear_cross_entropy_backward,
        (torch.ones_like(losses), hidden.detach(), weight, targets, lse, IGNORED),
    )


@pytest.mark.usefixtures("small")
def test_compiled_whole() -> None:
    hidden, weight, targets = data(torch.bfloat16, rows=12, words=40, width=24)
    sequences, words = hidden.view(3, 4, 24), targets.view(3, 4)

    def mean(hidden: Tensor, weight: Tensor, words: Tensor) -> Tensor:
        return linear_cross_entropy((hidden * 1.5)[:, :-1], weight, words[:, 1:]).mean()

    compiled = torch.compile(mean, fullgraph=True, backend="aot_eager")
    results = []
    for function in (mean, compiled):
        leaf = sequences.detach().requires_grad_()
        loss = function(leaf, weight, words)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], object], str]] = {
    "vector": (lambda h, w, t: linear_cross_entropy(h, w[0], t), r"weight is \[24\]"),
    "no words": (lambda h, w, t: linear_cross_entropy(h, w[:0], t), r"weight is \[0, 24\]"),
    "dtype": (lambda h, w, t: linear_cross_entropy(h, w.double(), t), "weight is .* torch.float64"),
    "width": (lambda h, w, t: linear_cross_entropy(h[:, 1:], w, t), r"hidden is \[21, 23\] .*\[..., 24\]"),
    "scalar": (lambda h, w, t: linear_cross_entropy(h[0, 0], w, t), r"hidden is \[\]"),
    "whole": (lambda h, w, t: linear_cross_entropy(h.long(), w, t), "hidden is .* torch.int64"),
    "count": (lambda h, w, t: linear_cross_entropy(h, w, t[1:]), r"targets is \[20\]"),
    "int32": (lambda h, w, t: linear_cross_entropy(h, w, t.int()), "targets is .* torch.int32"),
    "device": (lambda h, w, t: linear_cross_entropy(h, w.to("meta"), t), "weight is on meta"),
    "gradient": (
        lambda h, w, t: linear_cross_entropy(h, w.requires_grad_(), t),
        "weight requires a gradient",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_named(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call(*data())


@pytest.mark.usefixtures("small")
def test_a_head_that_trains_is_a_constant_without_gradients() -> None:
    hidden, weight, targets = data()
    with torch.no_grad():
        losses = linear_cross_entropy(hidden, weight.requires_grad_(), targets)
    assert_close(losses, expected(hidden, weight.detach(), targets)[0], torch.float32)
