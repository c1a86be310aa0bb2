"""The configuration: overrides, unknown keys, documented output, what a resume may change."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from opmix_dist.config import (
    RESUME_MAY_CHANGE,
    SEARCH_MAY_CHANGE,
    RunConfig,
    SearchRunConfig,
    check_config,
    load_config,
    load_search_config,
)
from opmix_dist.errors import UserError
from opmix_dist.settings import changed_settings, fields, to_yaml

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
# tests/fit, tests/lifecycle and tests/validate load theirs, the search alone is below
OTHERS = ("fit.yaml", "search.yaml", "lifecycle-tiny.yaml", "validate_gpu.yaml")
CONFIGS = [path for path in CONFIGS if path.name not in OTHERS]
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


def test_the_shipped_search_loads_and_prints() -> None:
    config, unused = load_search_config(DEMO.with_name("search.yaml"))
    assert unused == []
    printed = yaml.safe_load(to_yaml(config, documented=True))
    assert SearchRunConfig.model_validate(printed) == config
    assert [key for key, field in fields(SearchRunConfig) if not field.description] == []


def test_a_search_takes_the_configuration_of_a_training_run() -> None:
    overrides = ["--model", "{checkpoint: runs/base/export/hf}", "--tokens_to_train=1000000"]
    config, unused = load_search_config(DEMO, overrides)
    assert unused == ["schedule", "train", "checkpoint", "pool.ranks", "pool.threads"]
    run = load_config(DEMO)
    assert (config.search, config.data, config.optimizer) == (run.search, run.data, run.optimizer)
    assert config.tokens_to_train == 1_000_000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "a search starts from a trained model: set model.checkpoint"),
        (["--search.proposal.max_repetitions=2"], "max_repetitions needs tokens_to_train"),
        (["--tokens=3"], "unknown setting `tokens`: the nearest valid one is `tokens_to_train`"),
        (
            ["--search.proposal.max_increase={json: -1}"],
            "^setting `search.proposal.max_increase`: .*equal to 0",
        ),
        (["--search.law.family=lightgbm"], "^setting `search.law.family`: .*'trees'.*'lightgbm'"),
    ],
)
def test_mistakes_of_a_search_are_named(overrides: list[str], message: str) -> None:
    base = [] if not overrides else ["--model", "{checkpoint: runs/base/export/hf}"]
    with pytest.raises(UserError, match=message):
        load_search_config(DEMO, [*base, *overrides])


def test_a_search_may_be_asked_again_with_other_laws_and_bounds() -> None:
    base = ["--model", "{checkpoint: base}"]
    old, _ = load_search_config(DEMO, base)
    free = ["--search.proposal.kl=0.1", "--search.candidates.count=40", "--search.law.family=auto",
            "--engine.device=cpu", "--tokens_to_train=9"]  # fmt: skip
    assert changed_settings(old, load_search_config(DEMO, [*base, *free])[0], SEARCH_MAY_CHANGE) == []
    bound = ["--search.probes.steps=9", "--optimizer.lr=1", "--mixture.initial=natural"]
    assert changed_settings(old, load_search_config(DEMO, [*base, *bound])[0], SEARCH_MAY_CHANGE) == [
        "optimizer.lr", "mixture.initial", "search.probes.steps",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("proposal", "message"),
    [
        ({"floors": {"web": 0.1}}, "search.proposal.floors names `web`, which is no domain of data"),
        ({"max_increase": {"web": 0.1}}, "search.proposal.max_increase names `web`"),
        ({"floors": {"json": 0.5}, "caps": {"json": 0.4}}, "floors.json is 0.5, above its cap 0.4"),
        ({"floors": {"json": 0.5, "cpp": 0.6}}, "search.proposal.floors sum to 1.1"),
        ({"omega": {"json": 1.0}}, "search.proposal.omega has no weight for `cpp`"),
    ],
)
def test_settings_by_domain_are_checked_against_the_data(proposal: dict, message: str) -> None:
    config = load_config(DEMO, [f"--search.proposal={yaml.safe_dump(proposal, default_flow_style=True)}"])
    with pytest.raises(UserError, match=message):
        config.search.check_domains(["json", "cpp"], "data")
