"""``opmix what-if`` on run directories and on folders of ``opmix fit``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opmix_dist.cli import main
from opmix_dist.config import check_config
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir, SearchDir, read_record, write_record
from opmix_dist.exchange.schemas import Proposal, SearchStage, SearchStatus
from opmix_dist.pool.solving import error_bars, search_method, search_problem
from opmix_dist.searched import read_searched
from tests.helpers import tiny_llama
from tests.report.runs import COMPONENTS, COMPOSITION, DOMAINS, LAW, UNIFORM, RunWriter
from tests.test_search_command import written


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with a finished search: 12 candidates whose losses follow LAW with noise of 0.005 nats."""
    writer = RunWriter(tmp_path / "run").mixture(0, UNIFORM, "mixture.initial: uniform")
    writer.search()
    config = writer.run.config().model_dump(mode="json")
    config["search"]["proposal"]["bootstrap"] = 30  # quick
    writer.run.write_config(check_config(config))
    return writer.run


def asked(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict:
    assert main(["what-if", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that says why."""
    assert main(["what-if", *map(str, arguments)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_the_law_is_what_the_search_fitted(run: RunDir):
    """Bit for bit: the search's own method, told what candidates.parquet holds, and its own bootstrap."""
    searched = read_searched(run.path)
    search = run.search("0001")
    request, settings = search.request(), run.any_config().search
    reference = np.array([search.proposal().snapshot[name] for name in DOMAINS])
    problem = search_problem(request, settings.proposal, reference)
    method = search_method(problem, request, settings)
    method._next = searched.fit.observations.candidates  # those that the fixture drew
    method.ask()
    method.tell(searched.fit.observations.losses, searched.fit.observations.stderr)
    result = method.result()
    bars = error_bars(result, problem, request, settings.proposal, None)
    assert result.fit is not None
    assert bars is not None
    U = np.random.default_rng(0).dirichlet(np.ones(4), 5)
    assert np.array_equal(searched.fit.law.predict(U), result.fit.law.predict(U))
    for ours, its in zip(searched.resampled, bars.laws, strict=True):
        assert np.array_equal(ours.predict(U), its.predict(U))


def test_losses_at_current_and_proposal(run: RunDir, capsys: pytest.CaptureFixture[str]):
    answer = asked(capsys, run.path)
    assert list(answer["mixtures"]) == ["current", "proposal"]
    assert answer["mixtures"]["current"]["weights"] == pytest.approx(UNIFORM)
    u = np.array([0.1, 0.1, 0.5, 0.3])
    assert list(answer["mixtures"]["proposal"]["weights"].values()) == pytest.approx(u @ COMPOSITION)
    truth = LAW.predict(u[None])[0]
    for name, loss in zip(DOMAINS, truth, strict=True):
        found = answer["mixtures"]["proposal"]["predicted"][name]
        assert found["low"] < loss < found["high"]
        assert found["high"] - found["low"] < 0.1
    assert answer["mixtures"]["proposal"]["objective"]["value"] == pytest.approx(
        np.mean([answer["mixtures"]["proposal"]["predicted"][name]["value"] for name in DOMAINS])
    )


def test_a_set_share_moves_the_others_in_proportion(run: RunDir, capsys: pytest.CaptureFixture[str]):
    answer = asked(capsys, run.path, "--set", "code=0.5")
    mixture = answer["mixtures"]["what_if"]
    assert mixture["weights"] == pytest.approx({"web": 0.25, "code": 0.5, "books": 0.25}, abs=1e-5)
    u = np.array(list(mixture["coefficients"].values()))
    assert u @ COMPOSITION == pytest.approx([0.25, 0.5, 0.25], abs=1e-5)
    # sum u^2 is the proposal's 0.36: averaging as many probes, the three of them gain alike from it
    assert u @ u == pytest.approx(0.36, abs=1e-5)
    current = np.array(list(answer["mixtures"]["current"]["coefficients"].values()))
    assert current @ current == pytest.approx(0.36, abs=1e-5)
    # the law's own number, by hand from its coefficients
    law = read_searched(run.path).fit.law
    expected = np.exp(law.log_c) + np.exp(law.t @ u)
    assert [mixture["predicted"][name]["value"] for name in DOMAINS] == pytest.approx(expected)
    pairs = {(row["of"], row["minus"]): row["predicted"] for row in answer["differences"]}
    change = pairs["what_if", "current"]["code"]
    levels = [answer["mixtures"][name]["predicted"]["code"] for name in ("what_if", "current")]
    assert change["value"] == pytest.approx(levels[0]["value"] - levels[1]["value"])
    # paired: far narrower than the two levels apart would give
    assert change["high"] - change["low"] < sum(level["high"] - level["low"] for level in levels)
    assert change["high"] < 0  # half of the mixture code is better for code, beyond doubt


def test_shares_start_from_the_proposal_on_demand(run: RunDir, capsys: pytest.CaptureFixture[str]):
    answer = asked(capsys, run.path, "--set", "code=0.3", "--from", "proposal")
    start = answer["mixtures"]["proposal"]["weights"]
    found = answer["mixtures"]["what_if"]["weights"]
    assert found["code"] == pytest.approx(0.3, abs=1e-5)
    assert found["web"] / found["books"] == pytest.approx(start["web"] / start["books"], abs=1e-4)


def test_as_many_laws_as_wanted(run: RunDir):
    assert len(read_searched(run.path).resampled) == 30
    assert len(read_searched(run.path, resampled=7).resampled) == 7


def test_intervals_widen_with_confidence(run: RunDir, capsys: pytest.CaptureFixture[str]):
    wide = asked(capsys, run.path, "--confidence", "0.99")
    narrow = asked(capsys, run.path, "--confidence", "0.6")
    for name in DOMAINS:
        a, b = (answer["mixtures"]["proposal"]["predicted"][name] for answer in (wide, narrow))
        assert a["low"] < b["low"] < b["high"] < a["high"]
    assert wide["confidence"] == 0.99


def test_intervals_hold_the_truth_at_ten_mixtures(run: RunDir):
    """Nominally 99% each, of 3 losses; noise that all candidates share is not in them, and here is none."""
    searched = read_searched(run.path, confidence=0.99)
    U = np.random.default_rng(3).dirichlet(np.full(4, 2.0), 10)
    band, truth = searched.forecast(U).levels(0.99), LAW.predict(U)
    inside = (band.low <= truth) & (truth <= band.high)
    assert inside.mean() >= 0.9
    assert (band.high - band.low).mean() < 0.1


def with_gradients(search: SearchDir, candidates: int) -> None:
    """Leave the first candidates only, with noiseless losses and gradients by LAW."""
    rows = pq.read_table(search.candidates_file).to_pylist()
    rows = [row for row in rows if row["kind"] != "candidate" or row["candidate"] < candidates]
    for row in rows:
        if row["kind"] == "candidate":
            u, d = np.array([row[f"u_{name}"] for name in COMPONENTS]), DOMAINS.index(row["domain"])
            row["loss"] = float(LAW.predict(u[None])[0, d])
            slopes = LAW.gradient(u)[d].tolist()
            row |= {f"gradient_{name}": slope for name, slope in zip(COMPONENTS, slopes, strict=True)}
    pq.write_table(pa.Table.from_pylist(rows), search.candidates_file)


def test_gradients_that_were_taken_count(run: RunDir, capsys: pytest.CaptureFixture[str]):
    """Three candidates have too few losses for laws of five coefficients, but with their gradients enough."""
    with_gradients(run.search("0001"), 3)
    U = np.random.default_rng(0).dirichlet(np.ones(4), 5)
    assert read_searched(run.path).fit.law.predict(U) == pytest.approx(LAW.predict(U), abs=1e-4)
    config = run.config().model_dump(mode="json")
    config["search"]["method"] = "gradient"
    run.write_config(check_config(config))
    assert any("descended along gradients" in text for text in asked(capsys, run.path)["warnings"])


@pytest.mark.parametrize("gradients", [False, True])
def test_a_real_search_is_fitted_again_to_the_same_digits(tiny_data: Path, tmp_path: Path, gradients: bool):
    """Adapters of a small model, a round of refinement; gradients, or draws of the held-out samples."""
    checkpoint = tmp_path / "hf"
    tiny_llama(vocab_size=512).save_pretrained(checkpoint)
    shutil.copy(tiny_data / "tokenizer" / "tokenizer.json", checkpoint)
    sections = [
        "--search.gradients",
        str(gradients).lower(),
        "--search.refinement.rounds",
        "1",
        "--search.refinement.count",
        "2",
    ]
    assert main(["search", str(written(tmp_path, tiny_data, checkpoint)), *sections]) == 0
    search = RunDir(tmp_path / "run").search("0001")
    searched, recorded = read_searched(tmp_path / "run"), search.proposal()
    draws = pq.read_table(search.candidates_file).column_names.count("resampled")
    assert (searched.fit.observations.gradients is not None, draws == 0) == (gradients, gradients)
    assert len(searched.fit.measured) == 6 + 2
    assert searched.notes == ()
    assert searched.fit.law.predict(searched.proposal[None])[0].tolist() == list(recorded.predicted.values())
    assert searched.problem.reference is not None
    assert searched.problem.reference.tolist() == list(recorded.snapshot.values())
    assert recorded.gain is not None
    assert recorded.gain.interval is not None
    gains = [
        searched.problem.value(losses[0]) - searched.problem.value(losses[1])
        for losses in searched.forecast(np.stack([searched.current, searched.proposal])).resampled
    ]
    assert np.quantile(gains, [0.05, 0.95]) == pytest.approx(
        [recorded.gain.interval.low, recorded.gain.interval.high]
    )


@pytest.mark.parametrize("family", ["power", "quadratic", "gaussian_process", "auto"])
def test_every_family_is_asked_alike(run: RunDir, capsys: pytest.CaptureFixture[str], family: str):
    config = run.config().model_dump(mode="json")
    config["search"]["law"]["family"] = family
    run.write_config(check_config(config))
    answer = asked(capsys, run.path, "--set", "code=0.4", "--pareto", "web,code", "--points", "3")
    assert answer["family"] == ("log_linear" if family == "auto" else family)
    u = np.array(list(answer["mixtures"]["what_if"]["coefficients"].values()))
    found = [answer["mixtures"]["what_if"]["predicted"][name]["value"] for name in DOMAINS]
    assert found == pytest.approx(LAW.predict(u[None])[0], abs=0.1)
    assert len(answer["pareto"]["points"]) == 3


def test_another_law_than_recorded_is_said(run: RunDir, capsys: pytest.CaptureFixture[str]):
    """The fixture's proposal.json holds the noiseless law's losses."""
    assert any("fitted again" in text for text in asked(capsys, run.path)["warnings"])
    search = run.search("0001")
    searched = read_searched(run.path)
    predicted = searched.fit.law.predict(searched.proposal[None])[0]
    record = search.proposal().model_copy(
        update={"predicted": dict(zip(DOMAINS, map(float, predicted), strict=True))}
    )
    write_record(search.proposal_file, record)
    assert read_record(search.proposal_file, Proposal) == record
    assert not any("fitted again" in text for text in asked(capsys, run.path)["warnings"])


def test_the_front_is_a_page_and_a_table(run: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["what-if", str(run.path), "--pareto", "web+books,code", "--points", "5"]) == 0
    out = capsys.readouterr().out
    assert "Pareto front" in out
    assert str(run.path / "pareto.html") in out
    assert b"web+books against code" in (run.path / "pareto.html").read_bytes()
    page = tmp_path / "elsewhere" / "front.html"
    answer = asked(capsys, run.path, "--pareto", "web,code", "--points", "5", "--out", page)
    assert page.is_file()
    points = answer["pareto"]["points"]
    losses = np.array([[point["predicted"][name]["value"] for name in ("web", "code")] for point in points])
    assert len(points) == 5
    assert (np.diff(losses[:, 0]) > 0).all()
    assert (np.diff(losses[:, 1]) < 0).all()
    assert points[0]["weights"]["web"] > points[-1]["weights"]["web"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # the most that the probes hold of code: 0.9 + 0.1 / 3
        (["--set", "code=1"], "mixtures of the probes have between 0.03333 and 0.9333 of code"),
        (["--set", "code=0.93", "--set", "web=0.07"], "no weights of the components give"),
        (["--set", "code=0.93", "--set", "web=0.07"], "books: 0 (nearest in reach: 0.03333"),
        (["--set", "code"], "write DOMAIN=SHARE, such as web=0.4"),
        (["--set", "math=0.1"], "there is no domain math, only web, code, books"),
        (["--set", "code=some"], "some is no number"),
        (["--set", "code=0.1", "--set", "code=0.2"], "the share of code is set twice"),
        (["--set", "code=0.7", "--set", "web=0.7"], "sum to 1.4"),
        (["--confidence", "90"], "give a share between 0.5 and 1"),
        (["--bootstrap", "1"], "give at least 2"),
        (["--pareto", "web"], "name two losses or groups"),
        (["--pareto", "web,math"], "there is no loss of math, only of web, code, books"),
        (["--pareto", "web,web"], "both sides are the same losses"),
        (["--pareto", "web,code", "--points", "1"], "at least 2 points"),
        (["--from", "proposal"], "set a share with --set"),
        (["--out", "x.html"], "--out is for the plot of --pareto"),
        (["--search", "0002"], "has no search 0002: it has 0001"),
    ],
)
def test_questions_that_have_no_answer(
    run: RunDir, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert message in refused(capsys, run.path, *arguments)


def test_unfinished_and_foreign_folders(run: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert "neither a run directory nor an output folder" in refused(capsys, tmp_path)
    assert "--search names a search" in refused(capsys, tmp_path, "--search", "0001")
    search = run.search("0001")
    record = search.proposal()
    write_record(search.proposal_file, record.model_copy(update={"coefficients": {"old": 0.5, "math": 0.5}}))
    assert "are of two searches" in refused(capsys, run.path)
    write_record(search.proposal_file, record)
    search.candidates_file.write_bytes(b"nonsense")
    assert "candidates.parquet is not a table" in refused(capsys, run.path)
    search.candidates_file.unlink()
    assert "candidates.parquet is missing" in refused(capsys, run.path)
    write_record(search.status_file, SearchStatus(stage=SearchStage.EVALUATING, done=3, total=12))
    assert "has no finished search" in refused(capsys, run.path)
    assert "In progress: evaluating, 3 of 12 done" in refused(capsys, run.path, "--search", "0001")


def test_a_folder_of_opmix_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its components are the domains, and its losses are metrics of other names."""
    rng = np.random.default_rng(8)
    U = rng.dirichlet(np.ones(3), 24)
    losses = 1 + np.exp(U @ np.array([[-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]).T) + rng.normal(0, 1e-3, (24, 2))
    for name, header, values in (("ratios", "web,code,books", U), ("metrics", "qa,bugs", losses)):
        rows = [f"r{m}," + ",".join(map(repr, map(float, row))) for m, row in enumerate(values)]
        (tmp_path / f"{name}.csv").write_text("\n".join([f"run,{header}", *rows]) + "\n")
    tables = ["--ratios", str(tmp_path / "ratios.csv"), "--metrics", str(tmp_path / "metrics.csv")]
    out = tmp_path / "out"
    quick = ["--bootstrap.count", "30"]
    assert main(["fit", *tables, "--output-dir", str(out), *quick]) == 0
    capsys.readouterr()
    recorded = json.loads((out / "proposal.json").read_text())
    answer = asked(capsys, out, "--set", "web=0.5", "--from", "proposal", "--pareto", "qa,bugs")
    assert list(answer["mixtures"]) == ["proposal", "what_if"]
    proposal = answer["mixtures"]["proposal"]
    assert proposal["weights"] == pytest.approx(recorded["weights"], abs=1e-9)
    for metric, value in recorded["predicted"].items():
        interval = recorded["predicted_intervals"][metric]
        assert proposal["predicted"][metric] == pytest.approx({"value": value, **interval})
    share = answer["mixtures"]["what_if"]["weights"]["web"]
    assert answer["mixtures"]["what_if"]["predicted"]["qa"]["value"] == pytest.approx(
        1 + np.exp(-share), abs=5e-3
    )
    assert (out / "pareto.html").is_file()
    assert "knows no current mixture" in refused(capsys, out, "--set", "web=0.5", "--from", "current")
    with pytest.raises(UserError, match="--search names a search"):
        read_searched(out, "0001")
    searched = read_searched(out, resampled=5)
    assert len(searched.resampled) == 5
    assert searched.notes == ()
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    (tmp_path / "metrics.csv").write_text("\n".join(lines[:-4]) + "\n")
    assert any("fitted again" in note for note in read_searched(out, resampled=5).notes)
    for setting in ("--proposer.make_worst_mix", "--proposer.fit_only"):
        assert main(["fit", *tables, "--output-dir", str(out), setting, "true"]) == 0
        capsys.readouterr()
        assert f"fit again without {setting[2:]}" in refused(capsys, out)
