"""Metrics over HTTP, as Prometheus reads them."""

from __future__ import annotations

import logging
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import write_record
from opmix_dist.exchange.schemas import EvalLine, MixtureRecord, SearchStage, SearchStatus, TrainLine
from opmix_dist.train.trainer import Trainer
from tests.report.runs import PROPOSED, UNIFORM, RunWriter

pytest.importorskip("prometheus_client", reason="prometheus-client is optional")

from prometheus_client.parser import text_string_to_metric_families

from opmix_dist.train.prometheus import PrometheusExporter

TRAINER = cast(Trainer, None)  # the hooks below do not use it
LINE = TrainLine(
    step=7,
    loss=2.5,
    domain_loss={"web": 2.0, 'a"b\\c\nd': 3.0},
    grad_norm=float("nan"),
    lr=1e-3,
    tokens=7000,
    tokens_per_second=1e4,
    mixture_version=1,
)


@pytest.fixture
def writer(tmp_path: Path) -> RunWriter:
    return RunWriter(tmp_path / "run")


@pytest.fixture
def exporter(writer: RunWriter) -> Iterator[PrometheusExporter]:
    exporter = PrometheusExporter(writer.run, 100, host="127.0.0.1", port=0)
    yield exporter
    exporter.close()


def scrape(exporter: PrometheusExporter) -> dict[str, dict[tuple[str, ...], float]]:
    """Values by metric and label values, parsed by the library's own reader."""
    assert exporter.address is not None
    with urllib.request.urlopen(f"http://{exporter.address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        family.name: {tuple(sample.labels.values()): sample.value for sample in family.samples}
        for family in text_string_to_metric_families(text)
    }


def test_what_is_known_is_served(writer: RunWriter, exporter: PrometheusExporter) -> None:
    found = scrape(exporter)
    assert found["opmix_run_info"] == {("run",): 1}
    assert found["opmix_train_steps"] == {(): 100}
    assert "opmix_train_loss" not in found
    exporter.on_step(TRAINER, LINE)
    exporter.on_mixture(TRAINER, MixtureRecord(version=1, step=6, weights=PROPOSED, why=""))
    exporter.on_evaluation(TRAINER, EvalLine(step=7, tokens=7000, loss={"web": 3.5}, stderr={"web": 0.1}))
    found = scrape(exporter)
    assert found["opmix_train_step"] == {(): 7}
    assert found["opmix_train_loss"] == {(): 2.5}
    assert found["opmix_train_tokens_per_second"] == {(): 1e4}
    assert found["opmix_train_grad_norm"][()] != found["opmix_train_grad_norm"][()]  # nan is passed on
    assert found["opmix_train_domain_loss"] == {("web",): 2.0, ('a"b\\c\nd',): 3.0}
    assert found["opmix_mixture_weight"] == {(name,): weight for name, weight in PROPOSED.items()}
    assert found["opmix_heldout_loss"] == {("web",): 3.5}
    assert "opmix_train_mfu" not in found


def test_searches_and_checkpoints_are_those_of_the_run_directory(
    writer: RunWriter, exporter: PrometheusExporter
) -> None:
    search = writer.mixture(0, UNIFORM, "initial mixture").request()
    write_record(search.status_file, SearchStatus(stage=SearchStage.EVALUATING, done=3, total=12))
    for step in (10, 20):
        writer.run.checkpoint(step).mkdir(parents=True)
        files.mark_complete(writer.run.checkpoint(step), {})
    writer.run.checkpoint(30).mkdir()
    found = scrape(exporter)
    assert {key for key, value in found["opmix_search_stage"].items() if value} == {("0001", "evaluating")}
    assert len(found["opmix_search_stage"]) == len(SearchStage)
    assert (found["opmix_search_done"], found["opmix_search_total"]) == ({("0001",): 3}, {("0001",): 12})
    assert found["opmix_checkpoint_step"] == {(): 20}
    search.status_file.write_text("nonsense")
    assert scrape(exporter)["opmix_train_steps"] == {(): 100}


def test_an_address_that_is_taken_or_none_does_not_stop_the_run(
    writer: RunWriter, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "no.such.host.invalid", "192.0.2.1"):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                exporter = PrometheusExporter(writer.run, 100, host=host, port=port)
            assert exporter.address is None
            assert f"logging.prometheus_host {host}, prometheus_port {port}: " in caplog.text
            exporter.on_step(TRAINER, LINE)
            exporter.close()


def test_the_port_is_free_again_after_the_run(writer: RunWriter) -> None:
    exporter = PrometheusExporter(writer.run, 100, host="127.0.0.1", port=0)
    assert exporter.address is not None
    port = int(exporter.address.rpartition(":")[2])
    exporter.close()
    with socket.create_server(("127.0.0.1", port)):
        pass
