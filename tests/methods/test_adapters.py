"""Training methods with adapters (model.lora): only adapters move, and methods see the whole of the model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opmix_dist.config import EngineConfig, OptimizerConfig, check_config
from opmix_dist.data.batch import TokenBatch
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines.single import SingleEngine
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.method_config import LoRAConfig
from opmix_dist.methods.build import build_method
from opmix_dist.methods.gem import GEM
from opmix_dist.methods.generation import parameter_of
from opmix_dist.models.source import ModelSource
from opmix_dist.train.roles import run_job
from tests.helpers import tiny_llama_config
from tests.methods.linear import around, config_of
from tests.methods.on_policy_jobs import built, job_config, make_data

LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
SDFT = {"max_new_tokens": 8, "demonstration": " ({demonstration})"}


@pytest.fixture(scope="module")
def data(streaming: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("adapters"))


def frozen_and_trained(engine: SingleEngine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of W and all else that must stay, and of the adapters."""
    whole = {name: tensor.detach().clone() for name, tensor in engine.model.named_parameters()}
    return {name: whole[name] for name in engine.shapes}, {name: whole[name] for name in engine.trained}


def require_only_adapters_moved(
    engine: SingleEngine, before: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    for name, tensor in before[0].items():
        assert torch.equal(engine.model.get_parameter(name), tensor), name
    for name, tensor in before[1].items():
        assert not torch.equal(engine.model.get_parameter(name), tensor), name


def after(asked: int, answer: int, count: int = 4) -> TokenBatch:
    """Sequences in which ``answer`` follows ``asked``, again and again."""
    return TokenBatch.of_tokens(torch.tensor([[asked, answer] * 8]).repeat(count, 1))


def test_gem_projects_the_gradient_of_the_adapters(tiny_data: Path, tmp_path: Path) -> None:
    """What is learnt now contradicts the memory: along the raw gradient the memory's loss rises, along the
    projected one it does not, to first order."""
    world = World(Placement(Role.TRAINER, 0, 1), torch.device("cpu"))
    engine = SingleEngine(
        ModelSource(tiny_llama_config(), seed=2), world, config=EngineConfig(), optimizer=OptimizerConfig(),
        sequence_length=16, lora=LoRAConfig(**LORA), adapter_seed=3,
    )  # fmt: skip
    method = {"name": "gem", "gem": {"domains": ["json"]}}
    gem = GEM(around(engine, config_of(tiny_data, tmp_path, method)))
    memory, new = after(5, 6), after(5, 7)
    gem.memory = {"json": memory}
    before, violated = frozen_and_trained(engine), []
    for step in range(4):
        work = gem.prepare(step, new.split(2))
        engine.train_step(work.microbatches, lr=1e-2, adjust=work.adjust)
        violated.append(gem.numbers()["violated"])
    assert violated[-1] == 1.0
    require_only_adapters_moved(engine, before)

    gem.prepare(4, new.split(2))
    raw = engine.gradient(new.split(2), total=int(new.targets.sum()))
    projected = {name: slope.clone() for name, slope in raw.items()}
    gem._project(projected)
    assert raw.keys() == projected.keys() == engine.trained.keys()
    rises = [memory_loss_after(engine, memory, step) for step in (raw, projected)]
    assert rises[0] > 0
    assert rises[1] < 0.02 * rises[0]


def memory_loss_after(engine: SingleEngine, memory: TokenBatch, gradient: dict[str, Tensor]) -> float:
    """By how much it rises with a small step down ``gradient``, which is taken back."""
    size = 1e-3 / sum(float(slope.square().sum()) for slope in gradient.values()) ** 0.5
    kept = {name: part.clone() for name, part in engine.parts().items()}
    start = float(engine.evaluate(memory, 4).sum())
    for name, part in engine.parts().items():
        part.sub_(gradient[name], alpha=size)
    rise = float(engine.evaluate(memory, 4).sum()) - start
    for name, part in engine.parts().items():
        part.copy_(kept[name])
    return rise


def adapted(data: Path, run: Path, method: dict[str, Any], **train: Any) -> dict[str, Any]:
    config = job_config(data, run, method, **train)
    config["model"]["lora"] = LORA
    return config


@pytest.mark.parametrize("teacher", ["frozen", "ema"])
def test_sdft_averages_the_whole_model_and_freezes_its_start(
    data: Path, tmp_path: Path, teacher: str
) -> None:
    """phi <- 0.7 phi + 0.3 (W + s B A); the copy that samples is W + s B A."""
    settings = {**SDFT, "teacher": teacher, "ema_rate": 0.3}
    with built(adapted(data, tmp_path / "run", {"name": "sdft", "sdft": settings})) as parts:
        engine, method = parts.around.engine, parts.method
        assert isinstance(engine, SingleEngine)
        samples: Any = method.policy
        method.begin(0)
        before = frozen_and_trained(engine)
        average = {name: tensor.clone() for name, tensor in before[0].items()}
        for step in range(2):
            work = method.prepare(step, parts.microbatches)
            engine.train_step(work.microbatches, lr=1e-2, loss=work.loss)
            method.applied(step)
            for name, phi in average.items():
                phi.lerp_(effective(engine, name), 0.3 if teacher == "ema" else 0.0)
        require_only_adapters_moved(engine, before)
        for name, phi in average.items():
            assert torch.allclose(parameter_of(method.teacher, name), phi, atol=1e-7), name
            assert torch.allclose(parameter_of(samples.model, name), effective(engine, name), atol=1e-7)
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(average[name], before[0][name]) == (teacher == "frozen")


def effective(engine: SingleEngine, name: str) -> Tensor:
    """W + s B A by hand."""
    layer, found = name.removesuffix(".weight"), engine.model.get_parameter(name).detach()
    if f"{layer}.lora_A" not in engine.trained:
        return found
    A, B = (engine.model.get_parameter(f"{layer}.lora_{half}").detach() for half in "AB")
    return found + LORA["alpha"] / LORA["rank"] * B @ A


def test_a_resume_of_sdft_with_adapters_is_exact(data: Path, tmp_path: Path) -> None:
    """Also of the averaged teacher, which is no product of adapters."""
    config = adapted(data, tmp_path / "run", {"name": "sdft", "sdft": {**SDFT, "ema_rate": 0.3}})
    run = RunDir(config["run_dir"])
    run_job(check_config(config))
    whole = [(line.step, line.loss, line.grad_norm) for line in run.train_lines()]
    shutil.rmtree(run.checkpoint(4))
    shutil.rmtree(run.export)
    run.summary_file.unlink()
    run.train_file.write_text("".join(run.train_file.read_text().splitlines(keepends=True)[:2]))
    run_job(check_config(config))
    assert [(line.step, line.loss, line.grad_norm) for line in run.train_lines()] == whole
    assert len(whole) == 4


def test_another_model_teaches_adapters(data: Path, tmp_path: Path) -> None:
    """A student that adapters have taken away from its teacher goes back."""
    with built(job_config(data, tmp_path / "first", {"name": "sdft", "sdft": SDFT})) as parts:
        teacher = tmp_path / "teacher"
        engine = parts.around.engine
        assert isinstance(engine, SingleEngine)
        engine.model.save_pretrained(teacher)
        parts.around.catalogue.load_tokenizer().save_pretrained(teacher)
    method = {"name": "distill", "distill": {"teacher": str(teacher), "max_new_tokens": 8}}
    config = adapted(data, tmp_path / "run", method)
    config["model"] = {"checkpoint": str(teacher), "lora": {**LORA, "dropout": 0.0}}
    with built(config) as parts:
        engine, step = parts.around.engine, parts.method
        assert isinstance(engine, SingleEngine)
        step.begin(0)
        work = step.prepare(0, parts.microbatches)
        for name, part in engine.parts().items():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(part, std=0.3, generator=torch.Generator().manual_seed(1))
        before, losses = frozen_and_trained(engine), []
        for _ in range(4):
            found = engine.train_step(work.microbatches, lr=1e-2, loss=work.loss)
            losses.append(float(found.sample_losses.sum()))
        require_only_adapters_moved(engine, before)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["ewc", "mas"])
def test_importance_of_fresh_adapters_is_refused(tiny_data: Path, tmp_path: Path, name: str) -> None:
    engine = SingleEngine(
        ModelSource(tiny_llama_config()), World(Placement(Role.TRAINER, 0, 1), torch.device("cpu")),
        config=EngineConfig(), optimizer=OptimizerConfig(), sequence_length=16, lora=LoRAConfig(**LORA),
    )  # fmt: skip
    config = config_of(
        tiny_data, tmp_path, {"name": name}, model={"lora": LORA, "config": {"model_type": "llama"}}
    )
    with pytest.raises(
        UserError, match=rf"method\.name {name} keeps .*, or set method\.name to o_lora or gem"
    ):
        build_method(around(engine, config))
