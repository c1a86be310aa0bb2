"""How candidates are evaluated: decided by sizes, memory and measured times, and kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from opmix_dist.config import check_config
from opmix_dist.data.loader import EvalSet
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import read_record
from opmix_dist.exchange.schemas import EvaluationPlan
from opmix_dist.models import compute
from opmix_dist.models.flops import count_flops
from opmix_dist.models.lora import JointAdapters
from opmix_dist.pool.errors import SearchError
from opmix_dist.pool.method_times import MethodTimes, cache_folder, method_times
from opmix_dist.pool.plan import Planner, chosen_dtype, chosen_kernels, halved
from opmix_dist.pool.trials import Trials, largest_fit
from opmix_dist.search_config import CandidateConfig
from tests.helpers import random_batch, tiny_llama
from tests.train.jobs import tiny_config

CPU = torch.device("cpu")


def trials(*, samples: int = 24, length: int = 16, vocab_size: int = 64) -> Trials:
    model = tiny_llama(vocab_size=vocab_size)
    flops = count_flops(model, length, 4)
    adapters = JointAdapters(model, ["old", "a", "b"], rank=4, alpha=8, seeds=[0, 1, 2])
    heldout = EvalSet(random_batch(0, samples, length), torch.arange(samples) % 2)
    return Trials(adapters, heldout, flops)


def planner(folder: Path, tried: Trials, **settings: Any) -> Planner:
    flops = count_flops(tiny_llama(), 16, 4)
    return Planner(
        folder / "evaluation.json",
        tried,
        flops,
        CandidateConfig(**settings),
        dtype="float32",
        kernels=False,
        folder=folder / "times",
    )


def test_on_a_cpu_sizes_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planner(tmp_path, trials()).decide(gradients=False)
    assert (plan.method, plan.joint, plan.batch_size) == ("merge", 1, 16), "384 tokens, layers of 32 x 48"
    plan = planner(tmp_path, trials(), method="lowrank").decide(gradients=True)
    assert (plan.joint, plan.batch_size, plan.gradient_batch_size) == (3, 16, 16), "12 make four groups"
    # T = 16, V = 64, d = 32, MLP 48: 4 * 16 * (3 * 64 + 320 + 192) = 45,056 bytes a sample, with two blocks'
    # activations 4 * 16 * (3 * 64 + 2 * 512) = 77,824
    monkeypatch.setattr("opmix_dist.pool.plan.CPU_BYTES", 10 * 45_056 + 1)
    (tmp_path / "evaluation.json").unlink()
    plan = planner(tmp_path, trials(), method="lowrank").decide(gradients=True)
    assert (plan.method, plan.joint, plan.batch_size, plan.gradient_batch_size) == ("lowrank", 3, 3, 5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"batch_size": 3, "joint": 2}, (2, 3)),
        ({"batch_size": 3}, (3, 3)),
        ({"batch_size": 3, "count": 40}, (4, 3)),
        ({"batch_size": 3, "count": 5}, (2, 3)),
        ({"joint": 2}, (2, 16)),
        ({"joint": 64}, (64, 1)),
        ({"method": "merge", "joint": 8}, (1, 16)),
    ],
)
def test_what_is_set_is_done(tmp_path: Path, settings: dict[str, Any], expected: tuple[int, int]) -> None:
    plan = planner(tmp_path, trials(), **{"method": "lowrank", **settings}).decide(gradients=False)
    assert (plan.joint, plan.batch_size) == expected
    assert plan.gradient_batch_size is None


def test_a_plan_is_kept_for_the_same_settings_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "evaluation.json"
    merging = {"method": "merge"}
    first = planner(tmp_path, trials(), **merging).decide(gradients=False)
    edited = first.model_copy(update={"joint": 3, "batch_size": 5})
    file.write_text(edited.model_dump_json())
    assert planner(tmp_path, trials(), **merging).decide(gradients=False) == edited
    with_gradients = planner(tmp_path, trials(), **merging).decide(gradients=True)
    assert (with_gradients.joint, with_gradients.gradient_batch_size) == (3, 16), "the rest stays"
    assert read_record(file, EvaluationPlan) == with_gradients
    assert planner(tmp_path, trials(), joint=4).decide(gradients=False).batch_size == 16
    assert planner(tmp_path, trials(samples=25), joint=4).decide(gradients=False).batch_size == 16
    for damage in ("", "{", json.dumps({**first.model_dump(), "method": "guess"}), "[1]"):
        file.write_text(damage)
        caplog.clear()
        assert planner(tmp_path, trials(), **merging).decide(gradients=False) == first
        assert "decided anew" in caplog.text


class Memory:
    """A GPU of so many bytes, of which a model takes ``fixed``, a sample ``each``, and more than ``most``
    samples do not fit whatever the peaks say."""

    def __init__(self, fixed: int, each: int, most: int = 10**9) -> None:
        self.fixed, self.each, self.most = fixed, each, most
        self.tried: list[int] = []

    def __call__(self, samples: int) -> int:
        self.tried.append(samples)
        if samples > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.fixed + samples * self.each


def test_passes_fill_nine_tenths_of_the_memory() -> None:
    memory = Memory(fixed=100, each=7)
    assert largest_fit(memory, 1000, 500) == 114, "100 + 7 n <= 900"
    assert memory.tried == [1, 1, 2, 114]
    assert largest_fit(Memory(100, 7), 1000, 64) == 64
    assert largest_fit(Memory(100, 7), 1000, 1) == 1
    assert largest_fit(Memory(100, 7), 50, 64) == 1, "one ran: more would not"
    assert largest_fit(Memory(100, 0), 1000, 64) == 64


def test_running_out_of_memory_halves_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory(fixed=100, each=7, most=30)
    assert largest_fit(memory, 1000, 500) == 28
    assert memory.tried == [1, 1, 2, 114, 57, 28]
    assert "out of memory with 114 samples in a pass: trying 57" in caplog.text
    assert largest_fit(Memory(100, 7, most=1), 1000, 500) == 1
    with pytest.raises(SearchError, match="one held-out sample"):
        largest_fit(Memory(100, 7, most=0), 1000, 500)


def test_a_plan_is_halved_down_to_one_sample(tmp_path: Path) -> None:
    plan = planner(tmp_path, trials(), method="lowrank", joint=3, batch_size=2).decide(gradients=True)
    sizes = []
    while (smaller := halved(plan)) is not None:
        plan = smaller
        sizes.append((plan.joint, plan.batch_size, plan.gradient_batch_size))
    assert sizes == [(3, 1, 1), (1, 1, 1)]
    smaller = halved(plan.model_copy(update={"gradient_batch_size": 5}))
    assert smaller is not None
    assert smaller.gradient_batch_size == 2, "gradients take more memory than losses: there is more to halve"


def test_every_trial_is_a_sign_of_life(tmp_path: Path) -> None:
    tried, signs = trials(), []
    tried.on_run = lambda: signs.append(tried.tokens)
    planner(tmp_path, tried).measured_method({"lowrank": (2, 3), "merge": (1, 4)})
    tried.run_with_gradients(2)
    assert len(signs) == 3 * 4 + 1, "three kinds, each run once to warm up and three times; gradients"


def test_methods_are_measured_once_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tried = trials()
    planned = planner(tmp_path, tried)
    passes = {"lowrank": (2, 3), "merge": (1, 4)}
    method = planned.measured_method(passes)
    (file,) = (tmp_path / "times").iterdir()
    times = read_record(file, MethodTimes)
    assert method == times.faster(24)
    assert times.measured_for["lowrank_batch"] == 3
    # one run to warm up and three: of 2 x 3 samples, of merging, of 4 samples merged
    assert tried.tokens == 4 * (2 * 3 + 4) * 16
    assert planned.measured_method(passes) == method
    assert tried.tokens == 4 * (2 * 3 + 4) * 16, "measured again"
    for other in ({"lowrank": (2, 4), "merge": (1, 4)}, {"lowrank": (2, 3), "merge": (1, 3)}):
        planned.measured_method(other)
    assert len(list((tmp_path / "times").iterdir())) == 3
    for damage in (b"", b"\xff", file.read_bytes().replace(b'"merge"', b'"marge"', 1)):
        file.write_bytes(damage)
        caplog.clear()
        before = tried.tokens
        planned.measured_method(passes)
        assert tried.tokens > before
        assert "measured again" in caplog.text
        assert read_record(file, MethodTimes).measured_for == times.measured_for


def test_merging_pays_from_the_number_of_samples_where_the_times_cross() -> None:
    times = MethodTimes(measured_for={}, lowrank_per_sample=0.3, merged_per_sample=0.2, merge=2.0)
    assert [times.faster(n) for n in (1, 19, 21, 1000)] == ["lowrank", "lowrank", "merge", "merge"]


def test_times_that_cannot_be_kept_are_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    found = method_times(trials(), {}, lowrank=(1, 1), merged=1, folder=tmp_path / "file" / "times")
    assert found.merge > 0
    assert "cannot be kept" in caplog.text


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "opmix" / "method_times"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "opmix" / "method_times"


def test_kernels_run_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not chosen_kernels("torch", CPU)
    assert not chosen_kernels("auto", CPU), "an interpreter is no GPU"
    assert chosen_kernels("triton", CPU), "but runs them for a test"
    monkeypatch.setattr("opmix_dist.pool.plan.kernels_fault", lambda device: "no GPU here")
    with pytest.raises(UserError, match="search.kernels is triton, but no GPU here: set it to auto or torch"):
        chosen_kernels("triton", CPU)
    assert compute.kernels_fault(CPU) is None


def test_a_gpu_without_kernels_takes_plain_torch_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("opmix_dist.pool.plan.kernels_fault", lambda device: "no configurations for this GPU")
    with caplog.at_level(logging.INFO):
        assert not chosen_kernels("auto", torch.device("cuda"))
    assert "search.kernels: torch, since no configurations for this GPU" in caplog.text


@pytest.mark.parametrize(
    ("device", "engine", "wanted", "expected"),
    [
        ("cpu", "bfloat16", "auto", "float32"),
        ("cuda", "bfloat16", "auto", "bfloat16"),
        ("cuda", "float32", "auto", "float32"),
        ("cpu", "float32", "bfloat16", "bfloat16"),
        ("cuda", "bfloat16", "float32", "float32"),
    ],
)
def test_the_dtype_of_simulated_models(
    tmp_path: Path, device: str, engine: str, wanted: str, expected: str
) -> None:
    config = check_config(
        tiny_config(
            tmp_path, tmp_path, engine={"param_dtype": engine}, search={"candidates": {"dtype": wanted}}
        )
    )
    assert chosen_dtype(config, torch.device(device), tiny_llama()) == expected


def test_flash_attention_is_in_16_bits(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config._attn_implementation = "flash_attention_2"
    config = check_config(tiny_config(tmp_path, tmp_path, engine={"param_dtype": "bfloat16"}))
    assert chosen_dtype(config, CPU, model) == "bfloat16"
    sections = {"engine": {"param_dtype": "bfloat16"}, "search": {"candidates": {"dtype": "float32"}}}
    with pytest.raises(UserError, match=r"computes in 16 bits: set search.candidates.dtype"):
        check_config(tiny_config(tmp_path, tmp_path, model={"attention": "flash_attention_2"}, **sections))


def test_a_search_that_takes_gradients_goes_by_lowrank_terms_throughout(tmp_path: Path) -> None:
    tried = trials(samples=24, length=16)
    assert planner(tmp_path, tried).decide(gradients=False).method == "merge"
    assert planner(tmp_path, tried).decide(gradients=True).method == "lowrank"
    assert planner(tmp_path, tried, method="merge").decide(gradients=True).method == "merge", "as it is set"
