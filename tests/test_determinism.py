"""What deterministic mode sets, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor

from opmix_dist.config import RunConfig, check_config
from opmix_dist.determinism import (
    ENVIRONMENT,
    require_repeatable_run,
    require_repeatable_search,
    use_deterministic_kernels,
)
from opmix_dist.errors import UserError
from tests.train.jobs import tiny_config


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def config(**sections: Any) -> RunConfig:
    return check_config(tiny_config(Path("data"), Path("run"), deterministic=True, **sections))


def test_every_library_is_told(restored: None) -> None:
    use_deterministic_kernels()
    assert {name: os.environ[name] for name in ENVIRONMENT} == ENVIRONMENT
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert inductor.deterministic, "torch.compile would choose kernels by timing them"


def test_an_environment_that_asks_for_the_opposite_is_named(
    restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_deterministic_kernels()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "as good"
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    with pytest.raises(UserError, match="NCCL_NVLS_ENABLE=0 in the environment, not 1"):
        use_deterministic_kernels()


def test_a_switch_at_any_step_is_refused() -> None:
    require_repeatable_run(config())
    asynchronous = config(search={"mode": "async"})
    with pytest.raises(UserError, match=r"search\.mode async"):
        require_repeatable_run(asynchronous)
    require_repeatable_run(config(search={"mode": "async"}, mixture={"policy": "static"}))
    require_repeatable_run(asynchronous.model_copy(update={"deterministic": False}))


def test_what_a_gpu_is_measured_for_is_refused() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    require_repeatable_search(config(), cpu)
    with pytest.raises(UserError, match=r"search\.candidates\.method auto"):
        require_repeatable_search(config(), cuda)
    chosen = {"method": "lowrank", "joint": 4, "batch_size": 8}
    require_repeatable_search(config(search={"candidates": chosen}), cuda)


def test_deepspeeds_overlap_is_refused() -> None:
    pytest.importorskip("deepspeed")
    from opmix_dist.engines.deepspeed import DeepSpeedEngine

    zero = {"stage": 2, "overlap_comm": True}
    engine = {"name": "deepspeed", "deepspeed": {"config": {"zero_optimization": zero}}}
    with pytest.raises(UserError, match=r"zero_optimization\.overlap_comm does not go with deterministic"):
        DeepSpeedEngine.check(config(engine=engine), 2)
    zero["overlap_comm"] = False
    DeepSpeedEngine.check(config(engine=engine), 2)
