"""The FLOPs formula against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opmix_dist.models.flops import count_flops, num_parameters
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.loss import sample_losses
from tests.helpers import random_batch, tiny_llama

BATCH, LENGTH = 3, 24


def measured(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def rotary_angles(model) -> int:
    """What the formula leaves out, once per pass: a small product in transformers 4, none in 5."""
    return measured(lambda: model.model.rotary_emb(torch.zeros(1), torch.arange(LENGTH)[None]))


@pytest.fixture
def eager():
    model = tiny_llama()
    model.set_attn_implementation("eager")  # the counter sees plain matrix products
    return model


def test_forward_and_training_flops(eager) -> None:
    counts = count_flops(eager, LENGTH)
    batch = random_batch(0, BATCH, LENGTH)
    forward = measured(lambda: sample_losses(eager, batch))
    assert forward == counts.forward * batch.tokens.numel() + rotary_angles(eager)
    whole_step = measured(lambda: sample_losses(eager, batch).sum().backward())
    assert whole_step == pytest.approx(counts.train(recompute=False) * batch.tokens.numel(), rel=0.01)


def test_probe_flops(eager) -> None:
    counts = count_flops(eager, LENGTH, lora_rank=8)
    adapters = JointAdapters(eager, ["a", "b", "c"], rank=8, alpha=16, seeds=[0, 1, 2])
    batch = random_batch(0, BATCH, LENGTH)
    with adapters.training():
        whole_step = measured(lambda: sample_losses(eager, batch).sum().backward())
    # attention's backward is 2x its forward also under a frozen base: a few per cent more than the formula
    assert whole_step == pytest.approx(counts.probe() * batch.tokens.numel(), rel=0.1)
    with adapters.simulating(torch.eye(3)), torch.no_grad():
        simulated = measured(lambda: sample_losses(eager, batch))
    assert simulated == counts.lowrank_candidate(3) * batch.tokens.numel() + rotary_angles(eager)


def test_parameters_of_a_hand_counted_model() -> None:
    attention, mlp, norms = 32 * 32 + 2 * 32 * 16 + 32 * 32, 3 * 32 * 48, 2 * 32
    blocks = 2 * (attention + mlp + norms) + 32
    assert num_parameters(tiny_llama()) == blocks + 2 * 64 * 32
    assert num_parameters(tiny_llama(tied=True)) == blocks + 64 * 32
