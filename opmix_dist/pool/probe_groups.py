"""The probes of a search: which ranks train which of them together, and what is on disk already."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

from opmix_dist.config import SharedConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.data.build import read_options
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.loader import MixtureLoader
from opmix_dist.distributed import World
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import SearchDir
from opmix_dist.exchange.schemas import SearchRequest
from opmix_dist.faults.points import point
from opmix_dist.models.compute import Compute
from opmix_dist.models.lora import JointAdapters
from opmix_dist.pool.probes import save_probe, train_probes
from opmix_dist.pool.team import Crew, Team
from opmix_dist.seeds import derive_seed

log = logging.getLogger(__name__)


class ProbeGroups:
    """Trains the groups of probes that are not on disk whole, each team its own.

    A group is trained again as a whole: the shapes of its products, and with them the last digits of its
    results, do not depend on where an earlier attempt was killed.
    """

    def __init__(
        self,
        search: SearchDir,
        request: SearchRequest,
        config: SharedConfig,
        catalogue: Catalogue,
        world: World,
        crew: Crew,
        *,
        kernels: bool,
    ) -> None:
        """``kernels``: whether Triton kernels compute."""
        self.search, self.request, self.config = search, request, config
        self.catalogue, self.world, self.crew, self.kernels = catalogue, world, crew, kernels

    @property
    def all(self) -> list[list[str]]:
        """Components that are trained jointly. Settings decide, and not the number of ranks: groups of other
        sizes would give other last digits."""
        names = self.request.components
        count = math.ceil(len(names) / self.config.search.probes.max_joint)
        return [names[i::count] for i in range(count)]

    def missing(self) -> list[list[str]]:
        """Collective. Groups of which an adapter is not there, as the leader sees the file system."""
        plan = ",".join(str(i) for i, names in enumerate(self.all) if not self._is_trained(names))
        todo = self.world.share_text(plan if self.world.is_leader else None)
        return [self.all[int(i)] for i in todo.split(",") if i]

    def _is_trained(self, names: list[str]) -> bool:
        return all(files.is_complete(self.search.probe(name)) for name in names)

    def train(self, model: PreTrainedModel, groups: list[list[str]], on_step: Callable[[int], None]) -> None:
        """Train this rank's of the ``groups`` on ``model``, which stays as it is. Communicates within teams
        only.

        Raises:
            BrokenTeamError: as :meth:`Team.in_step`.
        """
        self._tell_idle(len(groups))
        alone, shared = self.crew.deal(groups, self.config.search.probes.passes)
        for team, mine in ((self.crew.team, alone), (self.crew.everyone, shared)):
            for names in mine:
                with team.in_step():
                    self._train_group(model, names, on_step, team)

    def _tell_idle(self, groups: int) -> None:
        probes, ranks = self.config.search.probes, self.world.size
        idle = self.crew.idle(groups, probes.passes)
        if not idle or not self.world.is_leader:
            return
        log.info(
            "%d of %d ranks have no work of their own in the last round of %d group(s) of probes: a smaller "
            "search.probes.max_joint (%d) makes more groups, a smaller search.probes.micro_batch_size (%d) "
            "more passes of a step to share",
            idle,
            ranks,
            groups,
            probes.max_joint,
            probes.samples_per_pass,
        )

    def _train_group(
        self, model: PreTrainedModel, names: list[str], on_step: Callable[[int], None], team: Team
    ) -> None:
        start = time.perf_counter()
        adapters, curves = train_probes(
            model,
            {name: self._batches(name) for name in names},
            self.config.search.probes,
            base_lr=self.request.base_lr,
            betas=self.config.optimizer.betas,
            seeds={name: derive_seed(self.request.seed, "probe", name) for name in names},
            on_step=on_step,
            compute=Compute(getattr(torch, self.config.engine.param_dtype), self.kernels),
            team=team,
        )
        seconds = time.perf_counter() - start

        def save() -> None:
            for name in names if team.leads else ():
                point("probe.save", detail=name)
                folder = self.search.probe(name)
                save_probe(adapters, name, curves[name], folder, self.request.snapshot, seconds)

        team.together(save)
        adapters.remove()

    def _batches(self, component: str) -> Iterator[TokenBatch]:
        """Training samples in the component's proportions, in an order of the component's own."""
        row = self.request.composition[self.request.components.index(component)]
        loader = MixtureLoader(
            self.catalogue,
            dict(zip(self.request.domains, row, strict=True)),
            global_batch_size=self.config.search.probes.batch_size,
            rank=0,
            world_size=1,
            seed=derive_seed(self.request.seed, "probe data", component),
            shuffle_block=self.config.data.shuffle_block,
            reading=read_options(self.config.data),
        )
        try:
            for loaded in loader:
                yield loaded.batch
        finally:  # when the probe is trained and nobody asks for more
            loader.close()

    @property
    def tokens_each(self) -> int:
        """Training tokens that each probe reads."""
        probes = self.config.search.probes
        return probes.steps * probes.batch_size * self.catalogue.sequence_length

    def earlier_seconds(self, trained: list[list[str]]) -> float:
        """What groups other than those that were ``trained`` now took in earlier attempts, as they noted."""
        noted = (
            files.require_complete(self.search.probe(names[0]), "probe")["group_seconds"]
            for names in self.all
            if names not in trained
        )
        return float(sum(noted))

    def load(self, model: PreTrainedModel) -> JointAdapters:
        """All probes, injected in ``model``."""
        probes, names = self.config.search.probes, self.request.components
        adapters = JointAdapters(model, names, rank=probes.rank, alpha=probes.alpha, seeds=[0] * len(names))
        for index, name in enumerate(names):
            adapters.load_peft(index, self.search.probe(name))
        return adapters
