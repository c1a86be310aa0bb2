"""The configuration: overrides, unknown keys, documented output, what a resume may change."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from opmix_dist.config import RESUME_MAY_CHANGE, RunConfig, check_config, load_config
from opmix_dist.errors import UserError
from opmix_dist.settings import changed_settings, fields, to_yaml

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
CONFIGS = [path for path in CONFIGS if path.name != "fit.yaml"]  # tests/fit loads that
DEMO = Path(__file__).parent.parent / "configs" / "demo.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    config = load_config(path)
    assert 1 <= config.search_step < config.train.steps


@pytest.mark.parametrize("documented", [True, False])
def test_printed_configuration_loads_back(documented: bool) -> None:
    config = load_config(DEMO, ["--mixture.initial", "{python: 0.5, cpp: 0.5}", "--optimizer.eps=1e-9"])
    assert check_config(yaml.safe_load(to_yaml(config, documented=documented))) == config


def test_every_setting_is_documented() -> None:
    undocumented = [key for key, field in fields(RunConfig) if not field.description]
    assert undocumented == []


def test_paper_values_are_the_defaults() -> None:
    search = load_config(DEMO, ["--search", "{}"]).search
    probes = search.probes
    assert (probes.steps, probes.rank, probes.alpha, probes.dropout) == (5000, 16, 32, 0.05)
    assert (probes.lr_multiplier, probes.domain_share) == (2.0, 0.9)
    assert (search.start_fraction, search.law.huber_delta, search.proposal.kl) == (0.2, 0.02, 0.05)
    assert search.candidates.count in range(12, 21)


def test_overrides_are_typed_and_nested() -> None:
    config = load_config(
        DEMO, ["--train.steps", "30", "--optimizer.lr=1e-3", "--data.domains", "[cpp, json]", "--seed=7"]
    )
    assert (config.train.steps, config.optimizer.lr, config.data.domains) == (30, 1e-3, ["cpp", "json"])
    assert config.seed == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--search.probes.step=3", "`search.probes.step`: the nearest valid one is `search.probes.steps`"),
        ("--trian.steps=3", "unknown setting `trian`: the nearest valid one is `train`"),
        ("--train.steps=many", "setting `train.steps`: .*integer.*'many'"),
        ("--train.steps=0", "setting `train.steps`: .*greater than or equal to 1"),
        ("--train.micro_batch_size=7", "train.global_batch_size 16 must be a multiple of"),
        ("--mixture.policy=best", "setting `mixture.policy`: .*'static' or 'opmix'.*'best'"),
        ("--model.checkpoint=x", "give exactly one of model.checkpoint and model.config"),
        ("--pool.external=true", "pool.external is a launch of its own"),
        ("--data.max_epochs={json: 2, cpp: 0}", "data.max_epochs.cpp is 0: give more than 0 epochs"),
        ("--data.max_epochs=-1", "data.max_epochs is -1: give more than 0 epochs"),
        ("--data.max_epochs=often", "^setting `data.max_epochs`: .*valid number.*'often'"),
        ("--data.root=s3://bucket/data", "data.root s3://bucket/data is remote: set data.cache"),
        ("--data.cache_limit=much", "setting `data.cache_limit`: could not parse.*'much'"),
        ("--data.cache_limit=1GB", "data.cache_limit bounds data.cache, which is not set"),
        ("--data.cache_limit=0", "setting `data.cache_limit`: .*greater than 0"),
        ("--model.attention=flash_attention_2", "^model.attention flash_.* engine.param_dtype to bfloat16"),
        ("--seed", "setting `seed` has no value"),
        ("seed=3", "`seed=3` is not a setting"),
    ],
)  # fmt: skip
def test_mistakes_are_named_on_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config(DEMO, [override])
    assert "\n" not in str(error.value)


def test_a_limit_of_the_cache_is_bytes_with_or_without_a_unit() -> None:
    remote = ["--data.root=s3://bucket/data", "--data.cache=/scratch"]
    for text, expected in (("200GB", 200 * 10**9), ("1.5 TiB", 3 * 2**39), ("4096", 4096)):
        assert load_config(DEMO, [*remote, f"--data.cache_limit={text}"]).data.cache_limit == expected


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the configuration .*nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [1,")
    with pytest.raises(UserError, match="broken.yaml is not valid YAML"):
        load_config(broken)
    broken.write_text("- 1")
    with pytest.raises(UserError, match="must hold a mapping"):
        load_config(broken)


def test_a_resume_may_change_only_what_keeps_the_order_and_the_losses() -> None:
    old = load_config(DEMO)
    free = [
        "--pool.ranks=0", "--checkpoint.keep=9", "--train.micro_batch_size=4", "--run_dir=elsewhere",
        "--train.global_batch_size=32", "--data.root=s3://bucket", "--data.cache=/scratch",
        "--data.cache_limit=1GB", "--data.verify_shards=always", "--data.fetch_threads=1",
        "--data.fetch_ahead=0", "--data.fetch_timeout_s=1", "--data.max_epochs={cpp: 2}",
        "--data.on_exhausted=renormalize",
    ]  # fmt: skip
    assert changed_settings(old, load_config(DEMO, free), RESUME_MAY_CHANGE) == []
    bound = [
        "--seed=1", "--data.shuffle_block=9", "--data.mask_documents=true", "--optimizer.lr=1",
        "--search.probes.steps=9",
    ]  # fmt: skip
    assert changed_settings(old, load_config(DEMO, bound), RESUME_MAY_CHANGE) == [
        "seed", "data.shuffle_block", "data.mask_documents", "optimizer.lr", "search.probes.steps",
    ]  # fmt: skip
