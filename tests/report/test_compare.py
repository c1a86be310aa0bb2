"""`opmix compare`: runs and lifecycles over seeds, in numbers by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opmix_dist.cli import main
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.heldout import FILE as HELD_OUT
from opmix_dist.exchange.heldout import HeldOutLosses, sample_losses
from opmix_dist.exchange.rundir import RunDir, write_record
from opmix_dist.exchange.schemas import PhaseCost
from opmix_dist.report.comparable import checks
from opmix_dist.report.compare_tables import cells, markdown, stage_rows, verdicts
from opmix_dist.report.compared import ERRORS, FORGETTING, LOSSES, STAGES, Compared, Row
from opmix_dist.report.courses import read_course
from opmix_dist.report.groups import Group, group_as_named, group_by_settings
from opmix_dist.train.checkpoint import STATE_FILE
from opmix_dist.train.state import TrainerState
from tests.report.runs import DOMAINS, UNIFORM, RunWriter, write_lifecycle
from tests.report.test_html import HOSTILE, Parsed

TRAIN = {"train": PhaseCost(seconds=10, device_seconds=20, flops=6e12, tokens=100_000)}


def run(path: Path, losses: list[float], *, seed: int = 0, **settings: Any) -> RunDir:
    """A finished run on the uniform mixture."""
    writer = RunWriter(path, policy="static", seed=seed, **settings)
    writer.mixture(0, UNIFORM, "initial mixture").evaluation(100, losses)
    return writer.summary(losses, TRAIN).run


def grouped(*runs: RunDir | Path) -> list[Group]:
    return group_by_settings([read_course(r.path if isinstance(r, RunDir) else r) for r in runs])


def row(compared: Compared, section: str, label: str) -> Row:
    found = compared.row(section, label)
    assert found is not None, label
    return found


def test_two_runs_of_one_seed(baseline: RunDir, finished: RunDir):
    compared = Compared.of(grouped(baseline, finished), 0.95)
    # average perplexity (33.115 + 4.482 + 54.598) / 3 = 30.73
    assert cells(row(compared, LOSSES, "web")) == ["3.5000", "3.5200", "+0.0200"]
    assert cells(row(compared, LOSSES, "average")) == ["3.0000", "2.9067", "−0.0933"]
    assert cells(row(compared, LOSSES, "average perplexity")) == ["30.73", "28.95", "−1.78"]
    assert cells(row(compared, "Final mixture", "code")) == ["33.3%", "50.0%", "+16.7%"]
    assert cells(row(compared, "FLOPs", "search: probes")) == ["0", "2 T", "+2 T"]
    assert cells(row(compared, "FLOPs", "total")) == ["6 T", "9 T", "+3 T"]
    assert cells(row(compared, "device-seconds", "total")) == ["20", "34", "+14"]
    assert verdicts(row(compared, LOSSES, "average")) == [0], "one seed is sure of nothing"
    assert compared.row(STAGES, FORGETTING) is None, "a run alone forgets nothing that is known"
    assert compared.compute_lines()[0] == (
        "opmix: 50.0% more compute than uniform, in FLOPs: 9 T (train 6 T + search: probes 2 T + search: "
        "evaluation 1 T) against 6 T (train 6 T)"
    )


def test_seeds_become_groups_with_paired_intervals(tmp_path: Path):
    """Differences of 0.1, 0.2 and 0.3 in the average: mean 0.2, deviation 0.1, and at 95%
    0.2 ± 4.3027 * 0.1 / sqrt(3), though the seeds themselves are apart by 1."""
    for seed in range(3):
        run(tmp_path / "plain" / f"seed{seed}", [3.0 + seed, 2.0 + seed, 1.0 + seed], seed=seed)
        worse = 0.1 * (seed + 1)
        losses = [3.0 + seed + worse, 2.0 + seed + worse, 1.0 + seed + worse]
        run(tmp_path / f"other-s{seed}", losses, seed=seed, optimizer={"lr": 0.5})
    folders = [tmp_path / f"other-s{seed}" for seed in (2, 0, 1)]
    compared = Compared.of(grouped(*sorted((tmp_path / "plain").iterdir()), *folders), 0.95)
    assert [(group.name, sorted(group.courses)) for group in compared.groups] == [
        ("plain", [0, 1, 2]),
        ("other", [0, 1, 2]),
    ]
    average = row(compared, LOSSES, "average")
    assert cells(average)[:2] == ["3.0000 ± 1.0000", "3.2000 ± 1.1000"]
    (difference,) = average.differences
    assert difference is not None
    assert (difference.n, difference.mean, difference.deviation) == pytest.approx((3, 0.2, 0.1))
    assert (difference.low, difference.high) == pytest.approx((-0.04841, 0.44841), abs=1e-5)
    assert verdicts(average) == [0]
    assert verdicts(row(Compared.of(compared.groups, 0.8), LOSSES, "average")) == [-1], "surely worse"


def keep_samples(run: RunDir, losses: list[list[float]], *, token: int = 1) -> RunDir:
    """Losses [D][N] of samples with 2 targets each."""
    sums = np.array(losses) * 2
    count = sums.size
    tokens = np.full((count, 3), token)
    mask = np.tile([False, True, True], (count, 1))
    ids = np.repeat(np.arange(len(DOMAINS)), sums.shape[1])
    found = sample_losses(DOMAINS, ids, tokens, mask, sums.ravel())
    write_record(run.eval_file.with_name(HELD_OUT), HeldOutLosses(step=100, domains=found))
    return run


def test_one_seed_has_an_error_over_samples(tmp_path: Path):
    """Web differs by 0.1, 0.2 and 0.3 on three samples: 0.2 ± 0.1 / sqrt(3). The other domains differ by 0 on
    each, so that the average's error is a third of it."""
    first = keep_samples(run(tmp_path / "a", [3, 2, 1]), [[3.0, 1.0, 5.0], [2, 2, 2], [1, 1, 1]])
    other = run(tmp_path / "b", [3.2, 2, 1], optimizer={"lr": 0.5})
    keep_samples(other, [[3.1, 1.2, 5.3], [2, 2, 2], [1, 1, 1]])
    compared = Compared.of(grouped(first, other), 0.95)
    assert cells(row(compared, LOSSES, "web"))[-1] == f"+0.2000 ± {0.1 / math.sqrt(3):.4f}"
    assert cells(row(compared, LOSSES, "average"))[-1] == f"+0.0667 ± {0.1 / math.sqrt(3) / 3:.4f}"
    assert cells(row(compared, LOSSES, "average perplexity"))[-1].count("±") == 0
    keep_samples(other, [[3.1, 1.2, 5.3], [2, 2, 2], [1, 1, 1]], token=2)
    compared = Compared.of(grouped(first, other), 0.95)
    assert cells(row(compared, LOSSES, "web"))[-1] == "+0.2000", "these are other samples"


def test_one_seed_twice_is_a_repetition(tmp_path: Path):
    groups = grouped(run(tmp_path / "a", [3, 2, 1]), run(tmp_path / "again" / "a", [3, 2, 1]))
    assert [group.name for group in groups] == ["a", "a (2)"]
    with pytest.raises(UserError, match="both have seed 0"):
        group_as_named([("both", [read_course(tmp_path / "a"), read_course(tmp_path / "again" / "a")])])


def test_lifecycles_are_measured_over_their_stages(tmp_path: Path):
    lives = [write_lifecycle(tmp_path / f"seed{s}" / "naive", seed=s, shift=0.25 * s) for s in range(2)]
    (group,) = grouped(*lives)
    assert group.name == "naive"
    compared = Compared.of([group], 0.95)
    # web: 3.75 over its best of 3.0; code: 2.25 over 2.0; of the other seed 0.25 more each
    assert cells(row(compared, STAGES, "forgetting")) == [f"0.6250 ± {0.25 / math.sqrt(2):.4f}"]
    # code fell from 7 to 2, books from 7 to 4, or 4.25
    assert row(compared, STAGES, "acquisition").values == [{0: pytest.approx(4.0), 1: pytest.approx(3.875)}]
    assert row(compared, STAGES, "backward transfer").values[0][0] == pytest.approx(-0.5)
    # before they joined: code from 9 to 7, books from 9 to 7
    assert row(compared, STAGES, "forward transfer").values[0][0] == pytest.approx(2.0)
    assert row(compared, LOSSES, "average of old domains").values[0][0] == pytest.approx(3.0)
    assert row(compared, LOSSES, "average of new domains").values[0][0] == pytest.approx(4.0)
    assert row(compared, "Tokens", "read by the model at the end").values[0][0] == 180_000
    assert row(compared, "FLOPs", "total").values[0][0] == 18e12
    assert list(stage_rows(group)) == [
        ("before", ["9.0000", "9.0000", "9.0000"]),
        ("pretrain", ["3.0000 joins", "7.0000", "8.0000"]),
        ("midtrain", ["3.5000 (+0.5000)", "2.0000 joins", "7.0000"]),
        ("instruct", ["3.8750 (+0.8750)", "2.3750 (+0.3750)", "4.1250 joins"]),
    ]
    assert "| forgetting | 0.6250 ± 0.1768 |" in markdown(compared, [STAGES])
    assert not any("FLOPs" in line for line in markdown(compared, [STAGES]))


def test_task_errors_are_measured_like_losses(tmp_path: Path):
    life = write_lifecycle(tmp_path / "life")
    for stage, rates in (("midtrain", (0.25, 0.5)), ("instruct", (0.5, 1.0))):
        rows = [
            {"file": "data/code/tasks.jsonl", "kind": kind, "tasks": tasks, "error": rate, "stderr": 0.1}
            | {"interval": (0.0, 1.0)}
            for kind, tasks, rate in zip(("tool_call", "multiple_choice"), (4, 2), rates, strict=True)
        ]
        files.write_json(life / "stages" / stage / "scores.json", {"model": "m", "rows": rows})
    compared = Compared.of(grouped(life), 0.95)
    # (0.5 * 4 + 1 * 2) / 6, after (0.25 * 4 + 0.5 * 2) / 6
    assert cells(row(compared, ERRORS, "code")) == ["66.7%"]
    assert cells(row(compared, ERRORS, "forgetting")) == ["33.3%"]
    assert cells(row(compared, ERRORS, "backward transfer")) == ["−33.3%"]
    assert compared.row(ERRORS, "acquisition") is None, "nothing was scored before"


def test_a_stage_alone_has_its_history(tmp_path: Path):
    (group,) = grouped(write_lifecycle(tmp_path / "life") / "stages" / "instruct")
    compared = Compared.of([group], 0.95)
    # over what it was before this stage
    assert row(compared, STAGES, "forgetting").values[0][0] == pytest.approx((0.25 + 0.25) / 2)
    assert row(compared, "Tokens", "read by the model at the end").values[0][0] == 180_000


def test_a_lifecycle_that_has_not_ended_is_named(tmp_path: Path):
    life = write_lifecycle(tmp_path / "life")
    (life / "stages" / "midtrain" / "summary.json").unlink()
    with pytest.raises(UserError, match=r"stages/midtrain has not ended"):
        read_course(life)
    files.write_bytes(life / "lifecycle.yaml", b"stages: [{name: ../up}]")
    with pytest.raises(UserError, match=r"lifecycle\.yaml does not name its stages"):
        read_course(life)


def answers(*groups: Group) -> dict[str, tuple[bool | None, str]]:
    return {check.what: (check.same, check.text) for check in checks(groups)}


def checkpointed(run: RunDir, content: str) -> RunDir:
    """With the state that tells which documents were read."""
    state = TrainerState(
        weights=UNIFORM,
        domain_tokens=dict.fromkeys(DOMAINS, 1),
        content=dict.fromkeys(DOMAINS, content),
        world_size=1,
        global_batch_size=4,
    )
    write_record(run.checkpoint(100) / STATE_FILE, state)
    files.mark_complete(run.checkpoint(100), {})
    return run


def test_what_is_the_same_is_said(tmp_path: Path):
    runs = [checkpointed(run(tmp_path / name, [3, 2, 1]), "c" * 64) for name in ("a", "b")]
    found = answers(*grouped(*runs))
    assert {what: same for what, (same, _) in found.items()} == dict.fromkeys(
        ("seeds", "tokens", "data order", "held-out samples", "model"), True
    )
    assert found["tokens"][1] == "the same: 100 k read by the model at the end"
    assert checks(grouped(runs[0])) == [], "there is nothing to compare with"


def test_what_differs_is_said(tmp_path: Path):
    first = checkpointed(run(tmp_path / "first", [3, 2, 1]), "c" * 64)
    train = {"steps": 100, "global_batch_size": 8, "micro_batch_size": 2, "eval_samples_per_domain": 32}
    other = RunWriter(
        tmp_path / "other", policy="static", seed=3, train=train, data={"root": "d", "shuffle_block": 5}
    )
    other.mixture(0, UNIFORM, "").summary([3, 2, 1], TRAIN, domain_tokens={"web": 5})
    found = answers(*grouped(first, other.run))
    assert found["seeds"] == (False, "0 in first; 3 in other. Differences are of the seeds that both have")
    assert found["tokens"] == (False, "tokens: 100,000 in first, 5 in other")
    assert found["data order"] == (False, "data.shuffle_block: 65536 in first, 5 in other")
    assert found["held-out samples"] == (False, "train.eval_samples_per_domain: 64 in first, 32 in other")
    assert found["model"][0] is True
    again = checkpointed(run(tmp_path / "again", [3, 2, 1]), "d" * 64)
    assert (
        "documents of web: cccccccccccc in first, dddddddddddd in again"
        in answers(*grouped(first, again))["held-out samples"][1]
    )


def test_other_mixtures_are_another_order_of_the_domains(finished: RunDir, baseline: RunDir):
    same, text = answers(*grouped(baseline, finished))["data order"]
    assert same is None
    assert text == (
        "the same within each domain, for the same seed. Which domain comes when differs: mixtures of opmix "
        "from step 20 on; whether of the same documents is not known of uniform, opmix"
    )


def test_other_domains_cannot_be_compared(tmp_path: Path):
    first, other = run(tmp_path / "first", [3, 2, 1]), run(tmp_path / "other", [3, 2, 1])
    summary = other.summary()
    write_record(other.summary_file, summary.model_copy(update={"final_loss": {"web": 1.0}}))
    with pytest.raises(UserError, match="other on web"):
        Compared.of(grouped(first, other), 0.95)


def test_a_search_that_failed_is_not_counted_and_said_so(baseline: RunDir, finished: RunDir):
    finished.search("0001").proposal_file.unlink()
    compared = Compared.of(grouped(baseline, finished), 0.95)
    assert list(compared.uncounted()) == [
        f"{finished.path}: search 0001 left no proposal, so that its cost is not counted"
    ]
    assert cells(row(compared, "FLOPs", "total")) == ["6 T", "6 T", "+0"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lives = {
        name: [str(write_lifecycle(tmp_path / f"{name}{s}", seed=s, shift=shift * s)) for s in range(2)]
        for name, shift in (("naive", 0.0), (f"<i>{HOSTILE[:8]}".replace("/", ""), 0.5))
    }
    (first, second), (third, fourth) = lives.values()
    page = tmp_path / "pages" / "compared.html"
    group = f"--group=naive={first},{second}", f"--group=mine={third},{fourth}"
    assert main(["compare", *group, "--json", "--out", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found["groups"]] == ["naive", "mine"]
    average = next(entry for entry in found["quantities"] if entry["label"] == "average")
    assert average["groups"]["mine"]["values"] == {
        "0": pytest.approx(10 / 3),
        "1": pytest.approx(10 / 3 + 0.5),
    }
    assert average["differences"]["mine"]["mean"] == pytest.approx(0.25)
    assert found["stages"]["naive"]["0"][0]["joined"] == [1, 2, 3]
    parsed = Parsed(page)
    assert len(parsed.figures) == len(parsed.places) == 3, "the picture, and a heat map for each group"
    assert [trace["name"] for trace in parsed.figures[0]["data"] if "name" in trace] == ["naive", "mine"]
    assert parsed.figures[1]["data"][0]["customdata"][3] == [3.75, 2.25, 4.0]
    assert parsed.figures[1]["data"][0]["z"][1][0] == 0.0, "the best of its domain"
    assert "3.7500 (+0.7500)" in parsed.text
    assert main(["compare", first, second, third]) == 0
    printed = capsys.readouterr().out
    assert "tokens: the same: 180 k" in printed
    assert "forgetting" in printed
    assert main(["compare", first, *group]) == 2
    assert main(["compare", "--group", "x="]) == 2
    assert main(["compare", first, "--confidence", "95"]) == 2
    assert capsys.readouterr().err.count("\n") == 3
