"""What trainers write and what comparisons read are the same: two real stages, each in two ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from opmix_dist.config import check_config
from opmix_dist.exchange.heldout import FILE as HELD_OUT
from opmix_dist.exchange.heldout import HeldOutLosses
from opmix_dist.exchange.rundir import RunDir, read_record
from opmix_dist.report.comparable import checks
from opmix_dist.report.compare_tables import cells
from opmix_dist.report.compared import LOSSES, Compared
from opmix_dist.report.courses import read_course
from opmix_dist.report.groups import group_by_settings
from opmix_dist.train.roles import run_job
from tests.conftest import DOMAINS
from tests.train.jobs import tiny_config

FIRST, LATER = list(DOMAINS[:2]), list(DOMAINS[2:])
TRAIN = {"steps": 6, "micro_batch_size": 8, "eval_interval_steps": 0, "eval_at_start": True}


def stage(root: Path, folder: Path, data: dict[str, object], **sections: object) -> RunDir:
    config = tiny_config(root, folder, pool={"ranks": 0}, checkpoint={"interval_steps": 0}, **sections)
    config["data"] |= data
    run_job(check_config(config))
    return RunDir(folder)


@pytest.fixture(scope="module")
def lives(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two lifecycles, of which the second goes on from the first one's first stage: on new domains only, and
    with some of the old."""
    root = tmp_path_factory.mktemp("lives")
    first = stage(
        tiny_data,
        root / "naive" / "stages" / "first",
        train=TRAIN,
        data={"domains": FIRST, "watch": LATER},
        mixture={"policy": "static"},
    )
    (root / "replay" / "stages").mkdir(parents=True)
    (root / "replay" / "stages" / "first").symlink_to(first.path)
    for name, mixture in (("naive", {"new": 1.0}), ("replay", {"old": 0.5, "new": 0.5})):
        stage(
            tiny_data,
            root / name / "stages" / "second",
            data={"domains": list(DOMAINS)},
            train=TRAIN,
            mixture={"policy": "static", "initial": mixture},
            start={"run": str(first.path)},
            model={"config": None},
        )
        described = {"stages": [{"name": "first"}, {"name": "second"}]}
        (root / name / "lifecycle.yaml").write_text(yaml.safe_dump(described))
    return [root / "naive", root / "replay"]


def test_a_stage_begins_where_the_one_before_ended(lives: list[Path]) -> None:
    course = read_course(lives[0])
    matrix = course.losses
    joins = dict(zip(matrix.domains, matrix.joined.tolist(), strict=True))
    assert joins == dict.fromkeys(FIRST, 1) | dict.fromkeys(LATER, 2)
    assert np.isfinite(matrix.values).all()
    before = [course.last.before[name] for name in matrix.domains]
    assert before == pytest.approx(matrix.values[1].tolist(), rel=1e-5), "the same weights, the same samples"
    read = [sum(one.summary.domain_tokens.values()) for one in course.stages]
    assert course.tokens == sum(read)
    assert course.last.summary.history == course.stages[0].summary.domain_tokens
    assert course.costs["train"].flops == sum(one.summary.costs["train"].flops for one in course.stages)
    assert course.costs["held-out evaluation"].tokens > 0


def test_the_samples_losses_are_those_of_the_domains(lives: list[Path]) -> None:
    run = RunDir(lives[0] / "stages" / "first")
    kept = read_record(run.eval_file.with_name(HELD_OUT), HeldOutLosses).domains
    for name, loss in run.summary().final_loss.items():
        assert sum(kept[name].sums) / sum(kept[name].targets) == pytest.approx(loss, rel=1e-6)


def test_they_are_compared_sample_by_sample(lives: list[Path]) -> None:
    groups = group_by_settings([read_course(path) for path in lives])
    assert [group.name for group in groups] == ["naive", "replay"]
    found = {check.what: check for check in checks(groups)}
    assert all(check.same for check in found.values()), found
    assert "mixtures of replay from second, step 0 on" in found["data order"].text
    compared = Compared.of(groups, 0.95)
    for name in DOMAINS:
        row = compared.row(LOSSES, name)
        assert row is not None
        (by_seed,), (by_sample,) = row.differences, row.sampled
        assert by_seed is not None
        assert by_sample[0].mean == pytest.approx(by_seed.mean, abs=1e-6)
        assert by_sample[0].stderr > 0
        assert "±" in cells(row)[-1]
