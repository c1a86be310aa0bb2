"""Kernels in models of every known architecture, against the model that nobody has touched, in float64.

On a machine without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

import opmix_kernels
from opmix_dist.data.batch import TokenBatch
from opmix_dist.models.compute import Compute
from opmix_dist.models.computing import tell_unknown
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.loss import sample_losses
from opmix_dist.pool.probes import train_probes
from opmix_dist.search_config import ProbeConfig
from tests.helpers import ROOT, uneven_batch
from tests.kernels.checking import DEVICE
from tests.models.test_computing import SIZES_ELSEWHERE
from tests.models.test_documents import variable_length_attention
from tests.models.tiny import ARCHITECTURES, U, adapt, build

KERNELS = Compute(torch.float32, kernels=True)
BF16 = Compute(torch.bfloat16, kernels=True)
BATCH = uneven_batch(3, 2, 12, mask_documents=True).to(DEVICE)
OPERATIONS = (
    "norm_shrink_gate", "gated_lowrank_linear", "joint_lora_linear", "linear_cross_entropy", "merge_deltas",
)  # fmt: skip


def small(model_type: str, **fields: object) -> PreTrainedModel:
    """One block; nothing else would be seen in more of them but time."""
    fields = {**SIZES_ELSEWHERE.get(model_type, {}), "num_hidden_layers": 1, **fields}
    return build(model_type, **fields).to(DEVICE)


def reference(model_type: str, adapters: JointAdapters, u: Tensor, batch: TokenBatch) -> Tensor:
    """Loss sums [B] of the untouched model in float64 with weights W + s * sum_k u_k B_k A_k.

    Differentiable in u [K] and in the adapters.
    """
    model = small(model_type).double()
    weights = {
        f"{name}.weight": model.get_submodule(name).weight.detach()
        + adapters.scale * torch.einsum("k,kor,kri->oi", u.double(), layer.B.double(), layer.A.double())
        for name, layer in adapters.layers.items()
    }
    inputs = {"input_ids": batch.tokens, "position_ids": batch.position_ids, "use_cache": False}
    logits = functional_call(model, weights, kwargs=inputs).logits.double()
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch.tokens[:, 1:], reduction="none")
    return (losses * batch.loss_mask[:, 1:]).sum(dim=1)


def references(model_type: str, adapters: JointAdapters) -> Tensor:
    """[M, B]."""
    with torch.no_grad():
        found = [reference(model_type, adapters, torch.from_numpy(u).to(DEVICE), BATCH) for u in U]
    assert (found[1] - found[0]).abs().max() > 1e-2, "the candidates do not differ: this shows nothing"
    return torch.stack(found)


@torch.no_grad()
def simulated(adapters: JointAdapters, candidates: np.ndarray = U) -> Tensor:
    """Loss sums [M, B]."""
    with adapters.simulating(torch.from_numpy(candidates)):
        return sample_losses(adapters.model, BATCH.repeat(len(candidates))).view(len(candidates), -1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each operation was called, and was given a norm."""
    found: Counter[str] = Counter()

    def counted(name: str):
        operation = getattr(opmix_kernels, name)

        def call(*arguments: object, **settings: object) -> object:
            found[name] += 1
            found["norms"] += settings.get("norm_weight") is not None
            return operation(*arguments, **settings)

        return call

    for name in OPERATIONS:
        monkeypatch.setattr(opmix_kernels, name, counted(name))
    return found


@contextmanager
def without_logits(model: PreTrainedModel) -> Iterator[None]:
    def refuse(*_: object) -> None:
        raise AssertionError("the head was called")

    handle = model.get_output_embeddings().register_forward_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


NORMS = {"olmo2": 0, "gpt_neox": 0}
"""Norms of a block that are one kernel with what reads them; 2 elsewhere."""


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_simulated_losses_are_those_of_merged_weights(model_type: str, calls: Counter[str]) -> None:
    """Four inputs of a block are read by linear layers: one kernel writes each."""
    adapters = adapt(small(model_type))
    expected = references(model_type, adapters)
    with adapters.computing(KERNELS), without_logits(adapters.model):
        found = simulated(adapters)
    assert +calls == +Counter(norm_shrink_gate=4, norms=NORMS.get(model_type, 2), linear_cross_entropy=1)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_gradients_of_coefficients(model_type: str, calls: Counter[str]) -> None:
    """Each sample's own, as a search with gradients takes them."""
    adapters = adapt(small(model_type))
    u = torch.from_numpy(U[0]).to(DEVICE).requires_grad_()
    losses = reference(model_type, adapters, u, BATCH)
    expected = torch.stack([torch.autograd.grad(x, u, retain_graph=True)[0] for x in losses])
    gates = torch.from_numpy(U[:1]).repeat(len(BATCH), 1).to(DEVICE).requires_grad_()
    with adapters.computing(KERNELS), adapters.simulating(gates), without_logits(adapters.model):
        found = sample_losses(adapters.model, BATCH)
        found.sum().backward()
    assert +calls == Counter(gated_lowrank_linear=len(adapters.layers), linear_cross_entropy=1)
    torch.testing.assert_close(found, losses, rtol=2e-6, atol=1e-6)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(gates.grad, expected, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in adapters.model.parameters())


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_joint_training(model_type: str, calls: Counter[str]) -> None:
    adapters = adapt(small(model_type))
    batch = uneven_batch(3, 3, 12, mask_documents=True).to(DEVICE)  # a sample each, the first without targets
    ones = torch.eye(3, device=DEVICE)
    losses = torch.cat([reference(model_type, adapters, ones[k], batch[k : k + 1]) for k in range(3)])
    expected = torch.autograd.grad(losses.sum(), adapters.parameters())
    with adapters.computing(KERNELS), adapters.training(), without_logits(adapters.model):
        found = sample_losses(adapters.model, batch)
        found.sum().backward()
    assert +calls == Counter(joint_lora_linear=len(adapters.layers), linear_cross_entropy=1)
    torch.testing.assert_close(found, losses, rtol=2e-6, atol=1e-6)
    for parameter, gradient in zip(adapters.parameters(), expected, strict=True):
        assert gradient[1:].abs().max() > 1e-2
        assert not parameter.grad[0].any()
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(("model_type", "compute"), [("qwen2", KERNELS), ("gpt_neox", BF16)])
def test_merging_uses_the_same_memory_for_each_candidate(
    model_type: str, compute: Compute, calls: Counter[str]
) -> None:
    adapters = adapt(small(model_type))
    weights = {name: layer.base.weight.clone() for name, layer in adapters.layers.items()}
    expected, found, places = references(model_type, adapters), [], []
    with adapters.computing(compute), torch.no_grad():
        for u in U:
            with adapters.merged(torch.from_numpy(u)):
                found.append(sample_losses(adapters.model, BATCH))
            places.append({t.data_ptr() for t in adapters.products._merged.values()})
        untouched = simulated(adapters, np.zeros((1, 3)))
        assert not adapters.products._merged, "memory that nothing uses"
        assert torch.allclose(sample_losses(adapters.model, BATCH), untouched[0], rtol=1e-5)
    assert calls["merge_deltas"] == len(U) * len(adapters.layers)
    assert places[0] == places[1] == places[2]
    rtol = 2e-6 if compute.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(torch.stack(found), expected, rtol=rtol, atol=1e-6)
    for name, layer in adapters.layers.items():
        assert torch.equal(layer.base.weight, weights[name])


@pytest.mark.parametrize("model_type", ["qwen3", "olmo2", "gpt_neox", "cohere"])
def test_bfloat16(model_type: str) -> None:
    adapters = adapt(small(model_type))
    with adapters.computing(BF16):
        found = simulated(adapters)
    error = (found - references(model_type, adapters)).abs().max() / found.abs().max()
    assert 1e-6 < error < 5e-3


def test_a_layer_that_is_given_something_else_computes_it_from_that() -> None:
    """The norm's result is known by identity: an equal tensor in another place is another input."""
    adapters = adapt(small("llama"))
    block = adapters.model.model.layers[0]
    attention, norm = block.self_attn, block.input_layernorm
    x, other = (torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in (1, 2))
    with torch.no_grad(), adapters.simulating(torch.from_numpy(U)):
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        expected = [layer(norm(x)) for layer in layers] + [attention.q_proj(other)]
    with adapters.computing(KERNELS), torch.no_grad(), adapters.simulating(torch.from_numpy(U)):
        normed = norm(x)
        first, another = attention.q_proj(normed), attention.q_proj(other)
        found = [first, attention.k_proj(normed), attention.v_proj(normed.clone()), another]
    for one, right in zip(found, expected, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-5)


def test_adapters_that_were_trained_are_simulated_as_they_are_now() -> None:
    adapters = adapt(small("llama"))
    with adapters.computing(KERNELS):
        before = simulated(adapters)
        with adapters.training(), torch.no_grad():
            for parameter in adapters.parameters():
                parameter.mul_(0.5)
        after = simulated(adapters)
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, references("llama", adapters), rtol=2e-6, atol=1e-6)


def test_dropout_goes_by_step_and_by_the_adapters_own_seed() -> None:
    def losses(names: list[str], seeds: list[int], step: int) -> Tensor:
        adapters = JointAdapters(small("llama"), names, rank=3, alpha=6, dropout=0.5, seeds=seeds)
        for layer in adapters.layers.values():
            layer.B.data.fill_(0.1)
        adapters.dropout_step = step
        with adapters.computing(KERNELS), adapters.training(), torch.no_grad():
            return sample_losses(adapters.model, BATCH[1:].repeat(len(names)))

    both = losses(["a", "b"], [5, 6], 3)
    assert torch.equal(both, losses(["a", "b"], [5, 6], 3))
    torch.testing.assert_close(both[1:], losses(["b"], [6], 3), rtol=1e-6, atol=0)
    assert not torch.isclose(both[0], both[1], rtol=1e-4)
    assert not torch.isclose(losses(["b"], [6], 4), both[1:], rtol=1e-4).any()


def test_rows_one_behind_the_other_as_flash_attention_takes_them() -> None:
    AttentionInterface.register("flash_reference", variable_length_attention)
    AttentionMaskInterface.register("flash_reference", lambda *_, **__: None)
    adapters = adapt(small("llama", attention="flash_reference"))
    expected = references("llama", adapters)
    with adapters.computing(KERNELS):
        torch.testing.assert_close(simulated(adapters), expected, rtol=2e-6, atol=1e-6)


def test_an_unknown_architecture_keeps_its_norms_and_its_head(
    calls: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Cohere scales its logits, and its attention and MLP read one norm's output."""
    adapters = adapt(small("cohere"))
    tell_unknown.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with adapters.computing(KERNELS):
                pass
    assert caplog.text.count("CohereForCausalLM is no architecture whose norms and LM head are known") == 1
    with adapters.computing(KERNELS):
        found = simulated(adapters)
    assert +calls == Counter(norm_shrink_gate=len(adapters.layers))
    torch.testing.assert_close(found.double(), references("cohere", adapters), rtol=2e-6, atol=1e-6)


def test_everything_is_given_back() -> None:
    adapters = adapt(small("qwen3"))
    with torch.no_grad():
        expected = sample_losses(adapters.model, BATCH)
    with adapters.computing(BF16):
        simulated(adapters)
    with torch.no_grad():
        assert torch.equal(sample_losses(adapters.model, BATCH), expected)
    for module in adapters.model.modules():
        assert not module._forward_hooks
        assert "forward" not in vars(module)


def test_probes_equal_those_of_plain_torch() -> None:
    def trained(compute: Compute) -> tuple[JointAdapters, dict[str, list[float]]]:
        def stream(seed: int) -> Iterator[TokenBatch]:
            return (uneven_batch(seed + i, 2, 12, mask_documents=True) for i in range(9))

        return train_probes(
            small("llama"),
            {"old": stream(1), "code": stream(100)},
            ProbeConfig(steps=3, batch_size=2, rank=3, alpha=6, dropout=0.0),
            base_lr=5e-3,
            betas=(0.9, 0.95),
            seeds={"old": 1, "code": 2},
            compute=compute,
        )

    (plain, expected), (kernels, found) = trained(Compute()), trained(KERNELS)
    for name, curve in expected.items():
        assert found[name] == pytest.approx(curve, rel=1e-5)
        assert curve[-1] != pytest.approx(curve[0], rel=1e-3)
    for one, other in zip(plain.parameters(), kernels.parameters(), strict=True):
        torch.testing.assert_close(other, one, atol=2e-4, rtol=0)  # Adam's first steps are signs
    assert type(kernels.products) is type(plain.products), "kernels were left on"


CANNOT = """
import sys, torch
from opmix_dist.errors import UserError
from opmix_dist.models.compute import load_kernels
assert "triton" not in sys.modules, "imported before anybody asked for it"
for missing in (True, False):
    if missing:
        sys.modules["triton"] = None
    else:
        del sys.modules["triton"]
    try:
        load_kernels(torch.device("cpu"))
    except UserError as error:
        print(error)
"""


def test_kernels_that_cannot_run_are_an_error_that_names_the_setting() -> None:
    """Without Triton, and on a CPU outside of the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CANNOT], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("search.kernels: ")
    assert "triton" in first
    assert second.startswith("search.kernels: Triton kernels need a GPU, and this rank computes on cpu")
    assert second.endswith("Set it to torch")
