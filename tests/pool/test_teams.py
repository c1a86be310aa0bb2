"""Searches on 1, 2 and 4 ranks, with a model on every rank or sharded over several: to the bit the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from opmix_dist.config import check_config, load_search_config
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir, SearchDir, read_record
from opmix_dist.exchange.schemas import EvaluationPlan, SearchStage
from opmix_dist.models.peft_files import ADAPTER_FILE
from opmix_dist.pool.team import ALONE, Crew, Team, require_whole_teams
from tests.helpers import on_ranks
from tests.pool.ranks import CASES
from tests.pool.searches import quick_config

LAYOUTS = [name for name, case in CASES.items() if not case.fails]


@pytest.fixture(scope="module")
def folder(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("teams")
    on_ranks(4, "tests.pool.ranks", str(tiny_data), str(found), timeout_s=600.0)
    return found


def search_of(folder: Path, name: str) -> SearchDir:
    return RunDir(folder / name.replace("/", " of ")).search("0001")


def found_by(search: SearchDir) -> dict[str, Any]:
    """All that a search answers but what it cost, and what it rests on, to the bit."""
    status = search.status()
    assert status is not None
    assert status.stage is SearchStage.PROPOSED, status.reason
    evaluations = {}
    for path in search.evaluations.iterdir():
        content = load_file(path)
        evaluations[path.name] = {
            name: values.tobytes() for name, values in content.items() if name not in ("seconds", "digest")
        }
    probes = [search.probe(name) for name in search.request().components]
    return {
        "adapters": [(probe / ADAPTER_FILE).read_bytes() for probe in probes],
        "curves": [(probe / "curve.jsonl").read_bytes() for probe in probes],
        "evaluations": evaluations,
        "proposal": search.proposal().model_dump(exclude={"costs"}),
        "fit": search.fit() if search.fit_file.exists() else None,
        "candidates": pq.read_table(search.candidates_file).to_pylist(),
    }


def assert_same(ours: SearchDir, theirs: SearchDir) -> None:
    one, other = found_by(ours), found_by(theirs)
    for key in one:
        assert one[key] == other[key], key
    a, b = ours.proposal().costs, theirs.proposal().costs
    for phase in ("probes", "evaluation"):
        assert (a[phase].tokens, a[phase].flops) == (b[phase].tokens, b[phase].flops)


@pytest.mark.launch
@pytest.mark.parametrize("name", [n for n in LAYOUTS if not n.endswith(" 1/1") and "16 bits" not in n])
def test_no_number_of_ranks_changes_a_bit(folder: Path, name: str) -> None:
    assert_same(search_of(folder, name), search_of(folder, f"{CASES[name].settings} 1/1"))


@pytest.mark.launch
def test_in_16_bits_the_number_of_shards_does_not_matter(folder: Path) -> None:
    """Between shards and whole models, the arithmetic of candidates is the same, that of probes is not."""
    assert_same(search_of(folder, "16 bits 4/4"), search_of(folder, "16 bits 2/2"))
    whole, sharded = (search_of(folder, f"16 bits {layout}").proposal() for layout in ("1/1", "2/2"))
    assert sharded.snapshot == whole.snapshot, "without adapters"
    assert sharded.simulated == pytest.approx(whole.simulated, rel=2e-3)
    assert sharded.simulated != sharded.snapshot


@pytest.mark.launch
def test_a_search_whose_rank_died_goes_on_with_others(folder: Path) -> None:
    """The team of the one that was killed ends in the midst of a pass, the others when they meet it."""
    ended = [file.read_text() for file in (folder / "killed 4 of 2").glob("ended_*")]
    assert len(ended) == 3
    assert any(text.startswith("BrokenTeamError") for text in ended)
    assert_same(search_of(folder, "killed 4/2"), search_of(folder, "law 1/1"))


@pytest.mark.launch
def test_memory_that_runs_out_on_one_rank_makes_the_passes_smaller(folder: Path) -> None:
    """Of whole models at once; in the midst of a pass through shards, for whoever is started again."""
    for name in ("memory 2/1", "memory 2/2"):
        plan = read_record(search_of(folder, name).plan_file, EvaluationPlan)
        assert plan.batch_size == 2
        ours, theirs = (found_by(search_of(folder, one)) for one in (name, "smaller 1/1"))
        for key in ("adapters", "proposal", "fit", "candidates"):
            assert ours[key] == theirs[key], key
    ended = (folder / "memory 2 of 2").glob("ended_*")
    assert sorted(file.read_text().partition(":")[0] for file in ended) == ["BrokenTeamError"] * 2
    assert not list((folder / "memory 2 of 1").glob("ended_*"))


@pytest.mark.launch
def test_what_one_rank_of_a_team_cannot_read_fails_the_search_on_all(folder: Path) -> None:
    status = search_of(folder, "unreadable 2/2").status()
    assert status is not None
    assert status.stage is SearchStage.FAILED
    assert status.reason == "pool rank 1: no such shard"


@pytest.mark.launch
def test_no_rank_reads_or_holds_more_than_its_shards(folder: Path) -> None:
    found = [json.loads((folder / f"parameters_{rank}.json").read_text()) for rank in range(4)]
    whole = found[0]["whole"]
    for one in found:
        assert one["held"][0] == one["held"][1], "a pass leaves nothing behind"
        assert one["held"][0] <= 0.3 * whole, "a quarter, and what does not divide"
        assert one["read"] <= one["held"][0]
    assert sum(one["read"] for one in found) == whole


def crew(rank: int, teams: int, size: int = 1) -> Crew:
    team = Team(rank // size, teams, rank % size, size, size > 1)
    return Crew(team, Team(rank=rank, size=teams * size, sharded=size > 1))


def test_groups_go_to_teams_and_what_is_left_to_all() -> None:
    """Six groups of four passes: one for each of four teams, and then two that all ranks share."""
    groups = list("abcdef")
    dealt = [crew(rank, 4).deal(groups, 4) for rank in range(4)]
    assert dealt == [([name], ["e", "f"]) for name in "abcd"]
    # of one pass, nothing can be shared: two ranks have a second group
    dealt = [crew(rank, 4).deal(groups, 1) for rank in range(4)]
    assert dealt == [(["a", "e"], []), (["b", "f"], []), (["c"], []), (["d"], [])]
    # three of two passes would take three rounds of all ranks, and two of their own
    assert [crew(rank, 4).deal("abc", 2) for rank in range(4)] == [
        (["a"], []),
        (["b"], []),
        (["c"], []),
        ([], []),
    ]
    assert [crew(rank, 1, 2).deal("abc", 5) for rank in range(2)] == [(["a", "b", "c"], [])] * 2
    assert Crew(ALONE, ALONE).deal("abc", 1) == (["a", "b", "c"], [])


def test_passes_are_dealt_out_and_the_last_is_repeated() -> None:
    teams = [Team(rank=rank, size=3) for rank in range(3)]
    assert [team.deal(5) for team in teams] == [[0, 3], [1, 4], [2, 4]]
    assert [[team.counts(turn, 5) for turn in range(2)] for team in teams] == [
        [True] * 2,
        [True] * 2,
        [True, False],
    ]
    assert [team.deal(1) for team in teams] == [[0], [0], [0]]
    assert ALONE.deal(3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("teams", "size", "groups", "passes", "idle"),
    [
        (4, 1, 4, 1, 0),
        (4, 1, 5, 1, 3),
        (4, 1, 1, 4, 0),
        (4, 1, 1, 3, 1),
        (2, 2, 2, 2, 0),
        (2, 2, 2, 1, 2),
        (1, 4, 3, 3, 1),
        (4, 1, 0, 1, 0),
        (1, 1, 7, 3, 0),
    ],
)
def test_ranks_that_stand_idle(teams: int, size: int, groups: int, passes: int, idle: int) -> None:
    assert crew(0, teams, size).idle(groups, passes) == idle


def test_ranks_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    require_whole_teams(2, 4)
    with pytest.raises(UserError, match="pool.ranks_per_model 2 does not divide the 3 rank"):
        require_whole_teams(2, 3)
    config = quick_config(tmp_path, tmp_path).model_dump()
    for changes, message in (
        ({"pool": {"ranks": 3, "ranks_per_model": 2}}, "pool.ranks 3 must be a multiple"),
        ({"pool": {"ranks_per_model": 2}, "search": {"kernels": "triton"}}, "reads whole weights"),
        ({"search": {"probes": {"batch_size": 3, "micro_batch_size": 2}}}, "must be a multiple of"),
    ):
        with pytest.raises(UserError, match=message):
            check_config({**config, **changes})


def test_a_search_alone_has_teams_too(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "run_dir: r\nmodel: {checkpoint: org/model}\ndata: {root: d}\n"
        "train: {steps: 1, global_batch_size: 1, micro_batch_size: 1}\npool: {ranks: 2, ranks_per_model: 2}\n"
    )
    config, unused = load_search_config(file)
    assert config.pool.ranks_per_model == 2
    assert unused == ["train", "pool.ranks"]
