"""What the ranks of test_megatron.py do: ``python -m tests.engines.megatron_ranks FOLDER`` under torchrun, on
four ranks and then on two."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from opmix_dist.config import EngineConfig, OptimizerConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.distributed import Placement, World
from opmix_dist.engines.base import KINDS, BadStepError, Engine
from opmix_dist.engines.build import ENGINES
from opmix_dist.engines.megatron import MegatronEngine
from opmix_dist.engines.megatron.cpu import cpu_in_place_of_cuda
from opmix_dist.faults import points
from opmix_dist.faults.injector import Injector
from opmix_dist.faults.plan import Fault
from opmix_dist.models.source import ModelSource
from opmix_dist.process import end_process
from opmix_dist.train.model_writer import ModelWriter
from tests.engines.ranks import BATCH, LENGTH, LR, MICRO, SPIKE, STEPS, heldout, report, train
from tests.helpers import random_batch, tiny_llama_config, uneven_batch

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, PretrainedConfig] = {
    "llama": tiny_llama_config(tied=True),
    "llama3": LlamaConfig(rope_theta=500.0, rope_scaling=LLAMA3, max_position_embeddings=64, **SIZES),
    "qwen2": Qwen2Config(tie_word_embeddings=False, **SIZES),
    "qwen3": Qwen3Config(head_dim=16, tie_word_embeddings=True, **SIZES),
}
TENSOR = {"tensor_parallel": 2, "vocab_multiple": 48}
"""The second rank has 16 tokens and 32 of padding."""
# By number of ranks: model, settings of the engine and those of Megatron.
CASES: dict[int, dict[str, tuple[str, dict[str, Any], dict[str, Any]]]] = {
    2: {
        "tensor": ("qwen2", {}, TENSOR),
        "tensor, sequence": ("qwen3", {}, {**TENSOR, "sequence_parallel": True}),
        "tensor, recomputed": ("llama", {"activation_checkpointing": "full"}, TENSOR),
        "pipeline": ("llama3", {"activation_checkpointing": "selective"}, {"pipeline_parallel": 2}),
        "replicas": ("llama", {}, {"overlap_grad_reduce": True}),
        "bfloat16": ("llama", {"param_dtype": "bfloat16"}, {**TENSOR, "sequence_parallel": True}),
    },
    4: {
        "tensor x replicas": ("llama", {}, TENSOR),
        "tensor x pipeline": (
            "qwen3",
            {},
            {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True},
        ),
        "pipeline x replicas": ("llama", {}, {"pipeline_parallel": 2}),
    },
}


def build(world: World, model: str, config: dict[str, Any]) -> MegatronEngine:
    return MegatronEngine(
        ModelSource(MODELS[model], seed=3),
        world,
        config=EngineConfig(name="megatron", **config),
        optimizer=OptimizerConfig(lr=LR),
        sequence_length=LENGTH,
    )


def curve(world: World, model: str, config: dict[str, Any], megatron: dict[str, Any]) -> dict[str, Any]:
    engine = build(world, model, {**config, "megatron": megatron})
    counting = torch.tensor(engine.replica.counts, dtype=torch.int64)
    return {
        "model": model,
        "steps": train(engine, 0, STEPS),
        "evaluation": engine.evaluate(heldout(), batch_size=2).tolist(),
        "replicas": [engine.replica.size, int(world.sum(counting))],
    }


def mapping(world: World, model: str, megatron: dict[str, Any]) -> dict[str, Any]:
    """Random tensors of all kinds put into the engine, and what comes out: whole ones, and logits."""
    engine = build(world, model, {"megatron": megatron})
    generator = torch.Generator().manual_seed(0)
    put = {
        kind: {n: 0.3 * torch.randn(s, generator=generator) for n, s in engine.shapes.items()}
        for kind in KINDS
    }
    for kind, tensors in put.items():
        for name, tensor in tensors.items():
            engine._set_whole(kind, name, tensor)
    differing = [
        f"{kind} {name}"
        for kind in KINDS
        for name, tensor in engine._whole(kind)
        if not torch.equal(tensor, put[kind][name])
    ]
    hf = ModelSource(MODELS[model], seed=0).whole().eval()
    hf.load_state_dict(put["parameter"], strict=False)
    batch = random_batch(1, 3, LENGTH)
    with torch.no_grad():
        expected = hf(input_ids=batch.tokens, use_cache=False).logits
    found = logits(engine, batch)
    error = torch.tensor([0.0 if found is None else (found - expected).abs().max().item()])
    return {
        "differing": differing,
        "error": world.sum(error).item(),
        "scale": expected.abs().max().item(),
        "shapes": [list(shape) for shape in engine.shapes.values()],
        "hf_shapes": [list(parameter.shape) for parameter in hf.parameters()],
    }


def logits(engine: Engine, batch: TokenBatch) -> Tensor | None:
    """[B, T, V], where the losses are counted."""

    def forward(batches: Any, model: Any) -> Any:
        return engine._forward(batches, model)[0], lambda found, non_loss_data: found

    with torch.no_grad(), cpu_in_place_of_cuda():
        found = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter([batch]), model=[engine.model], num_microbatches=1,
            seq_length=LENGTH, micro_batch_size=len(batch), forward_only=True, collect_non_loss_data=True,
        )  # fmt: skip
        if not found:
            return None
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(found[0])
    return whole[..., : engine.hf_config.vocab_size] if engine.replica.counts else None


def non_finite(world: World, megatron: dict[str, Any]) -> dict[str, Any]:
    """A step, then one with a NaN in one number of one rank, one whose losses are finite and one gradient of
    one rank is not, those whose loss or gradient is above the limit, and one with a NaN that is planned for a
    gradient: all ranks raise, and none changes its parameters. Then a step more, as if nothing had been."""
    engine = build(world, "llama", {"megatron": megatron})
    train(engine, 0, 1)
    before = whole(engine)
    parameter = next(iter(engine._parameters.values()))
    numbers = parameter.data.view(-1)
    number = numbers[0].item()
    if world.rank == 0:
        numbers[0] = float("nan")
    batch = uneven_batch(0, MICRO * engine.replica.size, LENGTH)
    messages = [raised_message(engine, batch)]
    numbers[0] = number
    hook = parameter.register_hook(lambda gradient: gradient * (1.0 if world.rank else float("nan")))
    messages.append(raised_message(engine, batch))
    hook.remove()
    messages.append(raised_message(engine, batch, loss_limit=SPIKE))
    messages.append(raised_message(engine, batch, norm_limit=1e-6))
    with fault_of_gradient(world):
        messages.append(raised_message(engine, batch))
    after = whole(engine)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    steps = engine.optimizer_steps
    return {"messages": messages, "moved": moved, "steps": steps, "next": train(engine, 1, 2)}


@contextmanager
def fault_of_gradient(world: World) -> Iterator[None]:
    """A NaN is planned at ``train.gradient``, on the first rank."""
    fault = Fault(id="nan", point="train.gradient", kind="nan")
    with TemporaryDirectory() as marks:
        points._injector = Injector([fault] if world.is_leader else [], Path(marks))
        yield
        points._injector = None


def raised_message(engine: Engine, batch: TokenBatch, **options: float) -> str:
    """Of the error that a step on ``batch`` ends in."""
    try:
        engine.train_step(batch.split(MICRO), lr=LR, **options)
    except BadStepError as error:
        return str(error)
    return ""


def whole(engine: Engine) -> dict[str, Tensor]:
    return {f"{kind} {name}": t.clone() for kind in KINDS for name, t in engine._whole(kind)}


def exported(world: World, folder: Path) -> list[float]:
    """A trained model written by all ranks; its held-out losses."""
    source = ModelSource(MODELS["llama"], seed=3)
    engine = build(world, "llama", {"megatron": {"tensor_parallel": 2, "pipeline_parallel": 2}})
    train(engine, 0, 2)
    writer = ModelWriter(world, engine, source)
    assert writer.write(folder, dtype=torch.float32, marker={"step": 2}) == ""
    return engine.evaluate(heldout(), batch_size=2).tolist()


def everything(world: World, out: Path) -> None:
    assert ENGINES["megatron"] == (MegatronEngine.__module__.rpartition(".")[0], MegatronEngine.__name__)
    untouched = torch.cuda.current_device
    found: dict[str, Any] = {name: curve(world, *case) for name, case in CASES[world.size].items()}
    report(world, out / f"curves_{world.size}.json", found)
    cases = {name: case for name, case in CASES[world.size].items() if not case[1].get("param_dtype")}
    found = {name: mapping(world, model, megatron) for name, (model, _, megatron) in cases.items()}
    report(world, out / f"mapped_{world.size}.json", found)
    if world.size == 4:
        report(world, out / "exported.json", exported(world, out / "hf"))
    else:
        layouts: list[dict[str, Any]] = [TENSOR, {"pipeline_parallel": 2}, {}]
        (out / f"raised_{world.rank}.json").write_text(
            json.dumps([non_finite(world, layout) for layout in layouts])
        )
    assert torch.cuda.current_device is untouched
    assert torch.empty(1, device="meta").device.type == "meta"


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert BATCH % 4 == 0
    joined = World.join(Placement.from_environment(pool_ranks=0), device="cpu", timeout_s=60)
    everything(joined, Path(sys.argv[1]))
    joined.leave()
    end_process(0)
