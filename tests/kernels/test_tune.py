"""Tuning: what is timed, what is chosen and what the file says, in the interpreter at tiny shapes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from opmix_kernels import merge, runtime, tune
from opmix_kernels.runtime import Config, Kernel
from opmix_kernels.tune import Measured, Shapes, Tuned, choose
from tests.kernels.checking import DEVICE

TINY = Shapes(d_in=16, d_out=16, adapters=2, rank=4, candidates=2, tokens=4, vocabulary=20, consumers=2)


@triton.jit
def count_kernel(X, N, BLOCK: tl.constexpr):
    """Wrong with blocks of 64: they add 2."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    step: tl.constexpr = 2 if BLOCK == 64 else 1
    tl.store(X + index, tl.load(X + index, mask=index < N) + step, mask=index < N)


CONFIGS = [Config({"BLOCK": size}) for size in (16, 32, 64, 128)]
COUNT = Kernel(count_kernel, {a: {4: CONFIGS} for a in runtime.ARCHITECTURES}, is_product=False)


def counted(runs: list[int]) -> Sequence[Tensor]:
    """Two launches of one shape and one of another; blocks of 128 do not fit the device."""
    x = torch.zeros(5, device=DEVICE)
    size = COUNT.config(x, "n5").blocks["BLOCK"]
    if size == 128:
        raise OutOfResources(300_000, 232_448, "shared memory")
    for key in ("n5", "n5", "other"):
        COUNT((1,), like=x, key=key, constexprs={}, X=x, N=5)
    runs.append(size)
    return [x]


def test_every_configuration_is_compared_and_timed() -> None:
    runs: list[int] = []
    tuned = tune.tune(lambda: counted(runs), 1e-5, DEVICE, repeats=3)
    keys = [f"count_kernel {runtime.architecture_of(DEVICE)} 4 {shape}" for shape in ("n5", "other")]
    assert list(tuned.measured) == keys
    # once to see what is launched; for each key: each one checked, and timed three times if it is right
    assert runs == [16] + 2 * (4 * [16] + 4 * [32] + [64])
    for key in keys:
        good, other, wrong, too_large = tuned.measured[key]
        assert good.seconds is not None
        assert other.seconds is not None
        assert good.seconds > 0
        assert good.error == other.error == 0.0
        assert (wrong.seconds, wrong.error) == (None, 1.0)  # 6 in place of 3
        assert too_large.seconds is None
        assert "shared memory" in too_large.remark
        assert tuned.choices[key] in (0, 1)
    assert [line.split(": ")[0] for line in tuned.wrong] == keys


@pytest.mark.parametrize(
    ("seconds", "index"),
    [
        ([1.0, 0.5, 0.4], 2),
        ([1.0, 0.99, 1.2], 0),  # within the noise
        ([1.0], 0),
        ([None, 0.7, 0.6], 2),  # the default does not fit
        ([1.0, None], 0),
        ([None, None], 0),
    ],
)
def test_the_fastest_is_chosen_if_it_is_clearly_faster(seconds: list[float | None], index: int) -> None:
    assert choose([Measured("", seconds=s) for s in seconds]) == index


def test_the_operations_launch_every_kernel() -> None:
    """All but those for one architecture only."""
    launched = set()

    @contextmanager
    def watch(kernel: Kernel, key: str) -> Iterator[None]:
        launched.add(kernel.name)
        yield

    with runtime.watching(watch):
        for name, operation in tune.operations(TINY, torch.float32, DEVICE).items():
            assert all(result.isfinite().all() for result in operation()), name
    everywhere = {k.name for k in runtime.shipped_kernels() if set(k.shipped) == set(runtime.ARCHITECTURES)}
    assert launched == everywhere


def test_the_file_is_what_launches_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = runtime.architecture_of(DEVICE)
    small = [Config({"BN": 16, "BD": 16}), Config({"BN": 16, "BD": 32})]
    monkeypatch.setattr(merge.MERGE, "shipped", {architecture: {4: small}})
    file = tmp_path / "tuning.json"
    options = {"d-in": 16, "d-out": 16, "adapters": 2, "rank": 4, "candidates": 2, "repeats": 1}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr(
        sys, "argv", ["tune", f"--out={file}", "--only=merge_deltas", "--dtype=float32", *arguments]
    )
    tune.main()
    key = f"merge_kernel {architecture} 4 16x16 C2 r4"
    content = json.loads(file.read_text())
    assert content["triton"] == triton.__version__
    assert list(content["choices"]) == [key]
    assert [m["config"] for m in content["measured"][key]] == [str(config) for config in small]
    other = key.replace("16x16", "8x8")
    tune.write(file, [Tuned(choices={other: 1})], DEVICE)
    assert set(runtime.read_tuning(file)) == {key, other}  # what was there stays

    monkeypatch.setenv(runtime.TUNING_FILE, str(file))
    runtime._tuned.cache_clear()
    try:
        assert merge.MERGE.config(torch.zeros(1, device=DEVICE), "8x8 C2 r4") == small[1]
    finally:
        runtime._tuned.cache_clear()


def test_what_is_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tuning.json"
    monkeypatch.setattr(
        sys, "argv", ["tune", f"--out={file}", "--only=merging", "--d-in=16", "--vocabulary=20"]
    )
    with pytest.raises(SystemExit, match="no operation is called merging: merge_deltas"):
        tune.main()
    file.write_text('{"choices": {"merge_kernel sm_80 4 8x8 C2 r4": 7}}')
    with pytest.raises(ValueError, match="has 7 for 'merge_kernel sm_80 4 8x8 C2 r4'"):
        tune.write(file, [], DEVICE)
    monkeypatch.setattr(tune, "available", lambda device: False)
    with pytest.raises(SystemExit, match="there is none"):
        tune.main()
