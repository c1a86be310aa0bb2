"""Whole jobs with training methods, one going on from another: what is kept, read again and booked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opmix_dist.config import check_config
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.methods.stored import provenance
from opmix_dist.train.roles import run_job
from tests.train.jobs import tiny_config

STEPS = 4
DOMAINS = ["json", "prose"]


def job(data: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    given = tiny_config(
        data, folder, mixture={"policy": "static"}, pool={"ranks": 0},
        search={"candidates": {"samples_per_domain": 4}},
        checkpoint={"interval_steps": 2, "asynchronous": False}, schedule={"warmup_steps": 0},
    )  # fmt: skip
    given["train"] |= {"steps": STEPS, "eval_interval_steps": 0, "log_interval_steps": 1}
    given["data"]["domains"] = DOMAINS
    for name, section in sections.items():
        given[name] = section if name == "model" else {**given.get(name, {}), **section}
    return given


def run(config: dict[str, Any]) -> RunDir:
    run_job(check_config(config))
    return RunDir(config["run_dir"])


@pytest.fixture(scope="module")
def first(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run without any method, on two domains."""
    return run(job(tiny_data, tmp_path_factory.mktemp("jobs") / "first"))


def next_job(
    data: Path, folder: Path, start: RunDir, domain: str = "python", **sections: Any
) -> dict[str, Any]:
    """Goes on on another domain."""
    given = job(data, folder, start={"run": str(start.path)}, model={}, **sections)
    given["data"] |= {"domains": [domain]}
    return given


def cut(run: RunDir, folder: Path, step: int) -> RunDir:
    """A copy as it was when the checkpoint of ``step`` was the last."""
    shutil.copytree(run.path, folder)
    again = RunDir(folder)
    for later in (s for s in again.complete_checkpoints() if s > step):
        shutil.rmtree(again.checkpoint(later))
    shutil.rmtree(folder / "export")
    again.summary_file.unlink()
    return again


def lines(found: RunDir) -> list[tuple[Any, ...]]:
    return [(one.step, one.loss, one.grad_norm, one.method) for one in found.train_lines()]


def weights(found: RunDir) -> dict[str, torch.Tensor]:
    return load_file(found.export / "model-00001-of-00001.safetensors")


EWC = {"name": "ewc", "ewc": {"samples_per_domain": 3, "strength": 50.0}}


def test_ewc_over_three_runs(tiny_data: Path, tmp_path: Path, first: RunDir) -> None:
    config = next_job(tiny_data, tmp_path / "second", first, method=EWC)
    second = run(config)
    found = lines(second)
    penalties = [method["penalty"] for *_, method in found]
    assert penalties[0] == 0.0, "the first step is taken at the anchor"
    assert penalties[-1] > 0
    made = provenance(second.importance)
    assert made.domains.keys() == {"json", "prose"}
    assert made.domains["json"] == pytest.approx(0.5)
    assert made.samples == {"json": 3, "prose": 3}
    costs = second.summary().costs
    assert costs["importance"].tokens == 6 * 64
    assert costs["penalty"].seconds > 0

    # resumed: the importances are not measured again, and every step is the same
    again = cut(second, tmp_path / "again", 2)
    before = (again.importance / "COMPLETE.json").stat().st_mtime_ns
    run(config | {"run_dir": str(again.path)})
    assert lines(again) == found
    assert (again.importance / "COMPLETE.json").stat().st_mtime_ns == before
    assert again.summary().costs["importance"] == costs["importance"]

    # the anchor is the start's export; a third run has the second's importances within its own
    stored = load_file(second.importance / "importance-00001-of-00001.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(stored[f"anchor.{name}"], weights(first)[name])
    third = run(next_job(tiny_data, tmp_path / "third", second, "json", method=EWC))
    after = load_file(third.importance / "importance-00001-of-00001.safetensors")
    made = provenance(third.importance)
    assert (made.domains, made.earlier) == ({"python": 1.0}, str(second.path))
    F, old = after[f"importance.{name}"], stored[f"importance.{name}"]
    fresh = F - old
    assert fresh.min() >= 0
    assert fresh.max() > 0
    balanced = (old * weights(first)[name] + fresh * weights(second)[name]) / F
    torch.testing.assert_close(after[f"anchor.{name}"][F > 1e-8], balanced[F > 1e-8], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["mas", "gem"])
def test_others_run_and_resume(tiny_data: Path, tmp_path: Path, first: RunDir, name: str) -> None:
    method = {"name": name, name: {"samples_per_domain": 3}}
    if name == "gem":
        method["gem"] |= {"samples_per_step": 2}
    config = next_job(tiny_data, tmp_path / name, first, method=method)
    found = run(config)
    again = cut(found, tmp_path / "again", 2)
    run(config | {"run_dir": str(again.path)})
    assert lines(again) == lines(found)
    phase, tokens = ("importance", 6 * 64) if name == "mas" else ("memory gradients", STEPS * 4 * 64)
    assert found.summary().costs[phase].tokens == tokens


def test_o_lora_and_the_adapters_of_earlier_runs(tiny_data: Path, tmp_path: Path, first: RunDir) -> None:
    lora = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}

    def adapted(folder: str, start: RunDir, strength: float) -> dict[str, Any]:
        method = {"name": "o_lora", "o_lora": {"strength": strength}}
        given = next_job(tiny_data, tmp_path / folder, start, method=method)
        given["model"] = lora
        return given

    second = run(adapted("second", first, 1.0))
    assert all(not method for *_, method in lines(second)), "no run before it has an adapter"
    config = adapted("third", second, 0.1)
    third, free = run(config), run(adapted("free", second, 0.0))
    penalties, without = ([line.method["penalty"] for line in one.train_lines()] for one in (third, free))
    assert 0 < penalties[-1] < penalties[0]
    assert set(without) == {0.0}
    a = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    As = [load_file(one.adapter / "adapter_model.safetensors")[a] for one in (second, third, free)]
    with_it, freely = ((As[0] @ other.T).abs().sum() for other in As[1:])
    assert with_it < freely
    again = cut(third, tmp_path / "again", 2)
    run(config | {"run_dir": str(again.path)})
    assert lines(again) == lines(third)
    for name, tensor in weights(third).items():
        assert torch.equal(tensor, weights(again)[name]), name
    checkpoint = sum(file.stat().st_size for file in third.checkpoint(STEPS).rglob("*.distcp"))
    export = sum(file.stat().st_size for file in third.export.glob("*.safetensors"))
    assert checkpoint < 2 * export, "three times all parameters would be more"


def test_adapters_keep_no_moments_of_other_runs(tiny_data: Path, tmp_path: Path, first: RunDir) -> None:
    given = next_job(tiny_data, tmp_path / "run", first)
    given["model"] = {"lora": {"rank": 4}}
    given["start"] |= {"optimizer": "keep"}
    with pytest.raises(
        UserError, match=r"model\.lora trains fresh adapters, .* set start\.optimizer to fresh"
    ):
        run(given)


def test_a_search_while_adapters_train(tiny_data: Path, tmp_path: Path, first: RunDir) -> None:
    """It starts from the merged model, and the adapters train on with what it proposes."""
    given = job(
        tiny_data,
        tmp_path / "run",
        start={"run": str(first.path)},
        model={"lora": {"rank": 4}},
        mixture={"policy": "opmix"},
        search={
            "start_fraction": 0.5,
            "probes": {"steps": 2, "batch_size": 2, "rank": 2},
            "candidates": {"count": 4, "samples_per_domain": 2},
            "refinement": {"rounds": 0},
            "proposal": {"bootstrap": 0, "no_move": False},
        },
    )
    found = run(given)
    (record,) = [one for one in found.mixtures() if one.search]
    assert record.changed, record.why
    snapshot = load_file(found.snapshot(2) / "model-00001-of-00001.safetensors")
    before, after = weights(first), weights(found)
    assert snapshot.keys() == before.keys()
    moved = [name for name in snapshot if not torch.equal(snapshot[name], before[name])]
    assert moved == [name for name in snapshot if not torch.equal(snapshot[name], after[name])]
    assert len(moved) == 2 * 7
