"""`opmix report RUN RUN ...`: runs side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from opmix_dist.cli import main
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import PhaseCost
from opmix_dist.report.comparison import write_comparison
from tests.report.runs import PROPOSED, UNIFORM, RunWriter
from tests.report.test_html import HOSTILE, Parsed


def another(path: Path) -> RunWriter:
    """Unfinished, on a mixture of its own."""
    writer = RunWriter(path, policy="static").mixture(0, UNIFORM, "initial mixture")
    writer.mixture(10, PROPOSED, HOSTILE)
    return writer.training(60).evaluation(50, [4.2, 1.2, 4.0])


def test_three_runs_side_by_side(finished: RunDir, baseline: RunDir, tmp_path: Path) -> None:
    third = another(tmp_path / "third").run
    out = tmp_path / "pages" / "comparison.html"
    assert write_comparison([baseline, finished, third], out) == out
    page = Parsed(out)
    # means of exp(loss): uniform 30.73, opmix 28.95, (66.69 + 3.32 + 54.60) / 3 = 41.54 of the third
    assert "Lowest average perplexity: opmix, 28.95, 5.8% below uniform, at different numbers of" in page.text
    assert "Not finished, latest evaluation shown: third." in page.text
    for text in ("−0.2000", "1.3000 ± 0.0300", "opmix − uniform", "third − uniform", "35.2% above"):
        assert text in page.text, text
    # 3 held-out, mixtures, compute, training
    assert len(page.figures) == len(page.places) == 6
    assert [trace["name"] for trace in page.figures[0]["data"]] == ["uniform", "opmix", "third"]
    assert page.figures[1]["data"][2]["y"] == [1.2]
    colours = [
        {trace["name"]: trace[kind]["color"] for trace in page.figures[i]["data"]}
        for i, kind in ((0, "line"), (3, "marker"), (5, "line"))
    ]
    assert colours[0] == colours[1] == colours[2]
    assert len(set(colours[0].values())) == 3


def test_runs_of_one_name_are_told_apart_and_names_are_escaped(tmp_path: Path) -> None:
    runs = []
    for folder in ("a", "b"):
        writer = RunWriter(tmp_path / folder / "<b>run&", policy="static").mixture(0, UNIFORM, "")
        writer.training().evaluation(100, [3.5, 1.5, 4.0])
        runs.append(writer.summary([3.5, 1.5, 4.0], {"train": PhaseCost(seconds=1)}).run)
    page = Parsed(write_comparison(runs, tmp_path / "page.html"))
    assert "<b>run& (2) − <b>run&" in page.text
    assert page.elements["b"] == 0
    assert "Lowest average perplexity: <b>run&," in page.text


def test_runs_that_cannot_be_compared_are_named(finished: RunDir, tmp_path: Path) -> None:
    empty = RunWriter(tmp_path / "empty").mixture(0, UNIFORM, "").run
    with pytest.raises(UserError, match="empty has no held-out evaluation yet"):
        write_comparison([finished, empty], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_command_compares_several_runs(
    finished: RunDir, baseline: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs = [str(baseline.path), str(finished.path)]
    assert main(["report", *runs]) == 0
    assert capsys.readouterr().out.strip() == str(baseline.path / "comparison.html")
    assert main(["report", *runs, "--out", str(tmp_path / "mine.html")]) == 0
    assert (tmp_path / "mine.html").stat().st_size > 1_000_000
    assert main(["report", runs[0]]) == 0
    assert baseline.report_file.exists()
    assert main(["report", *runs, "--baseline", runs[0]]) == 2
    assert main(["report", runs[0], "--out", "x.html"]) == 2
    assert "--out is for the comparison" in capsys.readouterr().err
