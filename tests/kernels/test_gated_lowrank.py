"""gated_lowrank_linear and each gradient against float64, and what the coefficients' gradients are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opmix_kernels import LowRankStack, gated_lowrank, gated_lowrank_linear
from opmix_kernels.runtime import Config
from opmix_kernels.shrink import SHRINK
from tests.kernels.checking import DEVICE, NoWaiting, assert_close, broken, poisoned_memory, random

SMALL = Config({"BR": 16, "BJ": 16, "BK": 16}, warps=1, stages=1)
WIDE = Config({"BR": 32, "BJ": 32, "BK": 32}, warps=2, stages=2)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WANTED = ("x", "A", "B", "coefficients")


@dataclass(frozen=True)
class Case:
    """Sizes and dtypes of one layer."""

    dtype: torch.dtype = torch.float32
    masters: torch.dtype | None = None
    """Of x, A and B, where not the weight's ``dtype``."""
    candidates: int = 2
    tokens: int = 17
    adapters: int = 3
    rank: int = 5
    shape: tuple[int, int] = (23, 19)
    bias: bool = True
    positive: bool = False
    """All numbers are: a sum of few roundings relative to a result that cancels can be any."""

    def arguments(self) -> dict[str, Any]:
        (d_out, d_in), dtype = self.shape, self.masters or self.dtype
        given = {
            "x": random(self.candidates, self.tokens, d_in, dtype=dtype),
            "weight": random(d_out, d_in, dtype=self.dtype, seed=1),
            "A": random(self.adapters, self.rank, d_in, dtype=dtype, seed=2),
            "B": random(self.adapters, d_out, self.rank, dtype=dtype, seed=3),
            "coefficients": random(self.candidates, self.adapters, seed=4),
            "bias": random(d_out, dtype=self.dtype, seed=5) if self.bias else None,
        }
        if not self.positive:
            return given
        # of few numbers, the roundings of masters to 16 bits would also count
        return {k: v if v is None else v.to(self.dtype).to(v.dtype).abs() for k, v in given.items()}

    def check(self, wanted: tuple[str, ...] = WANTED, **changes: Any) -> None:
        """Result and the wanted gradients, in their dtypes."""
        given = self.arguments() | changes
        exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}
        exact.pop("prepared", None)
        y, gradients = differentiated(gated_lowrank_linear, given, wanted, self.positive)
        expected, expected_gradients = differentiated(gated_lowrank.reference, exact, wanted, self.positive)
        assert y.dtype == self.dtype
        assert_close(y, expected, self.dtype)
        for name, found, right in zip(wanted, gradients, expected_gradients, strict=True):
            assert found.dtype == given[name].dtype
            assert_close(found, right, self.dtype, f"gradient of {name}")


def differentiated(
    layer: Callable[..., Tensor], given: dict[str, Any], wanted: tuple[str, ...], positive: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    given = given | {name: given[name].detach().requires_grad_() for name in wanted}
    with poisoned_memory():
        y = layer(**given, scale=0.7)
        upstream = random(*y.shape, dtype=torch.bfloat16, seed=6).to(y.dtype)
        upstream = upstream.abs() if positive else upstream
        return y.detach(), torch.autograd.grad(y, [given[name] for name in wanted], upstream)


@pytest.fixture
def small() -> Iterator[None]:
    with SHRINK.using(SMALL):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [None, SMALL, WIDE], ids=str)
def test_equals_float64(dtype: torch.dtype, config: Config | None) -> None:
    if config is None:
        Case(dtype).check()
        return
    with SHRINK.using(config):
        Case(dtype).check()


@settings(max_examples=10, deadline=None)
@given(
    st.builds(
        Case,
        dtype=st.sampled_from(DTYPES),
        masters=st.sampled_from([None, torch.float32]),
        candidates=st.integers(1, 4),
        tokens=st.integers(1, 20),
        adapters=st.integers(1, 4),
        rank=st.sampled_from([1, 3, 4, 16, 33]),
        shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
        bias=st.booleans(),
        positive=st.just(True),
    )
)
def test_any_sizes(case: Case) -> None:
    with SHRINK.using(WIDE):
        case.check()


@pytest.mark.parametrize(
    "wanted", [("coefficients",), ("x",), ("A",), ("B",), ("x", "coefficients"), ("A", "B")], ids=str
)
def test_any_gradients_alone(wanted: tuple[str, ...], small: None) -> None:
    Case(torch.bfloat16, masters=torch.float32).check(wanted)


def test_by_hand() -> None:
    """The example of the module's docstring."""
    one = torch.ones(1, 1, device=DEVICE)
    given = {"x": 2 * one, "A": 3 * one[None], "B": 5 * one[None], "coefficients": 0.5 * one}
    given = {name: value.requires_grad_() for name, value in given.items()}
    y = gated_lowrank_linear(weight=one, scale=10.0, **given)
    y.backward()
    assert y.item() == 152
    assert {name: value.grad.item() for name, value in given.items()} == {
        "x": 76, "A": 50, "B": 30, "coefficients": 300,
    }  # fmt: skip


def test_a_coefficient_of_zero_has_a_gradient(small: None) -> None:
    """The gradient does not depend on the coefficients, and is that of float64 at a zero too."""
    Case().check(coefficients=torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.0, -2.0]], device=DEVICE))


@pytest.mark.parametrize("wanted", [("coefficients",), ("x", "coefficients")])
def test_a_prepared_stack_gives_the_same(wanted: tuple[str, ...], small: None) -> None:
    case = Case(torch.float16, masters=torch.float32)
    given = case.arguments()
    stack = LowRankStack.build(given["weight"], given["A"], given["B"])
    case.check(wanted, prepared=stack)
    built = differentiated(gated_lowrank_linear, given, wanted)
    kept = differentiated(gated_lowrank_linear, given | {"prepared": stack, "weight": stack.weight}, wanted)
    assert torch.equal(built[0], kept[0])
    assert all(torch.equal(a, b) for a, b in zip(built[1], kept[1], strict=True))


def test_gradients_of_samples_sum_to_those_of_their_candidate(small: None) -> None:
    """One row of coefficients for each sample, all equal: as pool/candidates.py differentiates."""
    case = Case(candidates=4)
    given = case.arguments()
    u = given["coefficients"][:1]
    _, (by_sample,) = differentiated(
        gated_lowrank_linear, given | {"coefficients": u.expand(4, -1)}, ("coefficients",)
    )
    _, (whole,) = differentiated(gated_lowrank_linear, given | {"coefficients": u}, ("coefficients",))
    assert by_sample.shape == (4, 3)
    assert_close(by_sample.sum(dim=0, keepdim=True), whole, torch.float32)


def test_candidates_do_not_meet_and_runs_repeat(small: None) -> None:
    """A candidate's gradient of the coefficients has the same bits alone, beside others and again."""
    given = Case(candidates=3, tokens=40).arguments()

    def slopes(rows: slice) -> Tensor:
        some = given | {name: given[name][rows] for name in ("x", "coefficients")}
        some |= {name: value.requires_grad_(name == "coefficients") for name, value in some.items()
                 if name in ("x", "coefficients")}  # fmt: skip
        y = gated_lowrank_linear(**some, scale=0.7)
        upstream = random(3, 40, 23, seed=6)[rows]
        return torch.autograd.grad(y, some["coefficients"], upstream)[0]

    together = slopes(slice(None))
    assert torch.equal(slopes(slice(None)), together)
    for m in range(3):
        assert torch.equal(slopes(slice(m, m + 1)), together[m : m + 1])


def test_strides_of_models(small: None) -> None:
    """x a slice of a wider buffer, A and B views, the gradient of y a broadcast scalar."""
    case, given = Case(), Case().arguments()
    beside = torch.cat([given["x"], random(2, 17, 30, seed=7)], dim=2)[..., :19]
    case.check(x=beside, A=given["A"].mT.contiguous().mT, B=given["B"].repeat(2, 1, 1)[::2])
    u = given["coefficients"].requires_grad_()
    (slopes,) = torch.autograd.grad(gated_lowrank_linear(**given, scale=0.7).sum(), u)
    exact = {name: value.detach().double() for name, value in given.items()}
    exact["coefficients"].requires_grad_()
    (right,) = torch.autograd.grad(gated_lowrank.reference(**exact, scale=0.7).sum(), exact["coefficients"])
    assert_close(slopes, right, torch.float32)


def test_no_rows() -> None:
    case = Case(tokens=0)
    given = case.arguments() | {"coefficients": case.arguments()["coefficients"].requires_grad_()}
    y = gated_lowrank_linear(**given, scale=0.7)
    assert y.shape == (2, 0, 23)
    (slopes,) = torch.autograd.grad(y.sum(), given["coefficients"])
    assert slopes.tolist() == [[0.0] * 3] * 2


def test_little_is_kept_for_the_backward_pass(small: None) -> None:
    """With coefficients that need gradients, P is kept and x is not: ways to the gradients of every layer."""
    given = Case(bias=False).arguments()
    stack = LowRankStack.build(given["weight"], given["A"], given["B"])
    x = given["x"].requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        u = given["coefficients"].requires_grad_()
        gated_lowrank_linear(**given | {"x": x, "coefficients": u}, prepared=stack, scale=0.7)
    constants = {t.untyped_storage().data_ptr() for t in (given["A"], given["B"], u, stack.storage)}
    new = [t for t in kept if t.untyped_storage().data_ptr() not in constants]
    assert [t.shape for t in new] == [(34, 16)]


BREAKS = [
    ("in_rows = t < T", "in_rows = t < T - 1"),
    ("PRODUCTS + low, rounded(total", "PRODUCTS + low, rounded(total * scale"),
    ("PRODUCTS + low", "PRODUCTS + low * 0"),
    ("low = rows * (N * JP)", "low = (rows - candidate) * (N * JP)"),
    ("tl.sum(saved * total, axis=0)", "tl.sum(saved * total * 1.001, axis=0)"),
    ("tl.sum(saved * total, axis=0)", "tl.max(saved * total, axis=0)"),
    ("offset(tl.program_id(0), N * JP) + js", "offset(candidate * tiles, N * JP) + js"),
    ("a_column,\n", "a_row,\n"),
    ("(scale * gates)", "(scale * tl.abs(gates))"),
    ("in_columns = js < N * JP", "in_columns = js < N * JP - 2"),
]


@pytest.mark.parametrize(("old", "new"), BREAKS, ids=lambda text: text.strip())
def test_a_broken_copy_fails(old: str, new: str) -> None:
    with broken(SHRINK, old, new), SHRINK.using(SMALL), pytest.raises(AssertionError, match="relative"):
        Case(rank=6, shape=(19, 19)).check()


def operands(case: Case) -> tuple[Any, ...]:
    given = case.arguments()
    storage = LowRankStack.build(given["weight"], given["A"], given["B"]).storage
    wanted = [given[name].requires_grad_() for name in ("A", "B", "coefficients")]
    return given["x"].flatten(0, 1).requires_grad_(), *wanted, storage, given["bias"], 0.7, True


def test_torch_knows_the_operation(small: None) -> None:
    torch.library.opcheck(gated_lowrank._forward, operands(Case()))


def test_torch_knows_the_backward_operation(small: None) -> None:
    x, A, B, U, storage, *_ = (t.detach() if isinstance(t, Tensor) else t for t in operands(Case()))
    _, products = gated_lowrank._forward(x, A, B, U, storage, None, 0.7, True)
    for kept in (products, products[:0]):
        torch.library.opcheck(
            gated_lowrank._backward, (random(34, 23), A, B, U, storage, kept, 0.7),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_compiled_gives_the_same(small: None) -> None:
    def layer(**given: Any) -> Tensor:
        return gated_lowrank_linear(**given).relu()

    given = Case().arguments()
    eager = differentiated(layer, given, WANTED)
    compiled = differentiated(torch.compile(layer, fullgraph=True, backend="aot_eager"), given, WANTED)
    assert torch.equal(eager[0], compiled[0])
    assert all(torch.equal(a, b) for a, b in zip(eager[1], compiled[1], strict=True))


def test_the_host_does_not_wait(small: None) -> None:
    given = Case().arguments()
    wanted = [given[name].requires_grad_() for name in WANTED]
    with NoWaiting():
        torch.autograd.grad(gated_lowrank_linear(**given, scale=0.7).sum(), wanted)


def requiring(*shape: int) -> Tensor:
    return torch.zeros(*shape, requires_grad=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 17, 18)}, r"x must be \[..., 19\]"),
        ({"weight": torch.zeros(19)}, r"weight must be \[d_out, d_in\]"),
        ({"A": torch.zeros(3, 5, 18)}, r"A must be \[C, r, 19\]"),
        ({"B": torch.zeros(3, 23, 4)}, r"B must be \[3, 23, 5\]"),
        ({"bias": torch.zeros(22)}, r"bias must be \[23\]"),
        ({"coefficients": torch.zeros(2, 2)}, r"coefficients must be \[M, 3\]"),
        ({"coefficients": torch.zeros(3, 3)}, "34 rows of x are not 3 equal groups"),
        ({"x": torch.zeros(34, 19, dtype=torch.float64)}, "x must be bfloat16"),
        ({"weight": torch.zeros(23, 19, dtype=torch.float64)}, "weight must be bfloat16"),
        ({"weight": requiring(23, 19)}, "weight requires gradients"),
        ({"bias": requiring(23)}, "bias requires gradients"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_lowrank_linear(**(Case().arguments() | change), scale=1.0)


def test_a_stack_that_does_not_fit_is_named() -> None:
    given, other = Case().arguments(), Case(rank=3).arguments()
    stack = LowRankStack.build(other["weight"], other["A"], other["B"])
    with pytest.raises(ValueError, match="prepared: a stack of .* rank 3"):
        gated_lowrank_linear(**given, prepared=stack, scale=1.0)
    stack = LowRankStack.build(given["weight"], given["A"], given["B"])
    with pytest.raises(ValueError, match="A requires gradients"):
        gated_lowrank_linear(**given | {"A": given["A"].requires_grad_()}, prepared=stack, scale=1.0)
