"""The ways to simulate that a validation compares: where their probes are, and that these are trained."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from transformers import PreTrainedModel

from opmix_dist.config import SharedConfig
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.distributed import World
from opmix_dist.exchange.rundir import SearchDir
from opmix_dist.exchange.schemas import SearchRequest
from opmix_dist.models.peft_files import ADAPTER_FILE
from opmix_dist.models.source import ModelSource
from opmix_dist.pool.interpolation import Interpolation
from opmix_dist.pool.plan import chosen_kernels
from opmix_dist.pool.probe_groups import ProbeGroups
from opmix_dist.pool.team import Crew
from opmix_dist.search_config import InterpolationName, ProbeConfig
from opmix_dist.validate.config import VariantConfig
from opmix_dist.validate.records import digest
from opmix_dist.validate.simulators import ByFullParameters, ByProbes, BySnapshot, Simulator

log = logging.getLogger(__name__)
LOG_INTERVAL_S = 30.0


@dataclass(frozen=True)
class Way:
    """One way to simulate a mixture.

    about: what it is, in words. identity: digest of all that its losses depend on besides u and the seed.
    build: the simulator, on a plain model of the snapshot, of real runs of a seed. probes: that it
    needs; None: none, or none of its own. uses_u: whether losses depend on u.
    """

    about: str
    identity: Callable[[], str]
    build: Callable[[PreTrainedModel, int], Simulator]
    probes: ProbeGroups | None = None
    uses_u: bool = True


def by_snapshot(identity: str) -> Way:
    return Way("the snapshot itself", lambda: identity, lambda model, seed: BySnapshot(model), uses_u=False)


def by_full_parameters(runs: Mapping[int, Sequence[str]], trained: Callable[[str], ModelSource]) -> Way:
    """With the components' real runs, of the same seed as the run that is compared with: both have read the
    data in one order.

    Args:
        runs: their keys, in the components' order, by seed; trained: the model of one.
    """
    return Way(
        "full-parameter deltas of the components' real runs",
        lambda: digest([*runs.values()]),
        lambda model, seed: ByFullParameters(model, [trained(key) for key in runs[seed]]),
    )


@dataclass(frozen=True)
class ProbeWays:
    """Makes ways that simulate with probes of one search's components.

    identity: digest of the snapshot.
    """

    request: SearchRequest
    config: SharedConfig
    catalogue: Catalogue
    world: World
    crew: Crew
    identity: str

    def of_search(self, search: SearchDir) -> Way:
        settings = self.config.search
        return self._way(
            "the search's own probes", search, settings.probes, settings.candidates.interpolation
        )

    def of_variant(self, name: str, variant: VariantConfig, search: SearchDir, folder: Path) -> Way:
        """Probes of other settings, in a folder of their own below ``folder``; where none is another, those
        of ``search``, which are there."""
        settings = self.config.search
        interpolation = variant.interpolation or settings.candidates.interpolation
        changed = variant.model_dump(exclude_none=True).items()
        words = (f"{key} {value if isinstance(value, str) else f'{value:g}'}" for key, value in changed)
        about = f"probes with {', '.join(words) or 'nothing changed'}"
        probes = variant.probes(settings.probes)
        if probes == settings.probes:
            way = self._way(about, search, probes, interpolation)
            return replace(way, probes=None)
        tag = digest(self.identity, probes.model_dump(mode="json"))[:8]
        return self._way(about, SearchDir(folder / f"{name}-{tag}"), probes, interpolation)

    def _way(
        self, about: str, place: SearchDir, probes: ProbeConfig, interpolation: InterpolationName
    ) -> Way:
        search = self.config.search.model_copy(update={"probes": probes})
        groups = ProbeGroups(
            place,
            self.request,
            self.config.model_copy(update={"search": search}),
            self.catalogue,
            self.world,
            self.crew,
            kernels=chosen_kernels(search.kernels, self.world.device, self.crew.team.size),
        )

        @cache
        def identity() -> str:
            """Of the weights themselves: probes that were trained anew are others."""
            adapters = [place.probe(name) / ADAPTER_FILE for name in self.request.components]
            rule = [] if interpolation == "linear" else [interpolation]
            return digest(self.identity, [hash_file(path) for path in adapters], *rule)

        def build(model: PreTrainedModel, seed: int) -> ByProbes:
            adapters = groups.load(model)
            return ByProbes(adapters, Interpolation.of(interpolation, adapters))

        return Way(about, identity, build, groups)


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def telling_steps(name: str, steps: int, leads: bool) -> Callable[[int], None]:
    """To be called after each step of probes: says from time to time how far they are."""
    told = time.monotonic()

    def on_step(step: int) -> None:
        nonlocal told
        if leads and time.monotonic() - told > LOG_INTERVAL_S:
            told = time.monotonic()
            log.info("probes of %s: step %d/%d", name, step, steps)

    return on_step
