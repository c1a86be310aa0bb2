"""What the ranks of test_ranks.py do: ``python -m tests.methods.ranks FOLDER DATA`` under torchrun, or in the
test's own process, where one rank holds everything."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from opmix_dist.config import EngineConfig, OptimizerConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.distributed import Placement, World
from opmix_dist.engines.fsdp import FSDPEngine
from opmix_dist.engines.single import SingleEngine
from opmix_dist.method_config import LoRAConfig, OLoRAConfig
from opmix_dist.methods.base import Method
from opmix_dist.methods.ewc import EWC
from opmix_dist.methods.gem import GEM
from opmix_dist.methods.importance import ImportanceMethod
from opmix_dist.methods.mas import MAS
from opmix_dist.methods.o_lora import OLoRA
from opmix_dist.methods.stored import Provenance, read_parts, write_parts
from opmix_dist.models.source import ModelSource
from opmix_dist.process import end_process
from opmix_dist.train.model_writer import ModelWriter
from tests.helpers import tiny_llama_config, uneven_batch
from tests.methods.linear import around, config_of

BATCH, MICRO, LENGTH, STEPS = 12, 3, 16, 3
LAYOUTS: dict[str, dict[str, Any]] = {"sharded": {}, "replicas": {"fsdp": {"replicas": 2}}}
RANKS = 2


def build(world: World, layout: dict[str, Any] | None, lora: LoRAConfig | None = None) -> SingleEngine:
    """``layout`` None: all on one rank."""
    kind = SingleEngine if layout is None else FSDPEngine
    return kind(
        ModelSource(tiny_llama_config(tied=True), seed=3), world, config=EngineConfig(**layout or {}),
        optimizer=OptimizerConfig(), sequence_length=LENGTH, lora=lora, adapter_seed=5,
    )  # fmt: skip


def memory(seed: int) -> TokenBatch:
    batch = uneven_batch(seed, 7, LENGTH, mask_documents=True)
    return batch[batch.targets > 0]


def train(engine: SingleEngine, method: Method) -> list[list[float]]:
    """Mean loss, gradient norm and what the method tells, of each step."""
    curve = []
    for step in range(STEPS):
        batch = uneven_batch(step, BATCH, LENGTH, mask_documents=True)
        share = BATCH // engine.replica.size
        mine = batch[slice(engine.replica.rank * share, (engine.replica.rank + 1) * share)]
        work = method.prepare(step, mine.split(MICRO))
        result = engine.train_step(work.microbatches, lr=3e-3, adjust=work.adjust)
        method.applied(step)
        loss = engine.sum(result.sample_losses.sum()).item() / int(batch.targets.sum())
        curve.append([loss, result.grad_norm, *method.numbers().values()])
    return curve


def importances(world: World, layout: dict[str, Any] | None, folder: Path, data: Path, name: str) -> Any:
    """Measured, written, read again, and used."""
    kind: type[ImportanceMethod] = {"ewc": EWC, "sampled": EWC, "mas": MAS}[name]
    section = "mas" if name == "mas" else "ewc"
    settings = {"domains": ["json"], "strength": 30.0} | ({"fisher": name} if name == "sampled" else {})
    config = config_of(data, folder, {"name": section, section: settings}, train={"log_interval_steps": 1})
    engine = build(world, layout)
    method = kind(around(engine, config))
    found = method.measure(memory(40))
    # an anchor that is not where training begins, so that the first step has a penalty too
    anchor = {name: part + 0.01 for name, part in engine.parts().items()}
    made = Provenance(method=section, settings={}, domains={"json": 1.0}, sum=0.0)
    write_parts(folder / "importance", world, engine, {"importance": found, "anchor": anchor}, made)
    parts = read_parts(folder / "importance", engine)
    method.importance, method.anchor = parts["importance"], parts["anchor"]
    return train(engine, method)


def episodic(world: World, layout: dict[str, Any] | None, folder: Path, data: Path, projection: str) -> Any:
    settings = {"domains": ["json", "prose"], "projection": projection, "margin": 0.3}
    engine = build(world, layout)
    method = GEM(around(engine, config_of(data, folder, {"name": "gem", "gem": settings})))
    method.memory = {"json": memory(41), "prose": memory(42)}
    return train(engine, method)


def orthogonal(world: World, layout: dict[str, Any] | None, folder: Path, data: Path) -> Any:
    """Three rows of A on two ranks. Also what the trained adapters are, whole, and the merged model."""
    lora = LoRAConfig(rank=3, alpha=6)
    engine = build(world, layout, lora)
    config = config_of(
        data, folder, {"name": "o_lora", "o_lora": {"strength": 0.05}}, train={"log_interval_steps": 1}
    )
    section = config.model.model_copy(update={"lora": lora})
    method = OLoRA(around(engine, config.model_copy(update={"model": section})))
    assert method.config == OLoRAConfig(strength=0.05)
    generator = torch.Generator().manual_seed(0)
    method.earlier = {
        name: torch.randn(5, shape[1], generator=generator)
        for name, shape in engine.trained.items()
        if name.endswith("lora_A")
    }
    curve = train(engine, method)
    writer = ModelWriter(world, engine, ModelSource(tiny_llama_config(tied=True), seed=3))
    assert writer.write(folder / "hf", dtype=torch.float32, marker={}) == ""
    assert writer.write_adapter(folder / "adapter") == ""
    return curve


def everything(world: World, layout: dict[str, Any] | None, folder: Path, data: Path) -> dict[str, Any]:
    found = {
        name: importances(world, layout, folder / name, data, name) for name in ("ewc", "sampled", "mas")
    }
    found |= {name: episodic(world, layout, folder / name, data, name) for name in ("gem", "a_gem")}
    return found | {"o_lora": orthogonal(world, layout, folder / "o_lora", data)}


def main() -> None:
    out, data = map(Path, sys.argv[1:])
    world = World.join(Placement.from_environment(0), device="cpu", timeout_s=120.0)
    for name, layout in LAYOUTS.items():
        found = everything(world, layout, out / name, data)
        if world.is_leader:
            (out / f"{name}.json").write_text(json.dumps(found))
    world.leave()
    end_process(0)


if __name__ == "__main__":
    main()
