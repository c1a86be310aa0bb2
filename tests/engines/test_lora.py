"""Training of adapters only (model.lora): what moves, what is saved and what is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from opmix_dist.config import EngineConfig, OptimizerConfig, check_config
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines.base import KINDS
from opmix_dist.engines.single import SingleEngine
from opmix_dist.errors import UserError
from opmix_dist.method_config import LoRAConfig
from opmix_dist.models.source import ModelSource, checkpoint_source
from opmix_dist.train.model_writer import ModelWriter
from tests.helpers import random_tokens, tiny_llama, uneven_batch
from tests.train.jobs import tiny_config

LORA = LoRAConfig(rank=4, alpha=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(seed=5, tied=True).save_pretrained(folder)
    return folder


def world() -> World:
    return World(Placement(Role.TRAINER, 0, 1), torch.device("cpu"))


def build(source: ModelSource, *, weight_decay: float = 0.0, **lora: Any) -> SingleEngine:
    return SingleEngine(
        source, world(), config=EngineConfig(), optimizer=OptimizerConfig(weight_decay=weight_decay),
        sequence_length=16, lora=LORA.model_copy(update=lora), adapter_seed=3,
    )  # fmt: skip


def train(engine: SingleEngine, first: int, last: int) -> list[float]:
    return [
        engine.train_step(uneven_batch(step, 6, 16).split(2), lr=1e-2).grad_norm
        for step in range(first, last)
    ]


def test_it_trains_as_peft_does(base: Path) -> None:
    """The same A, the same batches, textbook AdamW: the same gradient norms and adapters."""
    from peft import LoraConfig, get_peft_model

    engine = build(checkpoint_source(str(base)))
    model = AutoModelForCausalLM.from_pretrained(base)
    layers = sorted(engine.adapters.layers)
    theirs = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=layers, task_type="CAUSAL_LM")
    )
    of_theirs = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    assert sorted(of_theirs) == sorted(engine.trained)
    for name, parameter in of_theirs.items():
        parameter.data.copy_(engine.parts()[name])
    optimizer = torch.optim.AdamW(of_theirs.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    norms = []
    for step in range(4):
        batch = uneven_batch(step, 6, 16)
        labels = batch.tokens.masked_fill(~batch.loss_mask, -100)
        theirs(input_ids=batch.tokens, labels=labels, use_cache=False).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(of_theirs.values(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    assert train(engine, 0, 4) == pytest.approx(norms, rel=1e-4)
    for name, parameter in of_theirs.items():
        torch.testing.assert_close(engine.parts()[name], parameter.detach(), rtol=1e-4, atol=1e-6)


def test_only_adapters_have_moments_and_a_checkpoint_holds_nothing_else(base: Path) -> None:
    engine = build(checkpoint_source(str(base)))
    train(engine, 0, 2)
    state = engine.state_dict()
    layers = 2 * 7
    for kind in KINDS:
        assert len(state[kind]) == 2 * layers
        assert all(name.endswith(("lora_A", "lora_B")) for name in state[kind])
    assert len(engine.optimizer.state) == 2 * layers
    frozen = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    for name, parameter in engine.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_a_resume_is_exact(base: Path) -> None:
    engine = build(checkpoint_source(str(base)), dropout=0.0)
    train(engine, 0, 2)
    state = engine.state_dict()
    again = build(checkpoint_source(str(base)))

    def read(part: dict[str, Any]) -> None:
        for kind, tensors in part.items():
            if kind == "step":
                tensors.copy_(state["step"])
                continue
            for name, tensor in tensors.items():
                tensor.copy_(state[kind][name])

    again.load_state(read)
    assert train(again, 2, 4) == train(engine, 2, 4)


def test_fresh_adapters_change_nothing_and_depend_on_the_seed(base: Path) -> None:
    plain = checkpoint_source(str(base))
    engine = build(plain)
    for name, tensor in engine.share().items():
        assert torch.equal(tensor, plain.tensor(name)), name
    other = SingleEngine(
        plain, world(), config=EngineConfig(), optimizer=OptimizerConfig(), sequence_length=16, lora=LORA,
        adapter_seed=4,
    )  # fmt: skip
    name = "model.layers.0.mlp.up_proj.lora_A"
    assert not torch.equal(engine.parts()[name], other.parts()[name])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens(0, 2, 12)).logits


def test_the_merged_model_and_the_adapter_are_one(base: Path, tmp_path: Path) -> None:
    """transformers loads the one, peft the other on the base: the same logits, which are not the base's."""
    source = checkpoint_source(str(base))
    engine = build(source, dropout=0.1)
    train(engine, 0, 3)
    writer = ModelWriter(world(), engine, source)
    assert writer.write(tmp_path / "hf", dtype=torch.float32, marker={}) == ""
    assert writer.write_adapter(tmp_path / "adapter") == ""
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"))
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    adapted = logits(PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    engine.model.eval()
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, logits(engine.model), rtol=1e-5, atol=1e-5)
    assert (merged - before).abs().max() > 1e-2
    assert set(load_file(tmp_path / "hf" / "model-00001-of-00001.safetensors")) == set(source.shapes)


def test_flops_of_a_frozen_base(base: Path) -> None:
    """Forward, gradients to activations, and both products of attention; adapters three times."""
    engine = build(checkpoint_source(str(base)))
    counts = engine.flops
    assert engine.train_flops == 2 * counts.forward + counts.attention + 3 * counts.lora_per_adapter
    # 2 r (d_in + d_out) of q, k, v, o, gate, up, down of two blocks: width 32, heads of 8, two key heads
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert counts.lora_per_adapter == 2 * sum(2 * 4 * (d_in + d_out) for d_in, d_out in sizes)


def test_what_adapters_cannot_do_is_refused() -> None:
    def config(**sections: Any) -> Any:
        given = tiny_config(Path("data"), Path("run"), **sections)
        given["model"] = {**given["model"], "lora": {"rank": 4}}
        return check_config(given)

    with pytest.raises(UserError, match=r"model\.lora leaves no layer to engine\.float8"):
        config(engine={"float8": True})
    with pytest.raises(UserError, match=r"engine\.fsdp\.tensor_parallel is 2: set it to 1"):
        config(engine={"fsdp": {"tensor_parallel": 2}})
    for name in ("deepspeed", "megatron"):
        with pytest.raises(UserError, match=rf"model\.lora does not train on engine\.name {name}"):
            config(engine={"name": name})
        with pytest.raises(UserError, match=rf"method\.name ewc does not run on engine\.name {name}"):
            check_config(
                tiny_config(Path("data"), Path("run"), engine={"name": name}, method={"name": "ewc"})
            )
    with pytest.raises(
        UserError, match="Conv1D: adapters adapt torch.nn.Linear only, so leave out model.lora"
    ):
        build(ModelSource(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)))
