"""The training loop. It names no engine and no policy; see job.py for how the parts are chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opmix_dist.config import RunConfig
from opmix_dist.data.caps import UsedUpError
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.loader import EvalSet, LoadedBatch, MixtureLoader
from opmix_dist.distributed import World
from opmix_dist.engines.base import BadStepError, Engine, StepResult
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.heldout import HeldOutLosses, SampleLosses, sample_losses
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.exchange.schemas import EvalLine, MixtureRecord, TrainLine
from opmix_dist.faults.points import point
from opmix_dist.ledger import LEFT_OUT, Ledger
from opmix_dist.methods.base import Method
from opmix_dist.models.loss import DomainLosses, losses_by_domain
from opmix_dist.seeds import derive_seed
from opmix_dist.stopping import StopRequested, StopSignals
from opmix_dist.train.bad_steps import BadSteps
from opmix_dist.train.callbacks import Callback
from opmix_dist.train.checkpoint import Checkpointer
from opmix_dist.train.policy import MixturePolicy
from opmix_dist.train.schedule import learning_rate
from opmix_dist.train.state import TrainerState
from opmix_dist.train.throughput import Throughput


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples of W domains, numbered by ``names``."""

    names: tuple[str, ...]
    samples: EvalSet


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
    watched: HeldOut | None
    policy: MixturePolicy
    method: Method
    callbacks: Sequence[Callback]
    checkpointer: Checkpointer
    bad_steps: BadSteps
    state: TrainerState
    recorded: dict[int, MixtureRecord]
    ledger: Ledger
    stop: StopSignals

    def __post_init__(self) -> None:
        self._last_evaluation: EvalLine | None = None
        self._samples: list[tuple[HeldOut, Tensor]] = []
        """What was evaluated last, with the losses of the samples [N]."""
        self._throughput = Throughput(
            self.engine,
            self.ledger,
            peak_flops=self.ledger.peak_flops,
            memory_interval=self.config.train.log_interval_steps,
        )
        self._entered: int | None = None
        """The step whose boundary was crossed last."""

    def fit(self) -> EvalLine:
        """Train to ``train.steps``. Collective over the trainer ranks; returns the last evaluation.

        Raises:
            StopRequested: somebody asked for it; the state is saved.
            UsedUpError: the data allow no further step; the state is saved.
            UserError: a bad step, after which ``train.on_bad_step`` does not go on.
        """
        with self._closing():
            self.first_step = self.state.step
            self.method.begin(self.state.step)
            self._announce("on_start")
            if self.config.train.eval_at_start and self.state.step == 0:
                self.evaluate()
            self._throughput.start()
            try:
                while self.state.step < self.config.train.steps:
                    self.stop.stop_if_agreed(self.world)
                    self._cross_boundary()
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

    def _cross_boundary(self) -> None:
        """Before a step, once, though a bad batch makes another attempt at the step: where the data go on, if
        the run went back to here, and their mixture."""
        if self._entered == self.state.step:
            return
        self._entered = self.state.step
        jump = self.bad_steps.jump(self.state.step)
        if jump is not None and jump.loader is not None and jump.domain_tokens is not None:
            self._place_loader(jump.loader)
            self.state.domain_tokens |= jump.domain_tokens
        self._update_mixture()

    def _place_loader(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)
        self.loader.set_weights(self.state.weights)

    def _step(self) -> None:
        line = self._train_step()
        if line is None:
            return
        interval = self.config.train.eval_interval_steps
        if interval and self.state.step % interval == 0:
            self.evaluate()
        for callback in self.callbacks:
            callback.on_step(self, line)

    def _update_mixture(self) -> None:
        self.world.enter("mixture", self.state.step)
        record = self.policy.decide(self.state, self.recorded)
        if record is None:
            return
        if self.recorded.get(record.step) != record:
            self.recorded[record.step] = record
            point("mixture.record", step=record.step)
            if self.world.is_leader:
                files.append_jsonl(self.run.mixtures_file, record.model_dump())
        point("mixture.switch", step=record.step)
        if record.changed:
            self.loader.set_weights(record.weights)
            # another mixture has another loss, and other gradients
            self.state.recent_losses, self.state.recent_grad_norms = [], []
        # one that was recorded before a domain joined does not name it
        self.state.weights = {name: record.weights.get(name, 0.0) for name in self.catalogue.names}
        self.state.mixture_version = record.version
        self._announce("on_mixture", record)

    def _train_step(self) -> TrainLine | None:
        """None: the batch was bad, or is known as such, and the step is still to be made."""
        step = self.state.step
        point("train.step", step=step)
        # Models with dropout draw from a generator that depends on step and replica only: exact after a
        # resume, and the same on all ranks of a replica.
        torch.manual_seed(derive_seed(self.config.seed, "step", step, self.engine.replica.rank))
        lr = learning_rate(self.config.schedule, self.config.optimizer.lr, step, self.config.train.steps)
        self.world.enter("reading data", step)
        with self._throughput.waiting_for_data():
            loaded = next(self.loader)
        if loaded.number in self.bad_steps.left_out:
            targets = loaded.batch.targets
            nothing = self._by_domain(loaded, torch.zeros(len(targets)).double(), targets)
            self._leave_out(self._count_tokens(self.world.sum(nothing)), flops_per_token=0.0)
            self.bad_steps.note_left_out()
            return None
        microbatches = loaded.batch.split(self.config.train.micro_batch_size)
        self.world.enter("training", step)
        limits = self.bad_steps.limits(self.state)
        try:
            work = self.method.prepare(step, microbatches)
            result = self.engine.train_step(
                work.microbatches,
                lr=lr,
                loss_limit=limits.loss,
                norm_limit=limits.grad_norm,
                loss=work.loss,
                adjust=work.adjust,
            )
        except BadStepError as error:
            self._meet_bad_step(loaded, error)
            return None
        self.method.applied(step)
        sums, readings = self._gather(loaded, result)
        line = self._book(sums, readings, result.grad_norm, lr)
        self.bad_steps.note_good(self.state, line.loss, line.grad_norm)
        return line

    def _meet_bad_step(self, loaded: LoadedBatch, error: BadStepError) -> None:
        """Collective. Do as ``train.on_bad_step`` says.

        Raises:
            UserError: that is to stop.
        """
        self.world.enter("bad step", self.state.step)
        sums = self.world.sum(self._by_domain(loaded, error.losses, error.targets))
        self._leave_out(self._count_tokens(sums), flops_per_token=self.engine.train_flops)
        self.state.loader = self.loader.state_dict()
        checkpoint = None
        if self.config.train.on_bad_step == "rollback":
            self.checkpointer.wait()
            checkpoint = self.checkpointer.newest()
        record = self.bad_steps.decide(
            error, self.state, loaded.number, self._mean_by_domain(sums), checkpoint
        )
        if record.action == "stop":
            self.checkpointer.wait()
            kept = max(self.run.complete_checkpoints(), default=None)
            raise UserError(
                f"step {record.step}: {record.reason}. Nothing of it was applied; a resume goes on from "
                f"{'the beginning' if kept is None else f'step {kept}'}: set train.on_bad_step to skip or "
                "rollback, or start another run with a lower optimizer.lr"
            )
        if record.checkpoint is not None:
            self._go_back(record.checkpoint)

    def _go_back(self, step: int) -> None:
        """Collective. To a checkpoint; where the data go on, the boundary of its step tells."""
        with self.ledger.timed("checkpoints"):
            self.state = self.checkpointer.load(self.engine, step)
        self.ledger.move("train", LEFT_OUT, since=self.state.costs.get("train"))
        self.state.join(self.catalogue.names)
        self._place_loader(self.state.loader)
        self._last_evaluation = self._entered = None

    def _leave_out(self, tokens: int, *, flops_per_token: float) -> None:
        """What a batch has cost that changes nothing."""
        seconds = self._throughput.lap()
        self.ledger.add(LEFT_OUT, seconds=seconds, flops=tokens * flops_per_token, tokens=tokens)

    def _by_domain(self, loaded: LoadedBatch, losses: Tensor, targets: Tensor) -> Tensor:
        """Losses, targets and samples of each domain, [3, D] float64: what this rank has to a sum over all
        ranks.

        Args:
            losses: [b] float64, of this replica's samples.
            targets: [b] int64.
        """
        sums = torch.zeros(3, len(self.catalogue.names), dtype=torch.float64)
        if self.engine.replica.counts:
            rows = torch.stack([losses, targets.to(losses), torch.ones_like(losses)])  # [3, b]
            sums.index_add_(1, loaded.domain_ids, rows)
        return sums

    def _gather(self, loaded: LoadedBatch, result: StepResult) -> tuple[Tensor, Tensor]:
        """Losses, targets and samples of each domain, summed over the global batch, [3, D] float64, and every
        rank's readings [W, R], by one collective."""
        sums = self._by_domain(loaded, result.sample_losses, result.targets)
        mine = self._throughput.readings(self.state.step + 1)
        readings = torch.zeros(self.world.size, len(mine), dtype=torch.float64)
        readings[self.world.rank] = mine
        both = self.world.sum(torch.cat([sums.flatten(), readings.flatten()]))
        return both[: sums.numel()].view_as(sums), both[sums.numel() :].view_as(readings)

    def _book(self, sums: Tensor, readings: Tensor, grad_norm: float, lr: float) -> TrainLine:
        """Advance the state by one step and describe it. Tokens are T for each sample, padding included: it
        is computed on too."""
        losses, targets, _ = sums  # [D] each
        tokens = self._count_tokens(sums)
        self.state.step += 1
        seconds = self._throughput.lap()
        self.ledger.add("train", seconds=seconds, flops=tokens * self.engine.train_flops, tokens=tokens)
        return TrainLine(
            step=self.state.step,
            loss=float(losses.sum() / targets.sum()),
            domain_loss=self._mean_by_domain(sums),
            grad_norm=grad_norm,
            lr=lr,
            tokens=self.state.tokens,
            mixture_version=self.state.mixture_version,
            method=self.method.numbers(),
            **self._throughput.describe(
                readings,
                tokens=tokens,
                tokens_per_pass=self.config.train.micro_batch_size * self.catalogue.sequence_length,
                seconds=seconds,
            ),
        )

    def _count_tokens(self, sums: Tensor) -> int:
        """Tokens of a global batch, which were read now. ``sums`` [3, D]: of :meth:`_by_domain`."""
        length = self.catalogue.sequence_length
        counts = [int(count) * length for count in sums[2].tolist()]
        for name, count in zip(self.catalogue.names, counts, strict=True):
            self.state.domain_tokens[name] += count
        return sum(counts)

    def _mean_by_domain(self, sums: Tensor) -> dict[str, float]:
        """Nats per token of the domains in a global batch."""
        by_domain = zip(self.catalogue.names, sums[0].tolist(), sums[1].tolist(), strict=True)
        return {name: total / count for name, total, count in by_domain if count}

    def evaluate(self) -> EvalLine:
        """Collective. Mean held-out loss per domain, always on the same samples; once for each step."""
        if self._last_evaluation is not None and self._last_evaluation.step == self.state.step:
            return self._last_evaluation
        self.world.enter("evaluation", self.state.step)
        point("train.evaluate", step=self.state.step)
        sets = [HeldOut(self.catalogue.names, self.heldout), *([self.watched] if self.watched else [])]
        loss: dict[str, float] = {}
        stderr: dict[str, float] = {}
        self._samples = [(one, self._sample_sums(one.samples)) for one in sets]
        for one, sums in self._samples:
            found = _by_domain(one.samples, sums, len(one.names))
            loss |= dict(zip(one.names, found.loss.tolist(), strict=True))
            stderr |= dict(zip(one.names, found.stderr.tolist(), strict=True))
        line = EvalLine(step=self.state.step, tokens=self.state.tokens, loss=loss, stderr=stderr)
        self._last_evaluation = line
        self._announce("on_evaluation", line)
        return line

    def held_out_losses(self) -> HeldOutLosses:
        """Every sample's loss in the last evaluation."""
        domains: dict[str, SampleLosses] = {}
        for one, sums in self._samples:
            ids, batch = one.samples.domain_ids.numpy(), one.samples.batch
            domains |= sample_losses(
                one.names, ids, batch.tokens.numpy(), batch.loss_mask.numpy(), sums.numpy()
            )
        return HeldOutLosses(step=self.state.step, domains=domains)

    def losses_by_domain(self, heldout: EvalSet) -> DomainLosses:
        """Collective. Losses [D], in the catalogue's order."""
        return _by_domain(heldout, self._sample_sums(heldout), len(self.catalogue.names))

    def _sample_sums(self, heldout: EvalSet) -> Tensor:
        """Collective. Each sample's loss summed over its targets, [N] float64."""
        batch, tokens = heldout.batch, heldout.batch.tokens.numel()
        with self.ledger.timed("held-out evaluation"):
            sums = self.engine.evaluate(batch, self.config.train.micro_batch_size)
        self.ledger.add("held-out evaluation", flops=tokens * self.engine.flops.forward, tokens=tokens)
        return sums

    def save_checkpoint(self, checkpointer: Checkpointer) -> None:
        """Collective. What the steps have logged is on disk before it counts."""
        self.world.enter("checkpoint", self.state.step)
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
            self.method.close()
            self.loader.close()


def _by_domain(heldout: EvalSet, sums: Tensor, domains: int) -> DomainLosses:
    """Losses [D] from those of the samples, [N]."""
    return losses_by_domain(sums.numpy(), heldout.batch.targets.numpy(), heldout.domain_ids.numpy(), domains)
