"""DeepSpeed against one process, its checkpoints over stages, sizes and engines, and a user's file against
our settings. Real ranks over gloo; a pool rank is in the launch, since trainers have a world of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import MixtralConfig

from opmix_dist.cli import main
from opmix_dist.config import EngineConfig, OptimizerConfig, check_config, load_config
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines.base import KINDS
from opmix_dist.engines.deepspeed import DeepSpeedEngine, _require_accepted
from opmix_dist.engines.deepspeed_config import deepspeed_settings
from opmix_dist.engines.deepspeed_files import require_nvme
from opmix_dist.engines.single import SingleEngine
from opmix_dist.errors import UserError
from opmix_dist.models.source import ModelSource, checkpoint_source
from opmix_dist.models.universal import convert_universal
from opmix_dist.train.checkpoint import SafePlanner, SafeReader
from tests.engines.deepspeed_ranks import CASES, CROSSINGS, HALVES, RAISING, TRAINERS, USER, WRITERS
from tests.engines.ranks import LENGTH, LR, MODELS, SAVED, STEPS, fresh, heldout, train
from tests.helpers import ROOT, on_ranks

ALONE = World(Placement(Role.TRAINER, 0, 1), torch.device("cpu"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    on_ranks(TRAINERS + 1, "tests.engines.deepspeed_ranks", "write", str(folder))
    on_ranks(3, "tests.engines.deepspeed_ranks", "continue_all", str(folder))
    return folder


def read(out: Path, name: str) -> Any:
    return json.loads((out / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Any]]:
    """Curves of one process, without DeepSpeed."""
    found = {}
    for model in MODELS:
        engine = SingleEngine(
            fresh(model),
            ALONE,
            config=EngineConfig(),
            optimizer=OptimizerConfig(lr=LR),
            sequence_length=LENGTH,
        )
        steps = train(engine, 0, 8)
        evaluation = engine.evaluate(heldout(), batch_size=2).tolist()
        found[model] = {"steps": steps + train(engine, 8, STEPS), "evaluation": evaluation}
    return found


def assert_same_curve(found: list[list[float]], expected: list[list[float]], rtol: float) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=rtol, atol=0)


@pytest.mark.launch
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradient_norms_are_those_of_one_process(
    out: Path, single: dict[str, dict[str, Any]], case: str
) -> None:
    found, (model, _, steps) = read(out, "curves")[case], CASES[case]
    assert_same_curve(found["steps"], single[model]["steps"][:steps], rtol=1e-5)
    if steps == 8:
        assert found["evaluation"] == pytest.approx(single[model]["evaluation"], rel=1e-5)


@pytest.mark.launch
@pytest.mark.parametrize("case", HALVES)
def test_bf16_follows_float32(out: Path, single: dict[str, dict[str, Any]], case: str) -> None:
    found = read(out, "halves")[case]["steps"]
    for (loss, _), (expected, _) in zip(found, single["llama"]["steps"][:8], strict=True):
        assert loss == pytest.approx(expected, rel=2e-3)
        assert loss != expected


@pytest.mark.launch
@pytest.mark.parametrize("case", WRITERS)
def test_resume_is_exact_and_shares_are_the_parameters(out: Path, case: str) -> None:
    found = read(out, "exact")[case]
    assert found["differ"] == [], "parameters or moments"
    assert found["again"] == found["rest"], "not bit-identical"
    assert found["shared"]


@pytest.mark.launch
@pytest.mark.parametrize("ranks", CROSSINGS)
def test_other_sizes_stages_and_engines_continue(out: Path, ranks: int) -> None:
    """With AdamW's moments and its count of steps: without either, norms differ by 2% in these four steps."""
    written, continued = read(out, "exact"), read(out, f"continued_{ranks}")
    assert len(continued) == sum(map(len, CROSSINGS[ranks].values()))
    for run, steps in continued.values():
        assert_same_curve(steps, written[run]["rest"], rtol=1e-4)


@pytest.mark.launch
@pytest.mark.parametrize("case", RAISING)
def test_nan_on_one_rank_or_a_spike_stops_all_and_changes_nothing(out: Path, case: str) -> None:
    for rank in range(TRAINERS):
        found = read(out, f"raised_{rank}")[case]
        assert found["errors"] == ["NonFiniteError", "LossSpikeError"]
        assert found["moved"] == []
        assert found["steps"] == 1
        assert found["after"] == found["expected"]


@pytest.mark.launch
def test_native_checkpoint_is_the_common_one_after_conversion(out: Path, tmp_path: Path) -> None:
    """Parameters and moments; and the parameters are those of the model that `opmix convert` makes of it."""
    checkpoint = out / "runs" / "stage2" / "checkpoints" / f"step_{SAVED}"
    convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    folders = [
        "--input_folder",
        str(checkpoint / "deepspeed" / f"step_{SAVED}"),
        "--output_folder",
        str(tmp_path),
    ]
    subprocess.run([*convert, *workers, *folders], check=True, capture_output=True, cwd=tmp_path)
    shapes = fresh("llama").shapes
    common: dict[str, Any] = {
        kind: {name: torch.empty(shape) for name, shape in shapes.items()} for kind in KINDS
    }
    dcp.load(common, storage_reader=SafeReader(checkpoint), planner=SafePlanner(), no_dist=True)
    for kind, file in (("parameter", "fp32"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
        for name, expected in common[kind].items():
            found = torch.load(tmp_path / "zero" / name / f"{file}.pt", weights_only=True)["param"]
            assert torch.equal(found.view_as(expected), expected), (kind, name)
    fresh("llama").save_config(tmp_path / "config", torch.float32)
    convert_arguments = ["convert", str(tmp_path), "--config", str(tmp_path / "config"), "--out"]
    assert main([*convert_arguments, str(tmp_path / "hf")]) == 0
    source = checkpoint_source(str(tmp_path / "hf"))
    assert source.shapes == shapes
    for name, expected in common["parameter"].items():
        assert torch.equal(source.tensor(name), expected), name
    assert main([*convert_arguments, str(tmp_path / "hf")]) != 0, "it overwrites"


@pytest.mark.launch
@pytest.mark.parametrize("stage", ["stage 2", "stage 3"])
def test_native_checkpoints_that_a_rank_cannot_write_stop_nobody(
    out: Path, single: dict[str, dict[str, Any]], stage: str
) -> None:
    for rank in range(TRAINERS):
        found = read(out, f"native_{rank}")[stage]
        assert found["found"] == [[False, False], [False, False], [True, True]]
        assert_same_curve(found["after"], single["llama"]["steps"][1:2], rtol=1e-5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no zero/model.embed_tokens.weight/fp32.pt, which the model needs"),
        ({"param": torch.ones(3)}, r"fp32.pt holds \(3,\), but the model's parameter is \(64, 32\)"),
        ({"param": Fraction(1, 3)}, "fp32.pt is not read: .*"),
    ],
)
def test_a_universal_checkpoint_of_something_else_is_refused(
    tmp_path: Path, content: dict[str, Any] | None, words: str
) -> None:
    for name, shape in fresh("llama").shapes.items():
        folder = tmp_path / "zero" / name
        folder.mkdir(parents=True)
        if content is not None:
            found = content if name == "model.embed_tokens.weight" else {"param": torch.ones(shape)}
            torch.save(found, folder / "fp32.pt")
    fresh("llama").save_config(tmp_path / "config", torch.float32)
    with pytest.raises(UserError, match=words):
        convert_universal(tmp_path, str(tmp_path / "config"), tmp_path / "hf", dtype=torch.float32)


def test_nvme_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "false")
    nvme = {"stage": 2, "offload_optimizer": "nvme", "nvme_path": str(tmp_path)}
    with pytest.raises(UserError, match="offload_optimizer nvme needs DeepSpeed's async_io, which does not"):
        require_nvme(settings(deepspeed=nvme))
    require_nvme(settings(deepspeed={"stage": 2, "offload_optimizer": "cpu"}))


def settings(user: Any = None, **engine: Any) -> dict[str, Any]:
    ours = engine.pop("deepspeed", {}) | {"config": user}
    return deepspeed_settings(EngineConfig(deepspeed=ours, **engine), OptimizerConfig(lr=LR))


def test_a_users_file_is_taken_with_what_is_ours(tmp_path: Path) -> None:
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(USER | {"wall_clock_breakdown": True}))
    found = settings(str(file))
    assert found["zero_optimization"] == USER["zero_optimization"] | {"memory_efficient_linear": False}
    assert found["gradient_clipping"] == 1.0
    assert found["bf16"] == {"enabled": False}
    assert found["wall_clock_breakdown"]
    assert not {"optimizer", "scheduler", "train_batch_size"} & set(found)


def test_the_shipped_files_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config("configs/deepspeed.yaml")
    DeepSpeedEngine.check(config, ranks=8)
    found = deepspeed_settings(config.engine, config.optimizer)
    assert found["zero_optimization"]["stage"] == 3
    assert found["bf16"] == {"enabled": True}
    _require_accepted(found)


def test_offload_settings_are_passed_through() -> None:
    user = {
        "zero_optimization": {"offload_param": {"device": "auto", "buffer_count": 3}},
        "aio": {"block_size": 4096},
    }
    ours = {"stage": 3, "offload_parameters": "nvme", "offload_optimizer": "cpu", "nvme_path": "/local"}
    found = settings(user, deepspeed=ours)
    assert found["zero_optimization"] == {
        "memory_efficient_linear": False,
        "stage": 3,
        "offload_param": {"device": "nvme", "buffer_count": 3, "nvme_path": "/local"},
        "offload_optimizer": {"device": "cpu"},
    }
    assert found["aio"] == {"block_size": 4096}


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but optimizer.max_grad_norm is 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, but engine.param_dtype is float32"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true, but engine.param_dtype is float32"),
        ({"data_types": {"param_dtype": "bf16"}}, "data_types.param_dtype is bf16, but engine.param_dtype"),
        ({"communication_data_type": "bf16"}, "data_type is bf16, but engine.reduce_dtype is float32"),
        ({"zero_optimization": {"stage": 3}}, "optimization.stage is 3, but engine.deepspeed.stage is 1"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type is Lamb, but the section `optimizer`"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "optimizer.type is Adam"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}, "params.lr is 0.1, but optimizer.lr is"),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}},
            "optimizer.params.betas is [0.9, 0.999], but optimizer.betas is [0.9, 0.95]",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type is WarmupLR, but learning rates follow"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer.device is cpu, but engine.deepspeed.offload_optimizer is none",
        ),
        ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow false cannot be had here"),
        ({"elasticity": {"enabled": True}}, "does not take the section elasticity"),
        ("missing.json", "cannot read engine.deepspeed.config missing.json"),
    ],
)  # fmt: skip
def test_contradictions_name_both(user: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        settings(user, deepspeed={"stage": 1, "offload_optimizer": "none"})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train_batch_size", 8, "train_batch_size is 8, but train.global_batch_size is 24"),
        ("train_micro_batch_size_per_gpu", 2, "per_gpu is 2, but train.micro_batch_size is 4"),
        ("gradient_accumulation_steps", 6, "is 6, but train.global_batch_size is 24 and"),
    ],
)
def test_batch_sizes_are_compared_before_anything_is_built(key: str, value: int, words: str) -> None:
    right = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}
    for user, wrong in ((right, False), (right | {key: value}, True)):
        config = check_config(
            {
                "run_dir": "run",
                "data": {"root": "data"},
                "model": {"config": {"model_type": "llama"}},
                "train": {"steps": 1, "global_batch_size": 24, "micro_batch_size": 4},
                "engine": {"name": "deepspeed", "deepspeed": {"config": user}},
            }
        )
        if wrong:
            with pytest.raises(UserError, match=words):
                DeepSpeedEngine.check(config, ranks=2)
        else:
            DeepSpeedEngine.check(config, ranks=2)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"deepspeed": {"offload_parameters": "cpu"}}, "offload_parameters cpu needs ZeRO stage 3, not 2"),
        ({"deepspeed": {"offload_optimizer": "nvme"}}, "set engine.deepspeed.nvme_path"),
        ({"float8": True}, "engine.float8"),
        ({"compile": True, "deepspeed": {"stage": 3}}, "engine.compile has no use with ZeRO stage 3"),
    ],
)
def test_what_it_cannot_do_is_named(engine: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(fresh("llama"), engine)


def test_experts_are_refused() -> None:
    source = ModelSource(
        MixtralConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    )
    with pytest.raises(UserError, match="does not train experts, which mixtral has"):
        build(source, {})


def test_without_the_package_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="needs the package deepspeed"):
        build(fresh("llama"), {})


def test_what_deepspeed_does_not_accept_is_one_line() -> None:
    with pytest.raises(UserError, match="DeepSpeed does not accept it: .*reduce_bucket_sise") as error:
        _require_accepted(settings({"zero_optimization": {"reduce_bucket_sise": 5}}))
    assert "\n" not in str(error.value)


def build(source: ModelSource, engine: dict[str, Any]) -> DeepSpeedEngine:
    return DeepSpeedEngine(
        source,
        ALONE,
        config=EngineConfig(**engine),
        optimizer=OptimizerConfig(lr=LR),
        sequence_length=LENGTH,
    )
