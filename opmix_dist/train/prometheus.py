"""Metrics of a run for Prometheus, as text over HTTP from the leader's node.

It needs prometheus_client, which is optional: import this module only where that is installed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import EvalLine, MixtureRecord, SearchStage, TrainLine
from opmix_dist.train.callbacks import Callback

if TYPE_CHECKING:
    from opmix_dist.train.trainer import Trainer

log = logging.getLogger(__name__)
OF_A_STEP = {
    "step": "Finished optimiser steps",
    "loss": "Training loss of the last step, nats per token",
    "grad_norm": "Gradient norm before clipping",
    "lr": "Learning rate",
    "tokens": "Tokens trained on, padding included",
    "tokens_per_second": "Tokens a second over all trainer ranks in the last step",
    "mfu": "Model FLOPs over what the devices can do; absent where their peak is not known",
}
"""Fields of a TrainLine that become ``opmix_train_FIELD``."""


class RunMetrics:
    """What there is to say at a scrape. The training loop sets the attributes; the server's thread reads them
    and the run directory, so that a scrape costs the loop nothing.
    """

    def __init__(self, run: RunDir, steps: int) -> None:
        self.run, self.steps = run, steps
        self.line: TrainLine | None = None
        self.stepped_at: float | None = None
        self.evaluation: EvalLine | None = None
        self.weights: Mapping[str, float] = {}

    def collect(self) -> Iterator[Metric]:
        """Called by the registry. A search whose files cannot be read now is left out this time."""
        yield InfoMetricFamily("opmix_run", "The run", value={"run": self.run.path.name})
        yield GaugeMetricFamily("opmix_train_steps", "Optimiser steps of the whole run", value=self.steps)
        yield from self._of_training()
        yield _by_domain("opmix_mixture_weight", "Share of each domain in what is read", self.weights)
        if self.evaluation is not None:
            text = "Held-out loss, nats per token, by the last evaluation"
            yield _by_domain("opmix_heldout_loss", text, self.evaluation.loss)
        yield from self._of_files()

    def _of_training(self) -> Iterator[Metric]:
        if self.line is None or self.stepped_at is None:
            return
        fields = self.line.model_dump()
        for name, text in OF_A_STEP.items():
            if fields.get(name) is not None:
                yield GaugeMetricFamily(f"opmix_train_{name}", text, value=fields[name])
        text = "When the last step ended, Unix seconds"
        yield GaugeMetricFamily("opmix_train_last_step_timestamp_seconds", text, value=self.stepped_at)
        text = "Training loss of the last step, nats per token, of the domains that it read"
        yield _by_domain("opmix_train_domain_loss", text, self.line.domain_loss)

    def _of_files(self) -> Iterator[Metric]:
        stage = GaugeMetricFamily("opmix_search_stage", "1 at a search's stage", labels=["search", "stage"])
        done = GaugeMetricFamily("opmix_search_done", "Pieces of the stage that are done", labels=["search"])
        total = GaugeMetricFamily("opmix_search_total", "Pieces that the stage has", labels=["search"])
        checkpoint = GaugeMetricFamily("opmix_checkpoint_step", "Step of the newest complete checkpoint")
        try:
            for step in self.run.complete_checkpoints()[-1:]:
                checkpoint.add_metric([], step)
            for search in self.run.search_dirs():
                status = search.status()
                for name in SearchStage:
                    stage.add_metric(
                        [search.name, name.value], float(status is not None and status.stage is name)
                    )
                if status is not None:
                    done.add_metric([search.name], status.done)
                    total.add_metric([search.name], status.total)
        except (UserError, OSError) as error:
            log.debug("a scrape could not read %s: %s", self.run.path, error)
        yield from (stage, done, total, checkpoint)


def _by_domain(name: str, text: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["domain"])
    for domain, value in values.items():
        family.add_metric([domain], value)
    return family


class PrometheusExporter(Callback):
    """Serves :class:`RunMetrics` on ``host:port`` while the loop runs, on the leader.

    An address that is taken or is none of this machine's is a warning and no reason not to train.
    """

    def __init__(self, run: RunDir, steps: int, *, host: str, port: int) -> None:
        self.metrics = RunMetrics(run, steps)
        registry = CollectorRegistry()
        registry.register(self.metrics)
        self._server = None
        self.address: str | None = None
        """``host:port`` that is served, None where it could not be."""
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            setting = f"logging.prometheus_host {host}, prometheus_port {port}"
            log.warning("%s: %s; training without metrics", setting, error)
            return
        shown = f"[{host}]" if ":" in host else host  # of IPv6
        self.address = f"{shown}:{self._server.server_port}"
        log.info("metrics for Prometheus at http://%s/metrics", self.address)

    def on_start(self, trainer: Trainer) -> None:
        self.metrics.weights = dict(trainer.state.weights)

    def on_step(self, trainer: Trainer, line: TrainLine) -> None:
        self.metrics.line, self.metrics.stepped_at = line, time.time()

    def on_mixture(self, trainer: Trainer, record: MixtureRecord) -> None:
        self.metrics.weights = dict(record.weights)

    def on_evaluation(self, trainer: Trainer, line: EvalLine) -> None:
        self.metrics.evaluation = line

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
