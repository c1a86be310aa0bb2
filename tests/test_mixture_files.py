"""Each form of a mixture is loaded by the library that it is for, and what that library draws is counted."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from opmix_dist.errors import UserError
from opmix_dist.mixture_files import FORMATS, MixtureSource, mixture_text, parse_sources, write_mixture_files
from tests.data.shard_files import write_split
from tests.helpers import ROOT

WEIGHTS = {"web": 0.15, "code": 0.55, "math": 0.3, "unused": 0.0}


def sources(folder: Path) -> dict[str, MixtureSource]:
    """Two places for code, none for the domain that is not read."""
    return {
        "web": MixtureSource((f"{folder}/web one",)),
        "code": MixtureSource((f"{folder}/code-a", f"{folder}/code-b")),
        "math": MixtureSource((f"{folder}/math",)),
    }


def test_all_formats_are_written_with_their_shares(tmp_path: Path) -> None:
    files = write_mixture_files(tmp_path / "out", WEIGHTS, sources(tmp_path))
    assert [file.name for file in files] == [name for name, _ in FORMATS.values()]
    assert sorted(files) == sorted((tmp_path / "out").iterdir())
    assert json.loads((tmp_path / "out/mixture.json").read_text()) == WEIGHTS
    assert yaml.safe_load((tmp_path / "out/mixture.yaml").read_text()) == WEIGHTS


def test_megatron_text_by_hand() -> None:
    text = mixture_text(
        "megatron", {"a": 0.25, "b": 0.75, "c": 0.0}, {"b": MixtureSource(("/d/x y", "/d/z"))}
    )
    assert text == "0.25 a 0.375 '/d/x y' 0.375 /d/z\n"


def test_megatron_reads_its_blend(tmp_path: Path) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
    from megatron.core.datasets.utils import get_blend_from_list

    blend = get_blend_from_list(shlex.split(mixture_text("megatron", WEIGHTS, sources(tmp_path))))
    assert blend is not None
    prefixes, weights = blend
    assert prefixes == [f"{tmp_path}/web one", f"{tmp_path}/code-a", f"{tmp_path}/code-b", f"{tmp_path}/math"]
    assert weights == [0.15, 0.275, 0.275, 0.3]
    config = BlendedMegatronDatasetConfig(
        random_seed=0,
        sequence_length=8,
        blend=blend,
        split="100,0,0",
        tokenizer=None,
        mid_level_dataset_surplus=0,
    )
    assert config.blend == blend


def test_megatron_draws_the_shares(tmp_path: Path) -> None:
    """With the index that its blended dataset builds from the weights."""
    from megatron.core.datasets import helpers_cpp
    from megatron.core.datasets.utils import get_blend_from_list, normalize

    blend = get_blend_from_list(shlex.split(mixture_text("megatron", WEIGHTS, {})))
    assert blend is not None
    weights = normalize(blend[1])
    size = 2000
    dataset, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers_cpp.build_blending_indices(dataset, sample, weights, len(weights), size, False)
    counts = Counter(dataset.tolist())
    assert [counts[i] for i in range(3)] == pytest.approx([300, 1100, 600], abs=1)


def test_olmo_core_reads_its_source_list(tmp_path: Path) -> None:
    from olmo_core.data.source_mixture import SourceMixtureDatasetConfig, SourceMixtureList
    from olmo_core.data.types import NumpyDatasetDType

    given = sources(tmp_path)
    for source in given.values():
        for path in source.paths:
            np.zeros(40_000, np.uint16).tofile(path)
    (file,) = (one for one in write_mixture_files(tmp_path / "out", WEIGHTS, given) if "olmo" in one.name)
    loaded = SourceMixtureList.from_yaml(file)
    loaded.validate()
    for one in loaded.sources:
        one.validate()
    assert {one.source_name: one.target_ratio for one in loaded.sources} == {
        name: weight for name, weight in WEIGHTS.items() if weight
    }
    config = SourceMixtureDatasetConfig(
        source_list=loaded, requested_tokens=20_000, global_batch_size=80, render_tables=False, quiet=True
    )
    mixture = config.build(npdtype=NumpyDatasetDType.uint16.as_np_dtype(), sequence_length=8)
    drawn = {one.name: sum(path.tokens for path in one.path_tokens) for one in mixture.sources}
    assert drawn == pytest.approx({"web": 3000, "code": 11_000, "math": 6000}, abs=8)


_STREAMING = """
import json, sys, yaml
from collections import Counter
from opmix_dist.data.mds import import_streaming
import_streaming()
from streaming import Stream, StreamingDataset
streams = yaml.safe_load(open(sys.argv[1]))["streams"]
dataset = StreamingDataset(
    streams=[Stream(**one) for one in streams.values()], epoch_size=400, batch_size=1, num_canonical_nodes=1
)
print(json.dumps(dict(Counter(int(row["tokens"][0]) for row in dataset))))
"""


@pytest.mark.usefixtures("streaming")
def test_streaming_draws_the_shares_of_its_streams(tmp_path: Path) -> None:
    folders = {"web": ("web",), "code": ("code-a", "code-b"), "math": ("math",)}
    given = {name: MixtureSource(tuple(str(tmp_path / f) for f in found)) for name, found in folders.items()}
    given["math"] = MixtureSource(remote=str(tmp_path / "math"), local=str(tmp_path / "cache"))
    for domain, (_, found) in enumerate(folders.items()):
        for folder in found:
            write_split(tmp_path / folder, domain, 50)
    file = tmp_path / "streams.yaml"
    file.write_text(mixture_text("streams", WEIGHTS, given))
    single = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _STREAMING, str(file)],
        env={**os.environ, **single, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    # each stream's share is rounded to a whole sample
    assert [counts[str(i)] for i in range(3)] == pytest.approx([60, 220, 120], abs=2)


def test_interleave_datasets_draws_the_probabilities(tmp_path: Path) -> None:
    from datasets import Dataset, interleave_datasets

    given = json.loads(mixture_text("interleave", WEIGHTS, sources(tmp_path)))
    assert given["domains"] == ["web", "code", "math"]
    assert given["datasets"] == [
        f"{tmp_path}/web one",
        [f"{tmp_path}/code-a", f"{tmp_path}/code-b"],
        f"{tmp_path}/math",
    ]
    datasets = [Dataset.from_dict({"domain": [name] * 4000}) for name in given["domains"]]
    mixed = interleave_datasets(datasets, probabilities=given["probabilities"], seed=0)
    counts = Counter(row["domain"] for row in islice(mixed, 4000))
    # three standard deviations of a count of 4,000 draws are below 95
    assert [counts[name] for name in given["domains"]] == pytest.approx([600, 2200, 1200], abs=95)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40).filter(lambda values: math.fsum(values) > 1e-3))
def test_shares_sum_to_one_in_every_format(values: list[float]) -> None:
    weights = {f"d{i}": value / math.fsum(values) for i, value in enumerate(values)}
    texts = {name: mixture_text(name, weights, {"d0": MixtureSource(("p", "q", "r"))}) for name in FORMATS}
    olmo, streams = (yaml.safe_load(texts[name]) for name in ("olmo-core", "streams"))
    shares = {
        "megatron": [float(word) for word in texts["megatron"].split()[::2]],
        "olmo-core": [one["target_ratio"] for one in olmo["sources"]],
        "streams": [one["proportion"] for one in streams["streams"].values()],
        "interleave": json.loads(texts["interleave"])["probabilities"],
        "json": list(json.loads(texts["json"]).values()),
        "yaml": list(yaml.safe_load(texts["yaml"]).values()),
    }
    assert shares.keys() == FORMATS.keys()
    for name, found in shares.items():
        assert abs(math.fsum(found) - 1) < 1e-12, name


def test_placeholders_are_named_where_a_format_has_comments() -> None:
    for name in ("olmo-core", "streams"):
        text = mixture_text(name, {"a": 0.5, "b": 0.5}, {"a": MixtureSource(("/data/a",))})
        assert text.startswith('# The names of these domains stand in for their paths: ["b"]\n')
        whole = mixture_text(name, {"a": 1.0}, {"a": MixtureSource(("/data/a",))})
        assert "#" not in whole


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 0.5, "b": 0.4}, "these sum to 0.9"),
        ({"a": -0.1, "b": 1.1}, "weight of a is -0.1"),
        ({"a": math.nan, "b": 1.0}, "weight of a is nan"),
    ],
)
def test_what_is_no_mixture_is_refused(tmp_path: Path, weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_mixture_files(tmp_path / "out", weights, {})
    assert not (tmp_path / "out").exists()


def test_sources_are_parsed_and_must_belong_to_the_mixture() -> None:
    found = parse_sources(["web=/a=b", "web=/c", "code=s3://bucket/code"])
    assert found == {"web": MixtureSource(("/a=b", "/c")), "code": MixtureSource(("s3://bucket/code",))}
    streams = yaml.safe_load(mixture_text("streams", {"web": 0.5, "code": 0.5}, found))["streams"]
    assert streams == {
        "web-0": {"local": "/a=b", "proportion": 0.25},
        "web-1": {"local": "/c", "proportion": 0.25},
        "code": {"remote": "s3://bucket/code", "proportion": 0.5},
    }
    with pytest.raises(UserError, match="--source web: write NAME=PATH"):
        parse_sources(["web"])
    with pytest.raises(UserError, match="source cod: the mixture has no such domain; it has code, web"):
        mixture_text("json", {"web": 0.5, "code": 0.5}, parse_sources(["cod=x"]))
