from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir, write_record
from opmix_dist.exchange.schemas import Decision, SearchStage, SearchStatus
from opmix_dist.report.html import write_report
from tests.report.runs import UNIFORM, RunWriter

HOSTILE = "</script><script>alert(1)</script><img src=http://x onerror=alert(1)> &amp; \"'{{$x}}"
SECTIONS = [
    "Mixture over time",
    "Held-out loss by domain",
    "Final losses",
    "Search 0001",
    "Proposed mixture",
    "Predicted, simulated and realised loss",
    "Laws against measurements",
    "Probes",
    "Compute",
    "Training loss",
    "Speed and memory",
    "Configuration",
]


class Parsed(HTMLParser):
    """What a browser would make of a report: elements, text, scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        self._inside.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside[: len(self._inside) - 1 - self._inside[::-1].index(tag)]

    def handle_data(self, data: str) -> None:
        if self._inside[-1:] == ["script"]:
            self.scripts[-1] += data
        elif self._inside[-1:] != ["style"]:
            self.text += data

    @property
    def figures(self) -> list[dict]:
        return json.loads(self.scripts[0])

    @property
    def places(self) -> list[str]:
        return [value for name, value in self.attributes if name == "id" and value.startswith("figure-")]


def strings(value: object) -> list[str]:
    """Every string inside nested JSON values."""
    if isinstance(value, str):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for child in children for text in strings(child)]


def test_a_finished_run_has_every_section(finished: RunDir, baseline: RunDir):
    page = Parsed(write_report(finished, baseline=baseline))
    for title in SECTIONS:
        assert title in page.text
    # (33.784 + 3.669 + 49.402) / 3 = 28.95 against 30.73
    assert "Average perplexity 28.95, 5.8% below uniform at the same tokens." in page.text
    assert "33.3% of the run's FLOPs" in page.text  # (2e12 + 1e12) of 9e12
    assert "Both look 51.2 k tokens ahead, at the learning rate of the probes" in page.text
    assert page.text.count("books: few candidates") == 1  # fit and proposal warn of the same
    # mixture, 3 held-out, final, proposal, 2 landings, 3 laws, probes, compute, training, 3 of speed, memory
    assert len(page.figures) == len(page.places) == 17


def test_nothing_is_loaded_and_no_foreign_script_runs(finished: RunDir, baseline: RunDir):
    page = Parsed(write_report(finished, baseline=baseline))
    assert not {"src", "href", "srcset", "action", "onerror"} & {name for name, _ in page.attributes}
    assert not {"link", "img", "iframe", "object", "form", "a"} & set(page.elements)
    policy = next(value for name, value in page.attributes if value.startswith("default-src 'none'"))
    for script in page.scripts[1:]:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    assert "http" not in policy


def test_charts_show_the_numbers_of_the_run(finished: RunDir, baseline: RunDir):
    figures = Parsed(write_report(finished, baseline=baseline)).figures
    code = next(trace for trace in figures[0]["data"] if trace["name"] == "code")
    assert code["x"] == [0, 20, 100]
    assert code["y"] == pytest.approx([1 / 3, 0.5, 0.5])
    before, this = next(f for f in figures if f["layout"].get("title", {}).get("text") == "code")["data"]
    assert (before["y"], this["y"]) == ([2.0, 1.5], [1.8, 1.3])
    assert this["customdata"] == [0.03, 0.03]
    by_law = [f for f in figures if f["layout"].get("yaxis", {}).get("title", {}).get("text") == "law"]
    candidates, proposal, left_out = by_law[0]["data"]
    assert len(candidates["x"]) == 12
    assert len(proposal["x"]) == 1
    assert candidates["y"] == pytest.approx(candidates["x"], abs=0.03)  # the law made them, noise 0.005
    assert left_out["y"] == pytest.approx(np.array(candidates["y"]) + 0.002)
    (bars,) = [f for f in figures if f["layout"].get("barmode") == "group"]
    before, proposed = bars["data"]
    assert "error_x" not in before
    assert proposed["error_x"]["array"] == pytest.approx([0.05] * 3)
    assert proposed["error_x"]["arrayminus"] == pytest.approx([0.1] * 3)


def test_speed_and_memory_are_shown_where_they_were_measured(finished: RunDir, tmp_path: Path):
    page = Parsed(write_report(finished))
    text = " ".join(page.text.split())
    assert "On average 10 k tokens/s, 5 k on each device; 2.0% of the time went by waiting for data." in text
    assert "MFU 40.0% (50.0% with what was computed again)." in text
    assert "opmix: rank 1, 106 GiB allocated on its device, 107 GiB reserved." in text
    tokens, mfu, memory = page.figures[-3:]
    assert len(tokens["data"][0]["x"]) == 100
    assert (mfu["data"][0]["x"][0], {*mfu["data"][0]["y"]}) == (51, {0.4})
    shown = {trace["name"]: trace["x"] for trace in memory["data"]}
    assert shown == {
        "parameters": [1], "gradients": [2], "optimizer": [3], "activations and others": [100],
    }  # fmt: skip
    unmeasured = RunWriter(tmp_path / "run").mixture(0, UNIFORM, "start").training(first_measured=100)
    page = Parsed(write_report(unmeasured.run))
    assert "Tokens per second of each step." in page.text
    assert "MFU" not in page.text.replace("MFU is FLOPs over", "")


def test_the_decision_is_told_with_the_gain_and_how_it_is_known(finished: RunDir):
    text = Parsed(write_report(finished)).text
    assert "Move to the proposal. gain 0.018 ± 0.002: above 0 at 90% confidence." in " ".join(text.split())
    assert "+0.018 ± 0.002" in text
    assert "+0.02 (90%: +0.011 to +0.03)" in text
    assert "averaging probes" not in text
    search = finished.search("0001")
    gain = search.proposal().gain.model_copy(update={"averaging": 0.012})
    decision = Decision(move=False, reason="gain 0.006 ± 0.01: within its uncertainty")
    write_record(
        search.proposal_file, search.proposal().model_copy(update={"gain": gain, "decision": decision})
    )
    text = Parsed(write_report(finished)).text
    assert "Keep the mixture. gain 0.006 ± 0.01: within its uncertainty." in " ".join(text.split())
    assert "no part of it: averaging probes, the mixture unchanged" in text


def test_each_domain_is_told_in_its_unit(finished: RunDir):
    """Error rates are not compared with the losses that the run ended with."""
    search = finished.search("0001")
    proposal = search.proposal()
    before = Parsed(write_report(finished))
    assert "mean loss, nats per token" in before.text
    assert "error rate" not in before.text
    write_record(search.proposal_file, proposal.model_copy(update={"error_rates": ["code"]}))
    page = Parsed(write_report(finished))
    assert "mean of losses, nats per token, and error rates" in page.text
    assert page.text.count("code (error rate)") == page.text.count("books (nats per token)") == 2
    realised = [
        trace["y"] for figure in page.figures for trace in figure["data"] if trace.get("name") == "realised"
    ]
    assert realised
    assert all(names == ["web (nats per token)", "books (nats per token)"] for names in realised)
    everywhere = {"error_rates": list(proposal.weights), "objective_name": "worst"}
    write_record(search.proposal_file, proposal.model_copy(update=everywhere))
    page = Parsed(write_report(finished))
    section = page.text[page.text.index("Search 0001") : page.text.index("Compute")]
    assert "nats" not in section
    assert "worst error rate" in section
    assert "Predicted, simulated and realised error rate" in section


def test_a_domain_keeps_its_colour(finished: RunDir):
    figures = Parsed(write_report(finished)).figures
    areas = {trace["name"]: trace["fillcolor"] for trace in figures[0]["data"] if "fillcolor" in trace}
    final = next(f for f in figures if f["layout"].get("xaxis", {}).get("title", {}).get("text") == "loss")
    assert final["data"][0]["marker"]["color"] == [areas[name] for name in final["data"][0]["y"]]
    assert len({*areas.values()}) == 3


def test_a_run_that_has_only_begun(tmp_path: Path):
    page = Parsed(write_report(RunWriter(tmp_path / "run").run))
    assert "Not finished: step 0 of 100." in page.text
    assert "No mixture has been recorded yet." in page.text
    assert "No training step has been logged yet." in page.text
    assert "requested no search (mixture.policy: opmix). The first starts at step 20." in page.text
    assert page.figures == []


def test_a_run_in_progress(tmp_path: Path, baseline: RunDir):
    writer = (
        RunWriter(tmp_path / "run").mixture(0, UNIFORM, "start").training(30).evaluation(30, [4.0, 2.0, 4.0])
    )
    search = writer.request()
    write_record(search.status_file, SearchStatus(stage=SearchStage.PROBING, done=3, total=50))
    page = Parsed(write_report(writer.run, baseline=baseline))
    assert "Not finished: step 30 of 100, training loss 3.2000." in page.text
    assert "In progress: probing, 3 of 50 done." in page.text
    assert "No training curve: old, web, code, books." in page.text
    assert "cannot be shown without a valid candidates.parquet" in page.text
    assert "Latest losses" in page.text
    assert "the costs of its training are not known yet" in page.text


def test_a_failed_search_says_why(tmp_path: Path):
    writer = RunWriter(tmp_path / "run").mixture(0, UNIFORM, "start").training()
    status = SearchStatus(stage=SearchStage.FAILED, reason="the pool gave no sign of life for 300 s")
    write_record(writer.request().status_file, status)
    page = Parsed(write_report(writer.run))
    assert "Failed: the pool gave no sign of life for 300 s. The mixture stayed as it was." in page.text
    assert "The cost of search 0001 is not known" in page.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("candidates.parquet", b"not parquet"),
        ("fit.json", b'{"domains": ["web"]}'),
        ("proposal.json", b"{"),
        ("status.json", b"[]"),
        ("probes/web/curve.jsonl", b'{"step": "x"}\n'),
    ],
)
def test_nonsense_from_a_pool_is_reported_and_the_rest_shown(finished: RunDir, name: str, content: bytes):
    files.write_bytes(finished.search("0001").path / name, content)
    page = Parsed(write_report(finished))
    problems = [line for line in page.text.splitlines() if name in line]
    assert problems
    assert "Average perplexity 28.95." in page.text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("comparison", {"power": [1.0, 2.0]}, "one entry per domain in every list"),
        ("r2", [1.0], "one entry per domain in every list"),
        ("components", ["web", "old", "code", "books"], "other components than request.json"),
    ],
)
def test_a_fit_that_does_not_match_its_search_is_not_drawn(
    finished: RunDir, field: str, value: list, message: str
):
    fit_file = finished.search("0001").fit_file
    files.write_json(fit_file, json.loads(fit_file.read_text()) | {field: value})
    text = Parsed(write_report(finished)).text
    assert message in text
    assert "cannot be shown without a valid fit.json" in text


def test_broken_files_of_the_trainer_and_other_folders_are_user_errors(finished: RunDir, tmp_path: Path):
    with pytest.raises(UserError, match="not a run directory"):
        write_report(RunDir(tmp_path / "nowhere"))
    finished.mixtures_file.write_text('{"version": 0}\n')
    with pytest.raises(UserError, match=r"mixtures\.jsonl:1"):
        write_report(finished)


def write_with(text: str, folder: Path) -> Parsed:
    """The report of a run in whose free-text fields ``text`` stands."""
    writer = RunWriter(folder / "run").mixture(0, UNIFORM, "start").mixture(20, UNIFORM, text)
    status = SearchStatus(stage=SearchStage.FAILED, reason=text)
    write_record(writer.request().status_file, status)
    return Parsed(write_report(writer.run))


@settings(max_examples=25, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet="<>/&\"'!-scriptbrimg=$%{} \n")))
def test_text_of_the_run_directory_stays_text(text: str):
    with tempfile.TemporaryDirectory() as folder:
        page, plain = write_with(text, Path(folder)), write_with("because", Path(folder) / "plain")
    assert page.elements == plain.elements
    assert page.attributes == plain.attributes
    assert page.scripts[1:] == plain.scripts[1:]
    for shown in strings(page.figures):
        assert "<" not in re.sub(r"</?b>|<br>|<extra>|</extra>", "", shown)


def test_a_known_attack_is_shown_as_it_is_written(tmp_path: Path):
    page = write_with(HOSTILE, tmp_path)
    assert f"Failed: {HOSTILE}. The mixture stayed" in page.text
    assert "<" not in page.scripts[0]
    assert len(page.scripts) == 3
