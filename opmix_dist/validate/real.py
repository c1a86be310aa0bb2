"""Real runs: the whole model trained on one mixture after the other, always from the same state."""

from __future__ import annotations

import logging
import math
import time
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from opmix_dist.config import RunConfig, SharedConfig, TrainConfig
from opmix_dist.data.build import read_options
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.loader import MixtureLoader
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines.base import KINDS, BadStepError, Engine
from opmix_dist.engines.build import build_engine
from opmix_dist.engines.fsdp import fill
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.history import history_of, stage_seed
from opmix_dist.exchange.rundir import RunDir, read_record, write_record
from opmix_dist.models.source import ModelSource
from opmix_dist.pool.errors import SearchError
from opmix_dist.seeds import derive_seed
from opmix_dist.train.checkpoint_storage import SafePlanner, SafeReader
from opmix_dist.train.model_writer import ModelWriter
from opmix_dist.train.schedule import learning_rate
from opmix_dist.train.state import STATE_FILE, TrainerState
from opmix_dist.validate.config import RealConfig
from opmix_dist.validate.records import RealRun, ValidationDir, digest

log = logging.getLogger(__name__)
LOG_INTERVAL_S = 30.0


@dataclass(frozen=True)
class Task:
    """One real run to be made: weights by domain and the seed of the data order."""

    name: str
    weights: dict[str, float]
    seed: int


@dataclass(frozen=True)
class Recipe:
    """How every real run is trained; the keys of runs depend on all of it.

    config: of a training run, whose optimizer, schedule and batch count. state: of the checkpoint that runs
    go on from; None: from the snapshot. steps: of a real run. identity: digest of what runs start from.
    """

    config: RunConfig
    settings: RealConfig
    state: TrainerState | None
    steps: int
    identity: str

    def key(self, task: Task) -> str:
        of_config = self.config.model_dump(mode="json", include={"optimizer", "schedule", "train", "seed"})
        of_engine = self.config.engine.model_dump(mode="json", include={"param_dtype", "float8"})
        of_data = self.config.data.model_dump(mode="json", include={"mask_documents", "shuffle_block"})
        settings = self.settings.model_dump(mode="json", exclude={"seeds"})
        weights = {name: f"{weight:.12g}" for name, weight in task.weights.items()}
        return digest(self.identity, of_config, of_engine, of_data, settings, self.steps, weights, task.seed)

    def lr(self, step: int) -> float:
        """Learning rate of a real run's step, from 0."""
        train, peak = self.config.train, self.config.optimizer.lr
        if self.state is not None:
            return learning_rate(self.config.schedule, peak, self.state.step + step, train.steps)
        return learning_rate(self.settings.schedule, peak * self.settings.lr_multiplier, step, self.steps)


def recipe_for(
    run: RunDir,
    config: SharedConfig,
    settings: RealConfig,
    *,
    step: int,
    horizon_samples: int,
    identity: str,
) -> Recipe:
    """What real runs of a search are.

    Args:
        step: at which the search began.
        horizon_samples: that each probe has read.

    Raises:
        UserError: ``real.start: checkpoint`` where there is none at that step, or the run would have ended.
    """
    if settings.start == "checkpoint":
        return _continued(run, config, settings, step, horizon_samples, identity)
    size = settings.batch_size or config.search.probes.batch_size
    steps = settings.steps or max(1, round(horizon_samples / size))
    micro = settings.micro_batch_size or size
    if settings.micro_batch_size is None and isinstance(config, RunConfig):
        of_run = config.train.micro_batch_size
        micro = of_run if size % of_run == 0 else size
    if size % micro:
        raise UserError(f"real.micro_batch_size {micro} does not divide the {size} samples of a step")
    train = TrainConfig(steps=steps, global_batch_size=size, micro_batch_size=micro)
    return Recipe(_as_run(config, train), settings, None, steps, identity)


def _as_run(config: SharedConfig, train: TrainConfig) -> RunConfig:
    """Of full parameters, also where the run itself trains adapters."""
    if isinstance(config, RunConfig):
        model = config.model.model_copy(update={"lora": None})
        return config.model_copy(update={"train": train, "model": model})
    shared = {name: getattr(config, name) for name in SharedConfig.model_fields if name != "pool"}
    return RunConfig(**shared, train=train)


def _continued(
    run: RunDir, config: SharedConfig, settings: RealConfig, step: int, horizon_samples: int, identity: str
) -> Recipe:
    folder = run.checkpoint(step)
    if not isinstance(config, RunConfig) or not files.is_complete(folder):
        raise UserError(
            f"real.start checkpoint needs {folder}, which is not there: set checkpoint.keep_every_steps in "
            "the run so that it stays, or real.start to snapshot"
        )
    if config.model.lora is not None:
        raise UserError("real.start checkpoint goes on with all parameters, and the run trains adapters "
                        "(model.lora): set real.start to snapshot")  # fmt: skip
    state = read_record(folder / STATE_FILE, TrainerState)
    state.join(config.data.domains or state.weights)
    train = config.train
    steps = settings.steps or max(1, round(horizon_samples / train.global_batch_size))
    if step + steps > train.steps:
        raise UserError(
            f"real.steps {steps} from step {step} on is beyond the run's end at {train.steps}, where it has "
            "no learning rate: set real.steps lower, or real.start to snapshot"
        )
    return Recipe(config, settings, state, steps, identity)


def alone(world: World) -> World:
    """A world of this rank for an engine that needs no other; not collective."""
    return World(Placement(Role.TRAINER, 0, 1), world.device, timeout=world.timeout)


class RealRuns:
    """Trains real runs on one engine, which is put back to the start for each. Every method is collective
    over ``world``: the ranks that train one model together, one rank alone or all of them.

    Raises:
        UserError: the engine cannot be built, or a checkpoint is of another model.
    """

    def __init__(
        self, run: RunDir, folder: ValidationDir, recipe: Recipe, source: ModelSource, catalogue: Catalogue,
        world: World,
    ) -> None:  # fmt: skip
        self.run, self.folder, self.recipe, self.source = run, folder, recipe, source
        self.catalogue, self.world = catalogue, world
        config = recipe.config
        if world.size == 1:  # a run's own engine may be one of many ranks
            single = config.engine.model_copy(update={"name": "single"})
            config = config.model_copy(update={"engine": single})
        self.config = config
        self.engine: Engine = build_engine(config, source, world, catalogue.sequence_length)
        self.writer = ModelWriter(world, self.engine, source)

    def train(self, task: Task, place: str) -> None:
        """Train, write the model and then the record; ``place`` is how far the validation is, for the log."""
        key, recipe = self.recipe.key(task), self.recipe
        self.engine.load_state(self._read)
        start, losses = time.perf_counter(), []
        loader = self._loader(task)
        try:
            told = time.monotonic()
            for step in range(recipe.steps):
                losses.append(self._step(task, loader, step))
                if time.monotonic() - told > LOG_INTERVAL_S and self.world.is_leader:
                    told = time.monotonic()
                    left = (time.perf_counter() - start) * (recipe.steps - step - 1) / (step + 1)
                    log.info(
                        "%s %s: step %d/%d, loss %.4f, %.0f s left",
                        place, task.name, step + 1, recipe.steps, losses[-1], left,
                    )  # fmt: skip
        finally:
            loader.close()
        tokens = recipe.steps * self._batch_size * self.catalogue.sequence_length
        failure = self.writer.write(self.folder.model(key), dtype=torch.float32, marker={"run": task.name})
        if failure:
            raise SearchError(f"the model of a real run could not be written: {failure}")
        record = RealRun(
            mixture=task.weights,
            seed=task.seed,
            steps=recipe.steps,
            tokens=tokens,
            losses=losses,
            seconds=time.perf_counter() - start,
            flops=tokens * self.engine.flops.train(),
        )
        if self.world.is_leader:
            write_record(self.folder.run_file(key), record)
            log.info("%s %s: done in %.0f s, last loss %.4f", place, task.name, record.seconds, losses[-1])

    @property
    def _batch_size(self) -> int:
        return self.config.train.global_batch_size

    def _loader(self, task: Task) -> MixtureLoader:
        """The same order within each domain for all mixtures: what differs are the proportions."""
        data, state = self.config.data, self.recipe.state
        if state is not None:
            seed = stage_seed(self.config, history_of(self.config), "data")
        else:
            seed = derive_seed(self.config.seed, "validation data", task.seed)
        loader = MixtureLoader(
            self.catalogue,
            task.weights,
            global_batch_size=self._batch_size,
            rank=self.engine.replica.rank,
            world_size=self.engine.replica.size,
            seed=seed,
            num_workers=data.num_workers,
            prefetch_batches=data.prefetch_batches,
            shuffle_block=data.shuffle_block,
            reading=read_options(data),
        )
        if state is not None:
            loader.load_state_dict(state.loader)
            loader.set_weights(task.weights)
        return loader

    def _step(self, task: Task, loader: MixtureLoader, step: int) -> float:
        """Mean training loss of the step, nats per token; seeds and rates are those of a training run."""
        number = step if self.recipe.state is None else self.recipe.state.step + step
        torch.manual_seed(derive_seed(self.config.seed, "step", number, self.engine.replica.rank))
        batch = next(loader).batch
        try:
            result = self.engine.train_step(
                batch.split(self.config.train.micro_batch_size), lr=self.recipe.lr(step)
            )
        except BadStepError as error:
            raise SearchError(
                f"the real run {task.name} fails at its step {step + 1} ({error}): lower real.lr_multiplier, "
                "or give real.schedule a warm-up"
            ) from None
        sums = torch.stack([result.sample_losses.sum(), result.targets.sum().double()])
        nats, targets = self.engine.sum(sums).tolist()
        return nats / targets if math.isfinite(nats) else nats

    def _read(self, part: dict[str, Any]) -> None:
        """Fill a part of the engine's state: from the run's checkpoint, or fresh from the snapshot."""
        if self.recipe.state is not None:
            folder = self.run.checkpoint(self.recipe.state.step)
            reader, planner = SafeReader(folder), SafePlanner()
            with warnings.catch_warnings():  # one process is meant, of however many
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
                dcp.load(part, storage_reader=reader, planner=planner, no_dist=self.world.size == 1)
            return
        for kind, values in part.items():
            if kind not in KINDS:
                values.zero_()  # AdamW's steps
                continue
            for name, tensor in values.items():
                if kind == "parameter":
                    put(tensor, partial(self.source.part, name))
                else:
                    _local(tensor).zero_()


def put(tensor: Tensor, part: Any) -> None:
    """Copy ``part(index)`` of a whole parameter into this rank's part of it."""
    if isinstance(tensor, DTensor):
        fill(tensor, part)
    else:
        tensor.copy_(part(()))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
