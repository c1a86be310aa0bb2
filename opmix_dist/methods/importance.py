"""Penalties on moving parameters that matter to old domains: what EWC and MAS have in common.

The penalty is lambda / 2 * sum_i F_i (theta_i - theta*_i)^2, with theta* the parameters that the run started
from and F the importances, which are measured there on samples of the old domains and kept in
RUN/method/importance. Its gradient lambda F (theta - theta*) is added to that of the mean loss, before
clipping. All of it is element by element, on each rank's part of the parameters.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from opmix_dist.data.batch import TokenBatch
from opmix_dist.engines.base import BatchLoss
from opmix_dist.engines.single import SingleEngine
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.history import start_run
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.method_config import ImportanceConfig
from opmix_dist.methods.base import Method, MethodAround, StepWork
from opmix_dist.methods.old_data import key_of, old_domains, old_samples, shares_of
from opmix_dist.methods.stored import Parts, Provenance, combined, provenance, read_parts, write_parts

log = logging.getLogger(__name__)
PHASE = "importance"


class ImportanceMethod(Method):
    """Each of them says how important parameters are to a domain's samples."""

    settings: ImportanceConfig
    decay: float | None = None
    """Of earlier runs' importances, whose penalty then pulls towards this run's start; None: each earlier
    run keeps a penalty of its own."""

    def __init__(self, around: MethodAround) -> None:
        """
        Raises:
            UserError: no old domains, or adapters, to which nothing is important before they are trained.
        """
        super().__init__(around)
        name = around.config.method.name
        if around.config.model.lora is not None:
            raise UserError(
                f"method.name {name} keeps parameters where they were, and model.lora trains fresh ones: "
                "leave out model.lora, or set method.name to o_lora or gem"
            )
        assert isinstance(around.engine, SingleEngine)
        self.engine = around.engine
        self.domains = old_domains(around, self.settings.domains)
        self._squares: Tensor | None = None
        """F (theta - theta*)^2 summed over this rank's part of each parameter, [P], at the last step."""

    @abstractmethod
    def measure(self, samples: TokenBatch) -> dict[str, Tensor]:
        """Collective. Importances to one domain, this rank's parts, at the parameters as they are."""

    def begin(self, step: int) -> None:
        folder, world = self.around.run.importance, self.around.world
        there = [float(files.is_complete(folder))] if world.is_leader else None
        if not world.share(there)[0]:
            if step:
                raise UserError(
                    f"{folder} is missing, which the run's start has measured: restore it, or start anew in "
                    "another run_dir"
                )
            self._measure_all()
        parts = read_parts(folder, self.engine)
        self.importance, self.anchor = parts["importance"], parts["anchor"]

    def prepare(self, step: int, microbatches: Sequence[TokenBatch]) -> StepWork:
        self._step = step
        return StepWork(microbatches, adjust=self._add_penalty)

    def _add_penalty(self, gradients: dict[str, Tensor]) -> None:
        with self.around.ledger.timed("penalty"):
            squares = []
            for name, part in self.engine.parts().items():
                away = part - self.anchor[name]
                pull = self.importance[name] * away
                gradients[name].add_(pull, alpha=self.settings.strength)
                squares.append((pull * away).sum())
            self._squares = torch.stack(squares)

    def numbers(self) -> dict[str, float]:
        """Every ``train.log_interval_steps``, as it takes a collective."""
        if self._squares is None or (self._step + 1) % self.around.config.train.log_interval_steps:
            return {}
        return {"penalty": 0.5 * self.settings.strength * float(self.engine.sum_parts(self._squares))}

    def _measure_all(self) -> None:
        earlier = self._earlier()
        tokens = self.around.history
        if earlier is not None:  # whose importances have what came before it
            tokens = earlier.summary().domain_tokens
        domains = [name for name in self.domains if earlier is None or tokens.get(name, 0)]
        if not domains:
            raise UserError(
                f"start.run has read none of {', '.join(self.domains)}: its importances are kept without "
                f"{key_of(self.around)}.domains, so leave that out"
            )
        shares = shares_of(tokens, domains)
        samples = old_samples(self.around, domains, self.settings.samples_per_domain)
        fresh = {name: torch.zeros_like(part) for name, part in self.engine.parts().items()}
        with self.around.ledger.timed(PHASE):
            for domain, share in shares.items():
                for name, found in self.measure(samples[domain]).items():
                    fresh[name].add_(found, alpha=share)
        anchor = {name: part.clone() for name, part in self.engine.parts().items()}
        parts = self._with_earlier(earlier, fresh, anchor)
        total = self.engine.sum_parts(torch.stack([F.sum() for F in parts["importance"].values()]))
        made = Provenance(
            method=self.around.config.method.name,
            settings=self._kept_settings,
            domains=shares,
            samples={name: len(batch) for name, batch in samples.items()},
            earlier="" if earlier is None else str(earlier.path),
            sum=float(total),
        )
        write_parts(self.around.run.importance, self.around.world, self.engine, parts, made)

    @property
    def _kept_settings(self) -> dict[str, str]:
        """What the importances of several runs must have in common to be added."""
        return {}

    def _earlier(self) -> RunDir | None:
        """The run that this one goes on from, if it has importances of the same kind."""
        run = start_run(self.around.config)
        if run is None or not files.is_complete(run.importance):
            return None
        found = provenance(run.importance)
        if (found.method, found.settings) != (self.around.config.method.name, self._kept_settings):
            log.warning("%s are of another kind (%s) and are not taken over", run.importance, found.method)
            return None
        return run

    def _with_earlier(
        self, earlier: RunDir | None, fresh: dict[str, Tensor], anchor: dict[str, Tensor]
    ) -> Parts:
        if earlier is None:
            return {"importance": fresh, "anchor": anchor}
        before = read_parts(earlier.importance, self.engine)
        if self.decay is None:
            return combined([(before["importance"], before["anchor"]), (fresh, anchor)])
        for name, found in fresh.items():
            found.add_(before["importance"][name], alpha=self.decay)
        return {"importance": fresh, "anchor": anchor}

    def slopes(
        self, samples: TokenBatch, loss: Callable[[int], BatchLoss | None]
    ) -> Iterator[dict[str, Tensor]]:
        """Collective. The gradient of each sample by itself, for which all replicas compute the same samples.

        Args:
            loss: of each row; None: cross-entropy.
        """
        around, replicas = self.around, self.engine.replica.size
        for row in range(len(samples)):
            around.world.enter(PHASE, row)
            yield self.engine.gradient([samples[row : row + 1]], total=replicas, loss=loss(row))
        tokens = len(samples) * around.catalogue.sequence_length * replicas
        around.ledger.add(PHASE, flops=tokens * self.engine.train_flops, tokens=tokens)
