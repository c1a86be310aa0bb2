"""Simulated models in 16 bits with a float32 residual stream, in plain torch: against float64, and against
models that are in 16 bits throughout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from opmix_dist.models.build import transformer_blocks
from opmix_dist.models.compute import FLOAT32, Compute
from opmix_dist.models.families import FAMILIES, family_of
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.loss import sample_losses
from tests.helpers import uneven_batch
from tests.models.tiny import ARCHITECTURES, U, adapt, build, plain_losses, written

BATCH = uneven_batch(3, 12, 24, mask_documents=True)
_WIDTHS = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
SIZES_ELSEWHERE = {"stablelm": _WIDTHS, "cohere": {**_WIDTHS, "logit_scale": 0.25}}
BF16 = Compute(torch.bfloat16)


@torch.no_grad()
def simulated(adapters: JointAdapters, compute: Compute, candidates: np.ndarray = U) -> Tensor:
    """Loss sums [M, B]."""
    with adapters.computing(compute), adapters.simulating(torch.from_numpy(candidates)):
        found = sample_losses(adapters.model, BATCH.repeat(len(candidates)))
    return found.view(len(candidates), -1).double()


@torch.no_grad()
def merged(adapters: JointAdapters, compute: Compute) -> Tensor:
    """Loss sums [M, B]."""
    found = []
    with adapters.computing(compute):
        for u in U:
            with adapters.merged(torch.from_numpy(u)):
                found.append(sample_losses(adapters.model, BATCH))
    return torch.stack(found).double()


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def paired(losses: Tensor) -> Tensor:
    """Each candidate against the first, per sample."""
    return losses[1:] - losses[0]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_float32_residual_stream_is_nearer_to_float64(model_type: str) -> None:
    """Losses, and what a search goes by: differences between candidates on the same tokens. Blocks add little
    to a large stream here, as in a model of some depth; OLMo 2's are normalised, so its stream is larger."""
    stream = 12.0 if model_type == "olmo2" else 3.0
    model, same = (build(model_type, num_hidden_layers=8, embedding=stream, spread=0.1) for _ in range(2))
    adapters = adapt(same, size=0.03)
    exact = torch.stack([plain_losses(written(model, adapters, u, torch.float64), BATCH) for u in U])
    low = torch.stack([plain_losses(written(model, adapters, u, torch.bfloat16), BATCH) for u in U])
    assert rms(paired(exact)) > 0.01, "the candidates do not differ: this shows nothing"
    for found in (simulated(adapters, BF16), merged(adapters, BF16)):
        assert rms(found - exact) < 0.9 * rms(low - exact)
        assert rms(paired(found - exact)) < 0.9 * rms(paired(low - exact))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_sixteen_bits_are_those_of_products_only(model_type: str, attention: str) -> None:
    """What attention and the MLP's products get is 16-bit and of one dtype, the stream and logits are not."""
    adapters = adapt(build(model_type, attention=attention))
    exact = torch.stack(
        [plain_losses(written(build(model_type), adapters, u, torch.float64), BATCH) for u in U]
    )
    seen: dict[str, set[torch.dtype]] = {"stream": set(), "product": set(), "logits": set()}
    places = {
        **dict.fromkeys(transformer_blocks(adapters.model), "stream"),
        **dict.fromkeys(adapters.layers.values(), "product"),
        adapters.model.get_output_embeddings(): "logits",
    }
    handles = [
        module.register_forward_hook(
            lambda module, _, out: seen[places[module]].add((out[0] if isinstance(out, tuple) else out).dtype)
        )
        for module in places
    ]
    found = simulated(adapters, BF16)
    for handle in handles:
        handle.remove()
    assert seen == {"stream": {torch.float32}, "product": {torch.bfloat16}, "logits": {torch.float32}}
    assert 1e-5 < rms(found - exact) / rms(exact) < 5e-3
    assert rms(merged(adapters, BF16) - exact) / rms(exact) < 5e-3


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_float32_is_what_models_compute_by_themselves(model_type: str) -> None:
    adapters = adapt(build(model_type))
    with torch.no_grad(), adapters.simulating(torch.from_numpy(U)):
        expected = sample_losses(adapters.model, BATCH.repeat(len(U))).view(len(U), -1)
    assert torch.equal(simulated(adapters, FLOAT32), expected.double())
    with torch.no_grad(), adapters.merged(torch.from_numpy(U[0])):
        expected = sample_losses(adapters.model, BATCH)
    assert torch.equal(merged(adapters, FLOAT32)[0], expected.double())


@pytest.mark.parametrize("compute", [BF16, Compute(torch.float16)])
@pytest.mark.parametrize("model_type", [*ARCHITECTURES, "stablelm"])
def test_everything_is_given_back(model_type: str, compute: Compute) -> None:
    adapters = adapt(build(model_type, **SIZES_ELSEWHERE.get(model_type, {})))
    with torch.no_grad():
        expected = sample_losses(adapters.model, BATCH)
    state = {name: tensor.clone() for name, tensor in adapters.model.state_dict().items()}
    simulated(adapters, compute)
    merged(adapters, compute)
    with torch.no_grad():
        assert torch.equal(sample_losses(adapters.model, BATCH), expected)
    for name, tensor in adapters.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert not any(module._forward_hooks for module in adapters.model.modules())


@pytest.mark.parametrize("model_type", ["qwen3", "olmo2"])
def test_gradients_of_coefficients_in_sixteen_bits(model_type: str) -> None:
    adapters = adapt(build(model_type))
    slopes = []
    for compute in (FLOAT32, BF16):
        gates = torch.from_numpy(U[:1]).repeat(len(BATCH), 1).float().requires_grad_()
        with adapters.computing(compute), adapters.simulating(gates):
            sample_losses(adapters.model, BATCH).sum().backward()
        slopes.append(gates.grad)
    assert all(p.grad is None for p in adapters.parameters())
    assert 1e-3 < rms(slopes[1] - slopes[0]) / rms(slopes[0]) < 6e-2


def test_training_in_sixteen_bits_gives_float32_gradients() -> None:
    adapters = adapt(build("olmo2"))
    gradients = []
    for compute in (FLOAT32, BF16):
        with adapters.computing(compute), adapters.training():
            sample_losses(adapters.model, BATCH).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapters.parameters()]))
        for p in adapters.parameters():
            assert p.grad is not None
            assert p.grad.dtype == torch.float32
            p.grad = None
    assert rms(gradients[1] - gradients[0]) < 5e-2 * rms(gradients[0])


def test_architectures_that_only_look_known_are_not_taken_for_known() -> None:
    """A subclass, and a head that does more, may compute anything."""
    model = build("llama")
    assert family_of(model) is FAMILIES["LlamaForCausalLM"]
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(64))
    assert family_of(model) is None
    model = build("llama")
    model.__class__ = type("LlamaForCausalLM", (type(model),), {"__module__": "elsewhere"})
    assert family_of(model) is None
    assert family_of(build("stablelm", **SIZES_ELSEWHERE["stablelm"])) is None


def test_an_unknown_architecture_computes_in_sixteen_bits_by_autocast() -> None:
    """Cohere scales its logits: that is kept."""
    sizes = SIZES_ELSEWHERE["cohere"]
    adapters = adapt(build("cohere", **sizes))
    exact = torch.stack(
        [plain_losses(written(build("cohere", **sizes), adapters, u, torch.float64), BATCH) for u in U]
    )
    assert 1e-6 < rms(simulated(adapters, BF16) - exact) / rms(exact) < 5e-3
