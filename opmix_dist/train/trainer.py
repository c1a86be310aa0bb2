"""The training loop. It names no engine and no policy; see job.py for how the parts are chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from opmix_dist.config import RunConfig
from opmix_dist.data.caps import UsedUpError
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.loader import EvalSet, LoadedBatch, MixtureLoader
from opmix_dist.distributed import World
from opmix_dist.engines.base import Engine, StepResult
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import EvalLine, MixtureRecord, TrainLine
from opmix_dist.ledger import Ledger
from opmix_dist.models.loss import DomainLosses, losses_by_domain
from opmix_dist.seeds import derive_seed
from opmix_dist.stopping import StopRequested, StopSignals
from opmix_dist.train.callbacks import Callback
from opmix_dist.train.checkpoint import Checkpointer
from opmix_dist.train.policy import MixturePolicy
from opmix_dist.train.schedule import learning_rate
from opmix_dist.train.state import TrainerState
from opmix_dist.train.throughput import Throughput


@dataclass
class Trainer:
    """Runs the loop on every trainer rank in step.

    ``recorded`` is the mixture schedule by step: what earlier attempts at this run decided, and what this
    one decides.
    """

    run: RunDir
    config: RunConfig
    world: World
    engine: Engine
    catalogue: Catalogue
    loader: MixtureLoader
    heldout: EvalSet
    policy: MixturePolicy
    callbacks: Sequence[Callback]
    state: TrainerState
    recorded: dict[int, MixtureRecord]
    ledger: Ledger
    stop: StopSignals

    def __post_init__(self) -> None:
        self._last_evaluation: EvalLine | None = None
        self._throughput = Throughput(
            self.engine,
            self.ledger,
            peak_flops=self.ledger.peak_flops,
            memory_interval=self.config.train.log_interval_steps,
        )

    def fit(self) -> EvalLine:
        """Train to ``train.steps``. Collective over the trainer ranks; returns the last evaluation.

        Raises:
            StopRequested: somebody asked for it; the state is saved.
            UsedUpError: the data allow no further step; the state is saved.
        """
        with self._closing():
            self.first_step = self.state.step
            self._announce("on_start")
            self._throughput.start()
            try:
                while self.state.step < self.config.train.steps:
                    self.stop.stop_if_agreed(self.world)
                    self._update_mixture()
                    self._step()
            except (UsedUpError, StopRequested):
                for callback in self.callbacks:
                    callback.on_stop(self)
                raise
            self.policy.end(self.recorded)
            last = self.evaluate()
            for callback in self.callbacks:
                callback.on_end(self)
            return last

    def _step(self) -> None:
        line = self._train_step()
        interval = self.config.train.eval_interval_steps
        if interval and self.state.step % interval == 0:
            self.evaluate()
        for callback in self.callbacks:
            callback.on_step(self, line)

    def _update_mixture(self) -> None:
        record = self.policy.decide(self.state, self.recorded)
        if record is None:
            return
        if record.step not in self.recorded:
            self.recorded[record.step] = record
            if self.world.is_leader:
                files.append_jsonl(self.run.mixtures_file, record.model_dump())
        if record.changed:
            self.loader.set_weights(record.weights)
        # one that was recorded before a domain joined does not name it
        self.state.weights = {name: record.weights.get(name, 0.0) for name in self.catalogue.names}
        self.state.mixture_version = record.version
        self._announce("on_mixture", record)

    def _train_step(self) -> TrainLine:
        step = self.state.step
        # Models with dropout draw from a generator that depends on step and replica only: exact after a
        # resume, and the same on all ranks of a replica.
        torch.manual_seed(derive_seed(self.config.seed, "step", step, self.engine.replica.rank))
        lr = learning_rate(self.config.schedule, self.config.optimizer.lr, step, self.config.train.steps)
        with self._throughput.waiting_for_data():
            loaded = next(self.loader)
        microbatches = loaded.batch.split(self.config.train.micro_batch_size)
        result = self.engine.train_step(microbatches, lr=lr)
        sums, readings = self._gather(loaded, result)
        return self._book(sums, readings, result.grad_norm, lr)

    def _gather(self, loaded: LoadedBatch, result: StepResult) -> tuple[Tensor, Tensor]:
        """Losses, targets and samples of each domain, summed over the global batch, [3, D] float64, and every
        rank's readings [W, R], by one collective."""
        losses = result.sample_losses
        rows = torch.stack([losses, result.targets.to(losses), torch.ones_like(losses)])  # [3, b]
        sums = torch.zeros(3, len(self.catalogue.names), dtype=torch.float64)
        if self.engine.replica.counts:
            sums.index_add_(1, loaded.domain_ids, rows)
        mine = self._throughput.readings(self.state.step + 1)
        readings = torch.zeros(self.world.size, len(mine), dtype=torch.float64)
        readings[self.world.rank] = mine
        both = self.world.sum(torch.cat([sums.flatten(), readings.flatten()]))
        return both[: sums.numel()].view_as(sums), both[sums.numel() :].view_as(readings)

    def _book(self, sums: Tensor, readings: Tensor, grad_norm: float, lr: float) -> TrainLine:
        """Advance the state by one step and describe it. Tokens are T for each sample, padding included: it
        is computed on too."""
        losses, targets, samples = sums  # [D] each
        length = self.catalogue.sequence_length
        tokens = int(samples.sum()) * length
        for name, count in zip(self.catalogue.names, samples.tolist(), strict=True):
            self.state.domain_tokens[name] += int(count) * length
        self.state.step += 1
        seconds = self._throughput.lap()
        self.ledger.add("train", seconds=seconds, flops=tokens * self.engine.flops.train(), tokens=tokens)
        by_domain = zip(self.catalogue.names, losses.tolist(), targets.tolist(), strict=True)
        return TrainLine(
            step=self.state.step,
            loss=float(losses.sum() / targets.sum()),
            domain_loss={name: total / count for name, total, count in by_domain if count},
            grad_norm=grad_norm,
            lr=lr,
            tokens=self.state.tokens,
            mixture_version=self.state.mixture_version,
            **self._throughput.describe(
                readings,
                tokens=tokens,
                tokens_per_pass=self.config.train.micro_batch_size * length,
                seconds=seconds,
            ),
        )

    def evaluate(self) -> EvalLine:
        """Collective. Mean held-out loss per domain, always on the same samples; once for each step."""
        if self._last_evaluation is not None and self._last_evaluation.step == self.state.step:
            return self._last_evaluation
        found = self.losses_by_domain(self.heldout)
        line = EvalLine(
            step=self.state.step,
            tokens=self.state.tokens,
            loss=dict(zip(self.catalogue.names, found.loss.tolist(), strict=True)),
            stderr=dict(zip(self.catalogue.names, found.stderr.tolist(), strict=True)),
        )
        self._last_evaluation = line
        self._announce("on_evaluation", line)
        return line

    def losses_by_domain(self, heldout: EvalSet) -> DomainLosses:
        """Collective. Losses [D], in the catalogue's order."""
        batch, tokens = heldout.batch, heldout.batch.tokens.numel()
        with self.ledger.timed("held-out evaluation"):
            sums = self.engine.evaluate(batch, self.config.train.micro_batch_size)  # [N]
        self.ledger.add("held-out evaluation", flops=tokens * self.engine.flops.forward, tokens=tokens)
        return losses_by_domain(
            sums.numpy(), batch.targets.numpy(), heldout.domain_ids.numpy(), len(self.catalogue.names)
        )

    def save_checkpoint(self, checkpointer: Checkpointer) -> None:
        """Collective. What the steps have logged is on disk before it counts."""
        if self.world.is_leader:
            files.sync_file(self.run.train_file)
        self.state.loader = self.loader.state_dict()
        self.state.costs = self.ledger.costs
        with self.ledger.timed("checkpoints"):
            checkpointer.save(self.engine, self.state)

    def _announce(self, hook: str, *arguments: object) -> None:
        """Call a hook that is for the leader only."""
        if self.world.is_leader:
            for callback in self.callbacks:
                getattr(callback, hook)(self, *arguments)

    @contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        finally:
            for callback in self.callbacks:
                callback.close()
            self.policy.close()
            self.loader.close()
