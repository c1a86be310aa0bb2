"""``opmix validate``: real runs, simulations of them, and what comes of comparing the two."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from opmix_dist.config import SharedConfig
from opmix_dist.data.build import held_out_samples
from opmix_dist.distributed import PeerError, World
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.history import open_domains
from opmix_dist.exchange.rundir import RunDir, SearchDir, read_record, write_record
from opmix_dist.exchange.schemas import PhaseCost, SearchRequest, SearchStage
from opmix_dist.ledger import Ledger
from opmix_dist.models.build import snapshot_source
from opmix_dist.models.flops import count_flops
from opmix_dist.models.source import ModelSource
from opmix_dist.pool.errors import SearchError
from opmix_dist.pool.evaluation_files import identity_of
from opmix_dist.pool.loading import searched_source
from opmix_dist.pool.solving import search_problem
from opmix_dist.pool.team import Crew
from opmix_dist.process import lock_run
from opmix_dist.validate.comparing import compare
from opmix_dist.validate.config import ValidateConfig
from opmix_dist.validate.design import Point, design_points, same_mixture
from opmix_dist.validate.real import RealRuns, Recipe, Task, alone, recipe_for
from opmix_dist.validate.records import Comparison, RealRun, Validation, ValidationDir, digest
from opmix_dist.validate.results import FULL, PROBES, SNAPSHOT, Measured, validation
from opmix_dist.validate.simulators import Simulator, fill_model, own_model
from opmix_dist.validate.ways import ProbeWays, Way, by_full_parameters, by_snapshot, telling_steps

R = TypeVar("R")
log = logging.getLogger(__name__)
EXPECTED = (UserError, SearchError, ValueError, OSError)


class Job(NamedTuple):
    """A comparison that is missing: way to simulate, number of the point, key of the real run."""

    way: str
    point: int
    run: str


def chosen_search(run: RunDir, name: str | None) -> SearchDir:
    """The search that is named, or the last that proposed; UserError where there is none."""
    found = [search for search in run.search_dirs() if name in (None, search.name)]
    for search in reversed(found):
        status = search.status()
        if status is not None and status.stage is SearchStage.PROPOSED:
            return search
    which = f"search {name} that is finished" if name else "finished search"
    raise UserError(f"{run.path} has no {which}: validation compares with what one has simulated")


def validate(run: RunDir, settings: ValidateConfig, world: World) -> tuple[Validation, ValidationDir] | None:
    """Collective over ``world``. What was found, on the leader; None elsewhere.

    Raises:
        UserError: on every rank; anything that the user can mend.
    """
    if settings.ranks_per_model not in (1, world.size):
        raise UserError(
            f"ranks_per_model is {settings.ranks_per_model}: set it to 1, or to all {world.size} rank(s)"
        )
    search = chosen_search(run, settings.search)
    folder = ValidationDir(Path(settings.folder or run.path / "validation" / search.name))
    with _locked(folder, world):
        return _Validating(run, search, folder, settings, world).run()


@contextmanager
def _locked(folder: ValidationDir, world: World) -> Iterator[None]:
    """Collective. One validation at a time writes a folder."""
    lock, failure = None, ""
    if world.is_leader:
        try:
            lock = lock_run(folder.path)
        except (UserError, OSError) as error:
            failure = str(error)
    try:
        if text := world.share_text(failure if world.is_leader else None):
            raise UserError(text)
        yield
    finally:
        if lock is not None:
            lock.close()


@dataclass
class _Validating:
    run_dir: RunDir
    search: SearchDir
    folder: ValidationDir
    settings: ValidateConfig
    world: World

    def __post_init__(self) -> None:
        self.crew = Crew.of(self.world, self.settings.ranks_per_model)
        self.ledger = Ledger(self.world.size)

    def run(self) -> tuple[Validation, ValidationDir] | None:
        self._together(self._open)
        self._train_probes()
        todo = self._todo()
        self._train(self._needed(todo))
        for name in self.ways:
            self._compare(name, [job for job in todo if job.way == name])
        found = self._together(lambda: self._conclude() if self.world.is_leader else None)
        return (found, self.folder) if found else None

    def _open(self) -> None:
        config: SharedConfig = self.run_dir.any_config()
        request: SearchRequest = self.search.request()
        self.config, self.request, self.proposal = config, request, self.search.proposal()
        if config.search.metric != "loss":
            raise UserError(
                "validation compares losses, and this search compared error rates (search.metric)"
            )
        self.catalogue = open_domains(config, request.domains)
        self.heldout = held_out_samples(
            config.data,
            self.catalogue,
            samples_per_domain=config.search.candidates.samples_per_domain,
            seed=config.seed,
        )
        device = self.world.device
        self.source = searched_source(self.run_dir.path, request, config, self.catalogue, device)
        self.forward_flops = count_flops(self.source.build(), self.catalogue.sequence_length).forward
        snapshot = self.run_dir.path / request.snapshot
        place = snapshot if snapshot.is_dir() else None
        identity = identity_of(request.snapshot, place, (), self.heldout, config.model.attention)
        self.points = design_points(request, self.proposal, self.settings.design)
        self.recipe: Recipe = recipe_for(
            self.run_dir,
            config,
            self.settings.real,
            step=request.step,
            horizon_samples=self.proposal.horizon_tokens // self.catalogue.sequence_length,
            identity=identity,
        )
        alike = {i: group[0] for group in same_mixture(self.points) for i in group}
        self.tasks = [self._tasks(self.points[alike[i]]) for i in range(len(self.points))]
        self.runs = {self.recipe.key(task): task for tasks in self.tasks for task in tasks}
        self.ways = self._find_ways(identity)

    def _tasks(self, point: Point) -> list[Task]:
        """The real runs of a point, one for each seed; points of one mixture have the same."""
        weights = dict(zip(self.request.domains, point.x.tolist(), strict=True))
        return [Task(point.name, weights, seed) for seed in self.settings.real.seeds]

    def _find_ways(self, identity: str) -> dict[str, Way]:
        """The order is that of the report."""
        makes = ProbeWays(self.request, self.config, self.catalogue, self.world, self.crew, identity)
        found = {SNAPSHOT: by_snapshot(identity), PROBES: makes.of_search(self.search)}
        for name, variant in self.settings.sweep.items():
            found[name] = makes.of_variant(name, variant, self.search, self.folder.sweep)
        if self.settings.full_parameters:
            found[FULL] = by_full_parameters(self._component_runs(), self._trained)
        return found

    def _component_runs(self) -> dict[int, list[str]]:
        """Keys of the components' real runs, by seed: the components are the first points."""
        columns = zip(*self.tasks[: len(self.request.components)], strict=True)
        return {column[0].seed: [self.recipe.key(task) for task in column] for column in columns}

    def _train_probes(self) -> None:
        """Collective. Other probes than the search's, where they are asked for."""
        for name in self.settings.sweep:
            groups = self.ways[name].probes
            if groups is None:
                continue
            missing, probes = groups.missing(), groups.config.search.probes
            on_step = telling_steps(name, probes.steps, self.world.is_leader)
            if missing:
                model = self._together(partial(self._load, self.source))
                with self.ledger.timed("probes"):
                    self._together(partial(groups.train, model, missing, on_step))
                flops = count_flops(self.source.build(), self.catalogue.sequence_length, probes.rank)
                tokens = sum(map(len, missing)) * groups.tokens_each
                self.ledger.add("probes", flops=tokens * flops.probe(), tokens=tokens)

    def _load(self, source: ModelSource) -> PreTrainedModel:
        return own_model(source, self.world.device, self._mesh())

    def _mesh(self) -> DeviceMesh | None:
        team = self.crew.team
        return team.mesh(self.world.device) if team.sharded else None

    def _file(self, job: Job) -> Path:
        way, u = self.ways[job.way], self.points[job.point].u
        of_u = [f"{share:.12g}" for share in u.tolist()] if way.uses_u else []
        return self.folder.comparison_file(digest(way.identity(), of_u, job.run, self.settings.kl))

    def _jobs(self, way: str) -> list[list[Job]]:
        """[P][S], of points and seeds."""
        return [[Job(way, i, self.recipe.key(task)) for task in tasks] for i, tasks in enumerate(self.tasks)]

    def _todo(self) -> list[Job]:
        """Collective. What is missing, as the leader sees the file system."""
        text: list[str] = []

        def find() -> None:
            jobs = [job for way in self.ways for row in self._jobs(way) for job in row]
            of_file = {self._file(job): job for job in reversed(jobs)}
            text.append(json.dumps([job for file, job in of_file.items() if not file.exists()][::-1]))

        self._together(lambda: find() if self.world.is_leader else None)
        return [Job(*job) for job in json.loads(self.world.share_text(text[0] if text else None))]

    def _needed(self, todo: Sequence[Job]) -> list[str]:
        """Collective. Keys of the real runs whose models are needed and not there."""
        keys = {job.run for job in todo}
        for seed in {self.runs[job.run].seed for job in todo if job.way == FULL}:
            keys |= {*self._component_runs()[seed]}
        ordered = [key for key in self.runs if key in keys]
        text = ",".join(key for key in ordered if not files.is_complete(self.folder.model(key)))
        return [
            key for key in self.world.share_text(text if self.world.is_leader else None).split(",") if key
        ]

    def _train(self, keys: Sequence[str]) -> None:
        """Collective. Deal the real runs out."""
        together = self.crew.team.sharded
        mine = list(keys) if together else list(keys[self.world.rank :: self.world.size])
        if self.world.is_leader and keys:
            log.info("%d real runs of %d steps on %d rank(s)", len(keys), self.recipe.steps, self.world.size)

        def work() -> None:
            world = self.world if together else alone(self.world)
            with self.crew.team.in_step():
                trainer = RealRuns(self.run_dir, self.folder, self.recipe, self.source, self.catalogue, world)
                for number, key in enumerate(mine, 1):
                    trainer.train(self.runs[key], f"real run {number}/{len(mine)}")

        self._together(lambda: work() if mine else None)
        self._free()

    def _compare(self, way: str, todo: Sequence[Job]) -> None:
        """Collective. Compare the real runs' models with those that ``way`` simulates."""
        runs = list(dict.fromkeys(job.run for job in todo))
        mine = runs if self.crew.team.sharded else runs[self.world.rank :: self.world.size]
        if runs and self.world.is_leader:
            log.info("comparing %d real runs with %s", len(runs), self.ways[way].about)

        def work(seed: int) -> None:
            of_seed = [key for key in mine if self.runs[key].seed == seed]
            if not of_seed:
                return
            with self.crew.team.in_step():
                simulator = self.ways[way].build(self._load(self.source), seed)
                real = self._load(self.source)
                for key in of_seed:
                    source = self._trained(key)
                    fill_model(real, source.shapes, source.part)
                    for job in (job for job in todo if job.run == key):
                        self._compare_one(job, simulator, real)

        for seed in self.settings.real.seeds:
            self._together(partial(work, seed))
            self._free()

    def _compare_one(self, job: Job, simulator: Simulator, real: PreTrainedModel) -> None:
        start = time.perf_counter()
        with simulator.at(self.points[job.point].u):
            found = compare(
                real,
                simulator.model,
                self.heldout.batch,
                batch_size=self.settings.evaluation_batch_size,
                wants_divergence=self.settings.kl,
                team=self.crew.team,
                dtype=getattr(torch, self.config.engine.param_dtype),
            )
        if self.crew.team.leads:
            record = Comparison(
                real=found[:, 0].tolist(),
                simulated=found[:, 1].tolist(),
                divergence=found[:, 2].tolist() if self.settings.kl else None,
                seconds=time.perf_counter() - start,
                flops=2 * self.heldout.batch.tokens.numel() * self.forward_flops,
            )
            write_record(self._file(job), record)

    def _trained(self, key: str) -> ModelSource:
        """The model of a real run."""
        files.require_complete(self.folder.model(key), "model")
        settings = self.config.model
        return snapshot_source(
            self.folder.model(key),
            attention=settings.attention,
            trust_remote_code=settings.trust_remote_code,
        )

    def _conclude(self) -> Validation:
        """On the leader."""
        compared = {
            way: [[read_record(self._file(job), Comparison) for job in row] for row in self._jobs(way)]
            for way in self.ways
        }
        snapshot = np.array([self.proposal.snapshot[name] for name in self.request.domains])
        abouts = {name: way.about for name, way in self.ways.items()}
        samples = self.recipe.steps * self.recipe.config.train.global_batch_size
        record, chosen = validation(
            self.request,
            search_problem(self.request, self.config.search.proposal, snapshot),
            Measured(self.points, compared, abouts, self.heldout),
            self.recipe,
            self.settings,
            interpolation=self.config.search.candidates.interpolation,
            probe_tokens=self.proposal.horizon_tokens,
            tokens=samples * self.catalogue.sequence_length,
            costs=self._costs(compared),
        )
        write_record(self.folder.calibration_file, chosen)
        write_record(self.folder.result_file, record)
        if not self.settings.keep_models:
            files.remove_folder(self.folder.models)
        return record

    def _costs(self, compared: Mapping[str, Sequence[Sequence[Comparison]]]) -> dict[str, PhaseCost]:
        """Real runs and comparisons of all attempts, as their records noted; probes of this attempt."""
        real = [read_record(self.folder.run_file(key), RealRun) for key in self.runs]
        pieces = [one for rows in compared.values() for row in rows for one in row]
        ranks, samples = self.crew.team.size, self.heldout.batch.tokens.numel()

        def total(records: Sequence[RealRun] | Sequence[Comparison], tokens: int) -> PhaseCost:
            seconds = sum(one.seconds for one in records)
            flops = sum(one.flops for one in records)
            return PhaseCost(seconds=seconds, device_seconds=seconds * ranks, flops=flops, tokens=tokens)

        found = {
            "real runs": total(real, sum(run.tokens for run in real)),
            "comparison": total(pieces, 2 * len(pieces) * samples),
        }
        if "probes" in self.ledger.costs:
            found["probes"] = self.ledger.costs["probes"].model_copy(update={"possible_flops": None})
        return found

    def _together(self, work: Callable[[], R]) -> R:
        """What ``work`` returns, which communicates within teams only; if it fails on one rank, UserError on
        all. Collective."""
        failure, result = None, None
        try:
            result = work()
        except EXPECTED as error:
            failure = str(error) or type(error).__name__
        try:
            self.world.agree(failure)
        except PeerError as error:
            raise UserError(failure or str(error)) from None
        return cast(R, result)  # no rank has failed, this one neither

    def _free(self) -> None:
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
