"""Which configuration a launch gets, and what tuning files may say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from opmix_kernels import runtime
from opmix_kernels.runtime import Config, Kernel, _architecture_named, read_tuning
from tests.kernels.checking import DEVICE


@triton.jit
def twice_kernel(X, N, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + index, 2 * tl.load(X + index, mask=index < N), mask=index < N)


LARGE, MIDDLE, LITTLE = (Config({"BLOCK": size}) for size in (64, 32, 16))
TWICE = Kernel(
    twice_kernel, {a: {4: [LARGE, MIDDLE, LITTLE]} for a in runtime.ARCHITECTURES}, is_product=False
)


@pytest.fixture
def tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Path of the tuning file that launches read."""
    runtime._tuned.cache_clear()
    monkeypatch.setenv(runtime.TUNING_FILE, str(tmp_path / "tuning.json"))
    yield tmp_path / "tuning.json"
    runtime._tuned.cache_clear()


@dataclass
class Device:
    """What torch says of a GPU."""

    major: int
    shared_memory_per_block_optin: int
    name: str = "some GPU"


@pytest.mark.parametrize(
    ("device", "architecture"),
    [
        (Device(8, 166_912), "sm_80"),  # A100
        (Device(8, 101_376), "sm_86"),  # A10, RTX 3090, L40S, RTX 4090
        (Device(9, 232_448), "sm_90"),  # H100
        (Device(10, 232_448), "sm_90"),  # B200
        (Device(12, 101_376), "sm_86"),  # RTX 5090
    ],
)
def test_architectures(device: Device, architecture: str) -> None:
    assert _architecture_named(device) == architecture


def test_an_older_gpu_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"no kernel configurations for Tesla T4.*sm_80, sm_90, gfx942"):
        _architecture_named(Device(7, 65_536, "Tesla T4"))


def test_what_is_shipped_for_a_device() -> None:
    assert TWICE.choices("sm_80", 4) == [LARGE, MIDDLE, LITTLE]
    assert TWICE.choices("sm_80", 8) == [LARGE, MIDDLE, LITTLE]  # float64: as for the largest that is there
    assert TWICE.choices("sm_86", 4) == [LITTLE]  # the last, which must fit 99 KiB


def test_a_tuning_file_chooses_by_shape(tuning: Path) -> None:
    architecture = runtime.architecture_of(DEVICE)
    tuning.write_text(json.dumps({"choices": {f"twice_kernel {architecture} 4 n5 m2": 1}}))
    x = torch.zeros(5, device=DEVICE)
    assert TWICE.config(x, "n5 m2") == MIDDLE
    assert TWICE.config(x, "n5") == LARGE
    assert TWICE.config(x.double(), "n5 m2") == LARGE
    with TWICE.using(LITTLE):
        assert TWICE.config(x, "n5 m2") == LITTLE


WRONG = {
    "no JSON": ("{", "is no tuning file"),
    "no choices": ("{}", "is no tuning file"),
    "a list": ('{"choices": [1]}', "is no tuning file"),
    "not a number": ('{"choices": {"twice_kernel sm_80 4 n5": "fast"}}', "is no tuning file"),
    "kernel": ('{"choices": {"thrice_kernel sm_80 4 n5": 0}}', "the kernel 'thrice_kernel'"),
    "architecture": ('{"choices": {"twice_kernel sm_70 4 n5": 0}}', "'twice_kernel sm_70 4 n5'"),
    "bytes": ('{"choices": {"twice_kernel sm_80 n5": 0}}', "'twice_kernel sm_80 n5'"),
    "index": ('{"choices": {"twice_kernel sm_80 4 n5": 3}}', "3 for 'twice_kernel sm_80 4 n5', of 3"),
    "negative index": ('{"choices": {"twice_kernel sm_80 4 n5": -1}}', "-1 for"),
    "index of a small GPU": ('{"choices": {"twice_kernel sm_86 4 n5": 1}}', "1 for .*, of 1 config"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_tuning_file_that_does_not_fit_is_an_error(what: str, tuning: Path) -> None:
    text, message = WRONG[what]
    tuning.write_text(text)
    with pytest.raises(ValueError, match=f"OPMIX_KERNELS_TUNING: .*tuning.json .*{message}"):
        TWICE.config(torch.zeros(5, device=DEVICE))


def test_a_tuning_file_that_is_not_there_is_an_error(tuning: Path) -> None:
    with pytest.raises(ValueError, match=r"tuning.json is no tuning file: FileNotFoundError"):
        read_tuning(tuning)


def test_launches_are_watched_and_carried_out() -> None:
    seen = []

    @contextmanager
    def watch(kernel: Kernel, key: str) -> Iterator[None]:
        seen.append((kernel.name, key, x.tolist()))
        yield
        seen.append((kernel.name, key, x.tolist()))

    x = torch.ones(3, device=DEVICE)
    with runtime.watching(watch):
        TWICE(lambda b: (triton.cdiv(3, b["BLOCK"]),), like=x, key="n3", constexprs={}, X=x, N=3)
    key = f"twice_kernel {runtime.architecture_of(DEVICE)} 4 n3"
    assert seen == [("twice_kernel", key, [1.0] * 3), ("twice_kernel", key, [2.0] * 3)]
    TWICE((0,), like=x, constexprs={}, X=x, N=3)  # an empty grid is no launch
    TWICE((1,), like=x, constexprs={}, X=x, N=3)
    assert x.tolist() == [4.0] * 3
    assert len(seen) == 2


def test_recorded_launches_are_not_carried_out() -> None:
    x = torch.ones(3, device="meta")
    with runtime.recording("sm_90") as found:
        assert runtime.architecture_of(x.device) == "sm_90"
        TWICE((1,), like=x, constexprs={}, X=x, N=3)
    assert [(launch.kernel, launch.config, launch.itemsize) for launch in found.launches] == [
        (TWICE, LARGE, 4)
    ]


def test_rows_are_views_where_strides_allow() -> None:
    x = torch.zeros(2, 3, 8, device=DEVICE)
    assert runtime.as_rows(x[..., :5]).data_ptr() == x.data_ptr()
    assert runtime.as_rows(x[..., :5]).stride() == (8, 1)
    assert runtime.as_rows(x.transpose(1, 2)).stride() == (3, 1)
    assert runtime.as_rows(x[..., ::2]).stride() == (4, 1)
