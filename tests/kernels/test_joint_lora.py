"""joint_lora_linear and its gradients against float64: dtypes, groups, dropout, strides, graphs of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opmix_dist.models.joint_linear import add_joint
from opmix_kernels import joint_lora
from opmix_kernels.dropout import inverse_keep_rate, keep_mask, threshold_of
from opmix_kernels.grouped import EXPAND, OUTER, SHRINK
from opmix_kernels.joint_lora import joint_lora_linear, reference
from opmix_kernels.runtime import Config
from tests.kernels.checking import DEVICE, NoWaiting, assert_close, poisoned_memory, random

SMALL = Config({"BR": 16, "BD": 32}, warps=1, stages=1)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEEDS = torch.tensor([3, -5, 1 << 40], device=DEVICE)
OFFSETS = torch.tensor([0, 21, 21, 47], device=DEVICE)
DROPOUT: dict[str, Any] = {"dropout": 0.3, "seeds": SEEDS, "step": 4}


@pytest.fixture(params=[None, SMALL], ids=str)
def tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    with ExitStack() as stack:
        for kernel in (SHRINK, EXPAND, OUTER) if request.param else ():
            stack.enter_context(kernel.using(request.param))
        yield


def arguments(
    dtype: torch.dtype = torch.float32, adapter_dtype: torch.dtype | None = None, rows: int = 51
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [rows, 43], weight [29, 43], A [3, 5, 43], B [3, 29, 5]."""
    return (
        random(rows, 43, dtype=dtype).requires_grad_(),
        random(29, 43, dtype=dtype, seed=1),
        random(3, 5, 43, dtype=adapter_dtype or dtype, seed=2).requires_grad_(),
        random(3, 29, 5, dtype=adapter_dtype or dtype, seed=3).requires_grad_(),
    )


def results(y: Tensor, inputs: tuple[Tensor, ...], gradient: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(y, inputs, gradient)
    return {"y": y.detach(), **dict(zip(("dx", "dA", "dB"), gradients, strict=True))}


def check(data: tuple[Tensor, Tensor, Tensor, Tensor], **options: Any) -> dict[str, Tensor]:
    """All results against float64 ones of the values that the kernels get: A and B in the weight's dtype."""
    x, weight, A, B = data
    gradient = random(*x.shape[:-1], len(weight), dtype=weight.dtype, seed=4)
    with poisoned_memory():
        y = joint_lora_linear(*data, scale=0.7, **options)
        found = results(y, (x, A, B), gradient)
    exact = [t.detach().to(weight.dtype).double().requires_grad_() for t in (x, A, B)]
    if "bias" in options:
        options["bias"] = options["bias"].double()
    y = reference(exact[0], weight.double(), exact[1], exact[2], scale=0.7, **options)
    for name, expected in results(y, tuple(exact), gradient.double()).items():
        assert_close(found[name], expected, weight.dtype, name)
    assert [found[n].dtype for n in ("y", "dx", "dA", "dB")] == [weight.dtype, x.dtype, A.dtype, B.dtype]
    return found


def test_by_hand() -> None:
    x, weight = torch.ones(2, 1, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    A, B = (torch.tensor(values, device=DEVICE).view(2, 1, 1) for values in ([2.0, 4.0], [3.0, 5.0]))
    assert joint_lora_linear(x, weight, A, B, scale=0.5).flatten().tolist() == [4, 11]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(dtype: torch.dtype) -> None:
    """An adapter without rows, rows without an adapter, dropout, a bias."""
    bias = random(29, dtype=dtype, seed=5)
    found = check(arguments(dtype), offsets=OFFSETS, bias=bias, **DROPOUT)
    assert (found["dA"][1] == 0).all()
    assert (found["dB"][1] == 0).all()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("tiles", [SMALL], indirect=True)
def test_equal_groups() -> None:
    check(arguments())


def test_adapters_in_float32_beside_a_base_in_16_bits() -> None:
    """Gradients are rounded once, to float32: much nearer than bfloat16 could be, as A and B have one row."""
    x, weight, _, _ = arguments(torch.bfloat16)
    A, B = random(3, 1, 43, seed=2).requires_grad_(), random(3, 29, 1, seed=3).requires_grad_()
    check((x, weight, A, B), **DROPOUT)
    gradient = torch.zeros(51, 29, dtype=torch.bfloat16, device=DEVICE)
    gradient[0], gradient[1] = 1, 2.0**-12  # h in bfloat16 is what dB sums
    (dB,) = torch.autograd.grad(joint_lora_linear(x, weight, A, B, scale=1.0), B, gradient)
    h = (x.double() @ A[0].to(torch.bfloat16).double().T).to(torch.bfloat16).double()
    expected = (h[0] + h[1] * 2.0**-12).float()
    assert torch.allclose(dB[0].flatten(), expected.expand(29), rtol=1e-6, atol=0)


def test_input_in_another_dtype() -> None:
    x, weight, A, B = arguments(torch.bfloat16)
    x = x.detach().float().requires_grad_()
    assert check((x, weight, A, B))["dx"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["transposed", "sliced", "three dimensions"])
def test_strides(kind: str) -> None:
    x, *others = arguments()
    x = x.detach()
    if kind == "transposed":
        x = x.T.contiguous().T
    elif kind == "sliced":
        x = random(51, 60)[:, 10:53]
    else:
        x = random(17, 3, 43).transpose(0, 1)
    others[1] = others[1].detach().mT.contiguous().mT.requires_grad_()
    check((x.requires_grad_(), *others))


def test_an_expanded_gradient() -> None:
    x, weight, A, B = arguments()
    found = torch.autograd.grad(joint_lora_linear(x, weight, A, B, scale=0.7).sum(), (x, A, B))
    expected = torch.autograd.grad(reference(x, weight, A, B, scale=0.7).sum(), (x, A, B))
    for f, e in zip(found, expected, strict=True):
        assert_close(f, e, torch.float32)


def test_reference_is_the_models_layer() -> None:
    x, weight, A, B = arguments()
    y = add_joint(x @ weight.T, x, A, B, 0.7, nn.Identity())
    assert_close(reference(x, weight, A, B, scale=0.7), y, torch.float32)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("tiles", [SMALL], indirect=True)
def test_every_mask_is_the_same() -> None:
    """With identities for A and B and zeros for W, results are the mask itself: forward, to x, and to A."""
    eye, rows = torch.eye(40, device=DEVICE), 60
    x = torch.ones(rows, 40, device=DEVICE).requires_grad_()
    A, B = (eye.repeat(3, 1, 1).requires_grad_() for _ in range(2))
    y = joint_lora_linear(x, torch.zeros_like(eye), A, B, scale=2.0, **DROPOUT)
    dx, dA = torch.autograd.grad(y, (x, A), torch.ones_like(y))
    kept = keep_mask(SEEDS, 4, 20, 40, 0.3).float() * (2.0 * inverse_keep_rate(threshold_of(0.3)))
    assert torch.equal(y.view(3, 20, 40), kept)
    assert torch.equal(dx.view(3, 20, 40), kept)
    assert_close(dA, kept.sum(dim=1)[:, None, :].expand(3, 40, 40), torch.float32)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("tiles", [SMALL], indirect=True)
def test_an_adapter_does_not_depend_on_others() -> None:
    x, weight, A, B = arguments()
    weight = torch.zeros_like(weight)  # whose product a library may sum otherwise for other rows
    gradient = random(51, 29, seed=4)
    together = results(joint_lora_linear(x, weight, A, B, scale=0.7, **DROPOUT), (x, A, B), gradient)
    one = [t.detach().requires_grad_() for t in (x[17:34], A[1:2], B[1:2])]
    y = joint_lora_linear(one[0], weight, one[1], one[2], scale=0.7, **{**DROPOUT, "seeds": SEEDS[1:2]})
    for name, alone in results(y, tuple(one), gradient[17:34]).items():
        among = together[name]
        assert torch.equal(alone, among[17:34] if name in ("y", "dx") else among[1:2]), name


def test_steps() -> None:
    """A step in a tensor, which a graph's replay reads anew, is the same as a number; others drop others."""
    data, step = arguments(), torch.tensor(4, device=DEVICE)
    number = joint_lora_linear(*data, scale=0.7, **DROPOUT)
    assert torch.equal(joint_lora_linear(*data, scale=0.7, **{**DROPOUT, "step": step}), number)
    step += 1
    later = joint_lora_linear(*data, scale=0.7, **{**DROPOUT, "step": step})
    assert not torch.equal(later, number)
    assert torch.equal(later, joint_lora_linear(*data, scale=0.7, **{**DROPOUT, "step": 5}))


def test_nothing_waits_for_the_device() -> None:
    x, weight, A, B = arguments()
    gradient = random(51, 29, seed=4)
    with NoWaiting():
        y = joint_lora_linear(x, weight, A, B, scale=0.7, offsets=OFFSETS, **DROPOUT)
        torch.autograd.grad(y, (x, A, B), gradient)


def test_no_rows() -> None:
    x, weight, A, B = arguments(rows=0)
    y = joint_lora_linear(x, weight, A, B, scale=0.7)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), torch.ones_like(y))
    assert y.shape == (0, 29)
    assert dx.shape == (0, 43)
    assert (dA == 0).all()
    assert (dB == 0).all()


def test_only_what_is_asked_for() -> None:
    x, weight, A, B = arguments()
    y = joint_lora_linear(x.detach(), weight, A, B, scale=0.7)
    expected = reference(x.detach(), weight, A, B, scale=0.7)
    assert_close(torch.autograd.grad(y.sum(), B)[0], torch.autograd.grad(expected.sum(), B)[0], torch.float32)
    assert not joint_lora_linear(x.detach(), weight, A.detach(), B.detach(), scale=0.7).requires_grad


def test_as_operations_of_torch() -> None:
    x, weight, A, B = arguments(rows=10)
    seeds, step = SEEDS, torch.tensor(4, device=DEVICE)
    offsets, gradient, low = torch.tensor([0, 3, 3, 10], device=DEVICE), random(10, 29), random(10, 16)
    for name, given in {
        "joint_lora_linear": (x, weight, None, A, B, offsets, seeds, step, 0.7, 9000),
        "joint_lora_shrink_gradient": (gradient[:9], B.detach(), None, 0.7, 0),
        "joint_lora_input_gradient": (gradient, weight, low, A.detach(), offsets, seeds, step, 9000),
        "joint_lora_outer": (gradient, low, B.detach(), offsets, None, None, 0, False),
    }.items():
        torch.library.opcheck(getattr(torch.ops.opmix_kernels, name).default, given)


def test_compiled() -> None:
    data, gradient = arguments(), random(51, 29, seed=4)
    options = {**DROPOUT, "step": torch.tensor(4, device=DEVICE), "offsets": OFFSETS}
    compiled = torch.compile(joint_lora_linear, fullgraph=True, backend="aot_eager")
    inputs = (data[0], data[2], data[3])
    found = results(compiled(*data, scale=0.7, **options), inputs, gradient)
    for name, expected in results(joint_lora_linear(*data, scale=0.7, **options), inputs, gradient).items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(51, 42)),
        ("x", torch.zeros(50, 43)),
        ("weight", torch.zeros(29, 43, dtype=torch.float64)),
        ("weight", torch.zeros(29, 43, requires_grad=True)),
        ("A", torch.zeros(3, 0, 43)),
        ("B", torch.zeros(3, 29, 6)),
        ("bias", torch.zeros(28)),
        ("offsets", torch.zeros(3, dtype=torch.int64)),
        ("offsets", torch.zeros(4, dtype=torch.int32)),
        ("dropout", 1.0),
        ("seeds", None),
        ("seeds", torch.zeros(2, dtype=torch.int64)),
        ("step", torch.zeros(())),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: Any) -> None:
    given = dict(zip(("x", "weight", "A", "B"), arguments(), strict=True)) | {"scale": 0.7} | DROPOUT
    with pytest.raises(ValueError, match=name):
        joint_lora.joint_lora_linear(**(given | {name: value}))
