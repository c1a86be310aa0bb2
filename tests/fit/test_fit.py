"""``opmix fit`` from tables to files: known laws come back, and the mixture is their optimum."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.optimize import minimize
from sklearn.model_selection import train_test_split

from opmix_dist.cli import main
from tests.fit.swarms import DOMAINS, LOG_C, METRICS, T, losses, ratios, write_csv, write_swarm

FAST = ["--bootstrap.count", "0"]

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in ``tmp_path``'s tables; gives proposal, laws and what was printed."""

    def run(*options: str, status: int = 0, noise: float = 0.0, count: int = 20) -> dict[str, Any]:
        if not (tmp_path / "ratios.csv").exists():
            write_swarm(tmp_path, count, noise=noise)
        out = tmp_path / "out"
        tables = ["--ratios", str(tmp_path / "ratios.csv"), "--metrics", str(tmp_path / "metrics.csv")]
        assert main(["fit", *tables, "--output-dir", str(out), *options]) == status
        printed = capsys.readouterr()
        found: dict[str, Any] = {"out": printed.out, "err": printed.err}
        for name in ("proposal", "laws"):
            if (out / f"{name}.json").exists():
                found[name] = json.loads((out / f"{name}.json").read_text())
        return found

    return run


def optimum(
    objective: Callable[[np.ndarray], float], caps: np.ndarray | None = None, *, worst: bool = False
) -> np.ndarray:
    """[3] of the least objective on the simplex, by SLSQP from several points; of the greatest, if asked."""
    sign = -1.0 if worst else 1.0
    bounds = [(1e-9, 1.0 if caps is None else float(cap)) for cap in (np.ones(3) if caps is None else caps)]
    sums = {"type": "eq", "fun": lambda x: x.sum() - 1}
    starts = [np.full(3, 1 / 3), *ratios(8, seed=3)]
    found = [
        minimize(
            lambda x: sign * objective(x), start, bounds=bounds, constraints=[sums], options={"ftol": 1e-12}
        )
        for start in starts
    ]
    return min((one for one in found if one.success), key=lambda one: one.fun).x


def mean_loss(x: np.ndarray, kl: float, prior: np.ndarray, omega: np.ndarray | None = None) -> float:
    """Under the true laws."""
    weights = np.full(3, 1 / 3) if omega is None else omega
    return float(losses(x[None])[0] @ weights + kl * (x * np.log(x / prior)).sum())


def weights(found: dict[str, Any]) -> list[float]:
    assert list(found["proposal"]["weights"]) == list(DOMAINS)
    return list(found["proposal"]["weights"].values())


# --- laws and mixture --------------------------------------------------------------------------------------


def test_known_laws_come_back_and_the_mixture_is_their_optimum(run: Run) -> None:
    found = run("--kl-reg", "0.05", *FAST)
    laws, proposal = found["laws"], found["proposal"]
    assert laws["family"] == "log_linear"
    assert list(laws["log_c"].values()) == pytest.approx(LOG_C, abs=1e-4)
    for metric, row in zip(METRICS, T, strict=True):
        assert laws["t"][metric] == pytest.approx(dict(zip(DOMAINS, row, strict=True)), abs=1e-3)
    best = optimum(lambda x: mean_loss(x, 0.05, np.full(3, 1 / 3)))
    assert weights(found) == pytest.approx(best, abs=1e-3)
    assert list(proposal["predicted"].values()) == pytest.approx(losses(best[None])[0], abs=1e-3)
    assert proposal["objective"] == pytest.approx(mean_loss(best, 0.05, np.full(3, 1 / 3)), abs=1e-6)
    assert sum(weights(found)) == pytest.approx(1, abs=1e-12)
    assert laws["quality"]["web_loss"]["r2"] == pytest.approx(1, abs=1e-6)
    for name in (*DOMAINS, *METRICS):
        assert name in found["out"]


def test_the_pull_of_the_prior_is_the_option_and_uniform_by_default(run: Run) -> None:
    assert weights(run("--kl-reg", "1000", *FAST)) == pytest.approx([1 / 3] * 3, abs=1e-3)
    sizes = ["--priors.relative_sizes", "{math: 0.1, code: 0.3, web: 0.6}"]
    assert weights(run("--kl-reg", "1000", *sizes, *FAST)) == pytest.approx([0.6, 0.3, 0.1], abs=1e-3)
    assert weights(run("--kl-reg", "0", *FAST)) == pytest.approx(
        optimum(lambda x: mean_loss(x, 0, np.ones(3))), abs=2e-3
    )


def test_a_fit_file_of_olmix_gives_the_mixture_that_it_describes(run: Run, tmp_path: Path) -> None:
    """Means by family, weights of families, a cap that binds: 4 x 3e9 / 25e9 of math."""
    config = tmp_path / "fit.yaml"
    content = {
        "swarm": {"ratios": "ratios.csv", "metrics": "metrics.csv"},
        "priors": {
            "relative_sizes": {"math": 0.1, "web": 0.6, "code": 0.3},
            "token_counts": {"web": 10**12, "code": 10**12, "math": 10**9},
        },
        "eval": {"tasks": {"text": ["web_loss"], "hard": ["code_loss", "math_loss"]}},
        "regression": {"type": "log_linear", "aggregate_task_families": True},
        "proposer": {"type": "exact", "kl_reg": 0.05},
        "constraints": {"enabled": True, "target_tokens": 25 * 10**9, "repetition_factor": 4.0},
        "filtering": {"drop_metrics": ["other"], "obj_weights": {"text": "1/4", "hard": 0.75}},
    }
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    found = run("--config", str(config), *FAST)
    assert list(found["proposal"]["predicted"]) == ["text", "hard"]
    with (tmp_path / "out" / "predictions.csv").open() as file:
        measured = [float(row["measured"]) for row in csv.DictReader(file)]
    truth = losses(ratios(20))
    assert measured[::2] == pytest.approx(truth[:, 0])
    assert measured[1::2] == pytest.approx(truth[:, 1:].mean(axis=1))
    # The mean of two laws is no log-linear law itself: the optimum is that of the laws that were fitted.
    log_c = np.array(list(found["laws"]["log_c"].values()))
    t = np.array([list(row.values()) for row in found["laws"]["t"].values()])
    prior = np.array([0.6, 0.3, 0.1])

    def objective(x: np.ndarray) -> float:
        laws = np.exp(log_c) + np.exp(t @ x)
        return float(np.array([0.25, 0.75]) @ laws + 0.05 * (x * np.log(x / prior)).sum())

    assert weights(found) == pytest.approx(optimum(objective, np.array([1, 1, 0.16])), abs=1e-3)
    assert weights(found)[2] == pytest.approx(0.16, abs=1e-6)
    assert "filtering.drop_metrics: other is no metric" in found["out"]


def test_metrics_that_are_dropped_or_weighted(run: Run) -> None:
    found = run("--filtering.drop_metrics=[web_loss]", "--filtering.obj_weights={math_loss: 3}", *FAST)
    assert list(found["laws"]["log_c"]) == ["code_loss", "math_loss"]
    best = optimum(lambda x: mean_loss(x, 0.05, np.full(3, 1 / 3), np.array([0, 1.0, 3.0])))
    assert weights(found) == pytest.approx(best, abs=2e-3)
    assert "the weights of the 2 metrics sum to 4" in found["out"]


def test_floors_caps_and_other_objectives(run: Run) -> None:
    found = run("--bounds.floors={web: 0.5}", "--bounds.caps={math: 0.1}", *FAST)
    assert weights(found)[0] == pytest.approx(0.5, abs=1e-5)
    assert weights(found)[2] == pytest.approx(0.1, abs=1e-5)
    found = run("--objective", "worst", "--kl-reg", "0", *FAST)
    best = optimum(lambda x: float(losses(x[None]).max()))
    assert max(found["proposal"]["predicted"].values()) == pytest.approx(losses(best[None]).max(), abs=1e-3)


def test_no_loss_rises_more_than_it_may(run: Run, tmp_path: Path) -> None:
    current = tmp_path / "current.json"
    current.write_text(json.dumps({"web": 0.6, "code": 0.3, "math": 0.1}))
    free = run("--current", str(current), *FAST)["proposal"]
    rise = {name: free["predicted"][name] - free["predicted_current"][name] for name in METRICS}
    assert rise["web_loss"] > 0.1
    bound = run("--current", str(current), "--objective.max_increase={web_loss: 0.05}", *FAST)["proposal"]
    assert bound["predicted"]["web_loss"] - bound["predicted_current"]["web_loss"] == pytest.approx(
        0.05, abs=1e-5
    )


def test_the_worst_mixture_is_the_greatest_mean_loss(run: Run) -> None:
    found = run("--proposer.make_worst_mix=true", "--kl-reg", "0.1", *FAST)
    prior = np.full(3, 1 / 3)
    worst = optimum(lambda x: mean_loss(x, -0.1, prior), worst=True)
    assert weights(found) == pytest.approx(worst, abs=5e-3)
    assert np.mean(list(found["proposal"]["predicted"].values())) > losses(ratios(200, seed=9)).mean()


@pytest.mark.parametrize("family", ["bimix", "gp", "lightgbm", "quadratic", "auto"])
def test_every_family_finds_a_mixture_that_is_better_than_the_mean_run(run: Run, family: str) -> None:
    found = run("--family", family, *FAST, count=60, noise=0.002)
    assert losses(np.array([weights(found)])).mean() < losses(ratios(60)).mean()
    if family == "auto":
        assert found["laws"]["family"] in found["laws"]["comparison"]
        assert "log_linear" in found["laws"]["comparison"]


# --- runs that are held out --------------------------------------------------------------------------------


def test_the_runs_of_the_split_are_those_of_olmix(run: Run, tmp_path: Path) -> None:
    found = run("--regression.n_test=5", "--regression.train_split=10", "--seed", "3", *FAST)
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    parts = {part: {row["run"] for row in rows if row["part"] == part} for part in ("fit", "test")}
    numbers, test = train_test_split(np.arange(20), test_size=5 / 20, random_state=3)
    fitted, _ = train_test_split(numbers, train_size=10, random_state=3)
    assert parts == {"fit": {f"r{i}" for i in fitted}, "test": {f"r{i}" for i in test}}
    for row in rows:
        truth = losses(ratios(20))[int(row["run"][1:]), METRICS.index(row["metric"])]
        assert float(row["measured"]) == pytest.approx(truth)
        assert float(row["predicted"]) == pytest.approx(truth, abs=1e-3)
        assert (row["left_out"] == "") == (row["part"] == "test")
    assert found["laws"]["runs_held_out"] == 5
    assert found["laws"]["quality"]["code_loss"]["test_error"] < 1e-3


# --- uncertainty -------------------------------------------------------------------------------------------


def test_intervals_hold_the_truth_and_a_clear_gain_is_taken(run: Run, tmp_path: Path) -> None:
    current = tmp_path / "current.yaml"
    current.write_text("web: 0.8\ncode: 0.1\nmath: 0.1\n")
    found = run("--current", str(current), "--bootstrap.confidence=0.98", "--bootstrap.count=40", noise=0.01)
    proposal = found["proposal"]
    best = optimum(lambda x: mean_loss(x, 0.05, np.full(3, 1 / 3)))
    for domain, share in zip(DOMAINS, best, strict=True):
        interval = proposal["intervals"][domain]
        assert interval["low"] <= share <= interval["high"]
        assert interval["high"] - interval["low"] < 0.2
    assert proposal["decision"]["move"]
    true_gain = losses(np.array([[0.8, 0.1, 0.1]])).mean() - losses(best[None]).mean()
    assert proposal["gain"]["interval"]["low"] < true_gain < proposal["gain"]["interval"]["high"]
    assert "move: gain" in found["out"]


def test_a_gain_within_the_noise_is_not_taken(run: Run, tmp_path: Path) -> None:
    best = optimum(lambda x: mean_loss(x, 0.05, np.full(3, 1 / 3)))
    current = tmp_path / "current.json"
    current.write_text(json.dumps({"weights": dict(zip(DOMAINS, best, strict=True))}))
    found = run("--current", str(current), "--bootstrap.count=40", noise=0.05)
    assert found["proposal"]["decision"]["move"] is False
    assert "stay: gain" in found["out"]
    written = json.loads((tmp_path / "out" / "mixture" / "mixture.json").read_text())
    assert written == pytest.approx(dict(zip(DOMAINS, best, strict=True)))


def test_the_same_seed_gives_the_same_files(run: Run, tmp_path: Path) -> None:
    def contents() -> dict[str, bytes]:
        run("--bootstrap.count=5", noise=0.01)
        return {
            str(f): f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.suffix in (".json", ".csv")
        }

    assert contents() == contents()


# --- files -------------------------------------------------------------------------------------------------


def test_the_files_of_a_fit(run: Run, tmp_path: Path) -> None:
    run("--source", "web=/data/web", *FAST)
    out = tmp_path / "out"
    page = (out / "fit.html").read_text()
    assert "<title>Laws: log_linear</title>" in page
    assert page.count('class="chart"') == 1 + len(METRICS) + 1  # weights, predictions, coefficients
    assert "http-equiv" in page
    assert (out / "mixture" / "megatron.txt").read_text().split()[1::2] == ["/data/web", "code", "math"]
    # what it wrote of the settings gives the same again, from another folder
    first = (out / "proposal.json").read_text()
    assert main(["fit", "--config", str(out / "fit.yaml"), "--output-dir", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "proposal.json").read_text() == first


def test_a_fit_alone_leaves_no_proposal(run: Run, tmp_path: Path) -> None:
    run(*FAST)
    found = run("--proposer.fit_only=true")
    assert set(found) == {"out", "err", "laws"}
    assert not list((tmp_path / "out" / "mixture").iterdir())


def test_regmix_tables_with_their_preset(tmp_path: Path) -> None:
    mixtures = ratios(20).round(3)
    rows = [[i, *row] for i, row in enumerate(mixtures)]
    write_csv(tmp_path / "r.csv", ["index", *(f"train_{name}" for name in DOMAINS)], rows)
    rows = [[i, *row] for i, row in enumerate(losses(mixtures))]
    write_csv(tmp_path / "m.csv", ["index", *(f"metric/{name}_val_loss" for name in DOMAINS)], rows)
    tables = ["--ratios", str(tmp_path / "r.csv"), "--metrics", str(tmp_path / "m.csv")]
    named = ["--run-column", "index", "--ratio-prefix", "train_", "--metric-prefix", "metric/"]
    named += ["--metric-suffix", "_val_loss"]
    proposals = []
    for how in (["--columns", "regmix"], named):
        assert main(["fit", *tables, *how, *FAST, "--output-dir", str(tmp_path / "out")]) == 0
        proposals.append(json.loads((tmp_path / "out" / "proposal.json").read_text()))
    assert proposals[0] == proposals[1]
    assert list(proposals[0]["weights"]) == list(proposals[0]["predicted"]) == list(DOMAINS)
    best = optimum(lambda x: mean_loss(x, 0.05, np.full(3, 1 / 3)))
    assert list(proposals[0]["weights"].values()) == pytest.approx(best, abs=5e-3)


# --- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval.tasks={f: [web_los]}"], "eval.tasks.f names `web_los`, .*: the nearest is `web_loss`"),
        (["--filtering.obj_weights={web: 1}"], "filtering.obj_weights names `web`, which is no metric"),
        (["--filtering.drop_metrics=[web_loss, code_loss, math_loss]"], "leaves no metric to fit"),
        (["--priors.relative_sizes={web: 1, code: 1}"], "priors.relative_sizes has no value for `math`"),
        (["--bounds.caps={cod: 0.1}"], "bounds.caps names `cod`, which is no domain: the nearest is `code`"),
        (["--bounds.caps={web: 0.1, code: 0.1, math: 0.1}"], "no mixture satisfies the bounds: .*0.3"),
        (["--regression.n_test=20"], "regression.n_test holds 20 runs out, and there are 20"),
        (["--regression.train_split=21"], "regression.train_split is 21, and there are 20 runs to fit"),
        (["--proposer.klreg=1"], "setting `proposer.klreg`: the nearest valid one is `proposer.kl_reg`"),
        (["--current", "nowhere.json"], "nowhere.json is missing"),
        (["--source", "cod=/x"], "source cod: the mixture has no such domain"),
        (["--ratios", "none.csv"], "there is no table none.csv"),
    ],
)  # fmt: skip
def test_mistakes_are_told_on_one_line(run: Run, options: list[str], message: str) -> None:
    err = run(*options, *FAST, status=2)["err"]
    assert re.search(message, err), err
    assert err.startswith("opmix: ")
    assert err.count("\n") == 1


def test_a_current_mixture_must_be_one(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "current.json"
    for content, message in (
        ('{"web": 0.5, "code": 0.4}', "the shares of the current mixture sum to 0.9, not to 1"),
        ('{"web": 0.5, "cod": 0.5}', "current names `cod`, which is no domain"),
        ('{"web": "much"}', "the weight of web is 'much', no number"),
        ("[]", "holds no weights by domain"),
    ):
        file.write_text(content)
        assert message in run("--current", str(file), status=2)["err"]
