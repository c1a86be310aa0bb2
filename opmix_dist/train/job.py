"""``opmix train``: one launch, every rank finds its role, the parts are built and run."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from datetime import UTC, datetime

import numpy
import torch
import transformers

from opmix_dist import __version__
from opmix_dist.config import RESUME_MAY_CHANGE, CheckpointConfig, RunConfig
from opmix_dist.data.build import held_out_samples, open_data, read_options
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.loader import EvalSet, MixtureLoader
from opmix_dist.data.mixtures import check_group_names, chosen_mixture
from opmix_dist.determinism import (
    require_repeatable_run,
    require_repeatable_search,
    use_deterministic_kernels,
)
from opmix_dist.distributed import Placement, World
from opmix_dist.engines.base import Engine
from opmix_dist.engines.build import build_engine
from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.heldout import FILE as HELD_OUT
from opmix_dist.exchange.history import (
    history_of,
    open_domains,
    stage_seed,
    start_run,
    starting_model,
)
from opmix_dist.exchange.opening import open_run
from opmix_dist.exchange.rundir import RunDir, write_record
from opmix_dist.exchange.schemas import EvalLine, MixtureRecord, Stopped, Summary
from opmix_dist.faults import points
from opmix_dist.hang import HangGuard
from opmix_dist.ledger import Ledger
from opmix_dist.methods.base import MethodAround
from opmix_dist.methods.build import build_method
from opmix_dist.models.build import check_tokenizer
from opmix_dist.models.devices import engine_peak_flops
from opmix_dist.models.lora import require_adaptable
from opmix_dist.models.source import ModelSource, open_source
from opmix_dist.pool.plan import require_kernels
from opmix_dist.pool.requests import check_components
from opmix_dist.pool.task_metric import require_tasks
from opmix_dist.pool.team import require_whole_teams
from opmix_dist.seeds import derive_seed
from opmix_dist.stopping import StopRequested, StopSignals, name_of, tell_launch
from opmix_dist.train.bad_steps import BadSteps
from opmix_dist.train.callbacks import (
    Callback,
    CheckpointCallback,
    JsonlLogger,
    ProgressReporter,
    TensorBoardLogger,
    WandbLogger,
    require,
)
from opmix_dist.train.checkpoint import Checkpointer
from opmix_dist.train.model_writer import ModelWriter
from opmix_dist.train.policy import POLICIES, Surroundings, check_schedule
from opmix_dist.train.ranks import check_ranks
from opmix_dist.train.state import TrainerState
from opmix_dist.train.trainer import HeldOut, Trainer

log = logging.getLogger(__name__)


def train_run(config: RunConfig, placement: Placement, stop: StopSignals) -> Stopped | None:
    """Every trainer rank of the launch calls this, in its main thread.

    Returns:
        None when the run has ended; else how a trainer rank was stopped, on request.

    Raises:
        UserError: as of :func:`~opmix_dist.train.roles.run_job`.
    """
    run = RunDir(config.run_dir)
    catalogue, history = open_domains(config), history_of(config)
    weights = chosen_mixture(config.mixture.initial, catalogue, "mixture.initial", history)
    for step, chosen in config.mixture.schedule.items():
        chosen_mixture(chosen, catalogue, f"mixture.schedule.{step}", history)
    check_config_against(config, catalogue, placement)
    require_repeatable_run(config)
    check_tokenizer(starting_model(config), catalogue)
    if config.deterministic:
        use_deterministic_kernels()
    world = World.join(
        placement,
        device=config.engine.device,
        timeout_s=config.engine.collective_timeout_s,
        guard=_guard(run, config, placement),
    )
    try:
        stopped = Job(run, config, world, catalogue, history, weights, stop).run_to_end()
    except BaseException as error:
        world.explain(error)
        world.abandon()
        raise
    world.leave()
    return stopped


def _guard(run: RunDir, config: RunConfig, placement: Placement) -> HangGuard | None:
    limit_s = config.train.hang_timeout_s
    return HangGuard(placement.role, placement.rank, limit_s, run.hangs) if limit_s is not None else None


def check_config_against(config: RunConfig, catalogue: Catalogue, placement: Placement) -> None:
    """What the configuration alone cannot tell: sizes that depend on the data and the number of ranks."""
    check_ranks(config, placement.size)
    if config.start.run is not None:
        check_group_names(catalogue.names)
    if config.mixture.policy == "opmix":
        check_components(catalogue.names)
        if not (config.pool.ranks or config.pool.external):
            require_whole_teams(config.pool.ranks_per_model, placement.size)
        if config.search.metric == "tasks":
            require_tasks(catalogue)
    config.search.check_domains(catalogue.names, str(catalogue.root))


class Job:
    """The trainer ranks' side of a run: open the run directory, build, train, export, sum up."""

    def __init__(
        self,
        run: RunDir,
        config: RunConfig,
        world: World,
        catalogue: Catalogue,
        history: Mapping[str, int],
        weights: dict[str, float],
        stop: StopSignals,
    ) -> None:
        self.run, self.config, self.world = run, config, world
        self.catalogue, self.history, self.weights, self.stop = catalogue, history, weights, stop

    def run_to_end(self) -> Stopped | None:
        """Collective. None, or how the run was stopped before."""
        with open_run(self.run, self.config, self.world, RESUME_MAY_CHANGE):
            if not self._already_ended():
                return self._run()
            if self.world.is_leader:
                log.info("%s has ended already: nothing to do", self.run.path)
            return None

    def _run(self) -> Stopped | None:
        if self.world.is_leader:
            self.run.stopped_file.unlink(missing_ok=True)
        trainer = self._build()
        try:
            with self.stop.listening_to_keyboard():
                last = trainer.fit()
        except StopRequested:
            return self._say_stopped(trainer.state.step)
        self._finish(trainer, last)
        return None

    def _say_stopped(self, step: int) -> Stopped:
        """Collective. Write stopped.json, and let the pool ranks of this launch end."""
        number = self.stop.agreed(self.world)
        text = None
        if self.world.is_leader:
            stopped = Stopped(
                step=step,
                checkpoint=max(self.run.complete_checkpoints(), default=None),
                signal=name_of(number),
                at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            write_record(self.run.stopped_file, stopped)
            tell_launch()
            text = stopped.model_dump_json()
        return Stopped.model_validate_json(self.world.share_text(text))

    def _finish(self, trainer: Trainer, last: EvalLine) -> None:
        self.world.enter("evaluation", trainer.state.step)
        search_losses = trainer.losses_by_domain(self._search_samples()).loss.tolist()
        self._export()
        if self.world.is_leader:
            self._sum_up(trainer, last, search_losses)
        self.world.barrier()

    def _already_ended(self) -> bool:
        """Collective."""
        ended = [float(self.run.summary_file.exists())] if self.world.is_leader else None
        return bool(self.world.share(ended)[0])

    def _build(self) -> Trainer:
        config, world, catalogue = self.config, self.world, self.catalogue
        source = self._open_source()
        engine = build_engine(
            config, source, world, catalogue.sequence_length, adapter_seed=self._seed_of("adapters")
        )
        self.writer = ModelWriter(world, engine, source)
        reporter = ProgressReporter(config.train.log_interval_steps)
        checkpointer = Checkpointer(self.run, config.checkpoint, world)
        loader = MixtureLoader(
            catalogue,
            self.weights,
            global_batch_size=config.train.global_batch_size,
            rank=engine.replica.rank,
            world_size=engine.replica.size,
            seed=self._seed_of("data"),
            num_workers=config.data.num_workers,
            prefetch_batches=config.data.prefetch_batches,
            max_epochs=config.data.epochs_by_domain(catalogue.names),
            on_exhausted=config.data.on_exhausted,
            shuffle_block=config.data.shuffle_block,
            reading=read_options(config.data),
        )
        heldout = self._report_samples(catalogue)
        watched = self._watched()
        self._search_samples()
        callbacks = self._callbacks(reporter, checkpointer)
        ledger = Ledger(world.size, peak_flops=engine_peak_flops(config.engine, world.device))
        method = build_method(
            MethodAround(self.run, config, world, engine, source, catalogue, ledger, self.history)
        )
        if world.is_leader:  # only now: settings that cannot even be built leave no run behind
            self.run.write_config(config)
        state = self._restore(engine, checkpointer, loader)
        ledger.go_on(state.costs)
        recorded = self._recorded()
        check_schedule(config, recorded, state.step)
        around = Surroundings(
            self.run,
            config,
            world,
            self.writer,
            catalogue,
            ledger,
            reporter.on_search,
            self.stop,
            self.history,
        )
        return Trainer(
            run=self.run,
            config=config,
            world=world,
            engine=engine,
            catalogue=catalogue,
            loader=loader,
            heldout=heldout,
            watched=watched,
            policy=POLICIES[config.mixture.policy](around),
            method=method,
            callbacks=callbacks,
            checkpointer=checkpointer,
            bad_steps=BadSteps.open(self.run, config.train, world),
            state=state,
            recorded=recorded,
            ledger=ledger,
            stop=self.stop,
        )

    def _open_source(self) -> ModelSource:
        tokenizer = self.catalogue.load_tokenizer()
        ids = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        source = open_source(
            starting_model(self.config),
            vocab_size=self.catalogue.vocab_size,
            token_ids=ids,
            seed=derive_seed(self.config.seed, "weights"),
        )
        if self.config.mixture.policy == "opmix":
            require_adaptable(source.build())
            if not self.config.pool.external:  # that may run on another kind of device
                require_kernels(self.config.search.kernels, self.world.device)
                require_repeatable_search(self.config, self.world.device)
        return source

    def _search_samples(self) -> EvalSet:
        """Held-out samples that candidates are evaluated on."""
        return held_out_samples(
            self.config.data,
            self.catalogue,
            samples_per_domain=self.config.search.candidates.samples_per_domain,
            seed=self.config.seed,
        )

    def _seed_of(self, what: str) -> int:
        """A run that goes on from another reads the domains that both have in another order, and starts from
        other adapters."""
        return stage_seed(self.config, self.history, what)

    def _watched(self) -> HeldOut | None:
        """Domains that are evaluated and not trained on."""
        names = self.config.data.watch
        if not names:
            return None
        if trained := [name for name in names if name in self.catalogue.names]:
            raise UserError(f"data.watch names {trained[0]}, which is trained on: it is evaluated anyway")
        return HeldOut(tuple(names), self._report_samples(open_data(self.config.data, names)))

    def _report_samples(self, catalogue: Catalogue) -> EvalSet:
        """Held-out samples of the reported losses: others than the search chose its mixture on, also where
        there is no search, so that runs can be compared."""
        return held_out_samples(
            self.config.data,
            catalogue,
            samples_per_domain=self.config.train.eval_samples_per_domain,
            seed=self.config.seed,
            skip=self.config.search.candidates.samples_per_domain,
        )

    def _restore(self, engine: Engine, checkpointer: Checkpointer, loader: MixtureLoader) -> TrainerState:
        step = checkpointer.newest()
        if step is None:
            if self.config.start.optimizer == "keep":
                self._keep_moments(engine)
            return TrainerState(
                weights=self.weights,
                domain_tokens=dict.fromkeys(self.catalogue.names, 0),
                engine=engine.layout,
                optimizer=engine.optimizer_name,
                world_size=self.world.size,
                global_batch_size=self.config.train.global_batch_size,
                content=self._content(),
            )
        state = checkpointer.load(engine, step)
        for name, content in self._content().items():
            if state.content.get(name, content) != content:
                raise UserError(
                    f"domain {name} in {self.catalogue.root} has other documents than the checkpoint's"
                )
        for name in state.domain_tokens:
            if name not in self.catalogue.names:
                raise UserError(f"data.domains lacks {name}, which the run has: a domain leaves by weight 0")
        state.join(self.catalogue.names)
        state.content = self._content()
        loader.load_state_dict(state.loader)
        loader.set_weights(state.weights)
        batch_size = self.config.train.global_batch_size
        if self.world.is_leader and state.global_batch_size != batch_size:
            log.info("from step %d on, a step is %d samples", state.step, batch_size)
        state.engine, state.optimizer = engine.layout, engine.optimizer_name
        state.world_size, state.global_batch_size = self.world.size, batch_size
        return state

    def _keep_moments(self, engine: Engine) -> None:
        """Collective. Those of AdamW at the end of the run that this one goes on from."""
        run = start_run(self.config)
        assert run is not None  # checked with the configuration
        earlier = Checkpointer(run, CheckpointConfig(), self.world)
        steps = run.complete_checkpoints() if self.world.is_leader else []
        found = self.world.share([float(max(steps, default=-1))] if self.world.is_leader else None)
        step, last = int(found[0]), run.summary().steps
        if step != last:
            raise UserError(
                f"start.optimizer keep needs the checkpoint of step {last} in {run.checkpoints}, which is "
                "missing: set it to fresh"
            )
        state = earlier.load(engine, step, beside=False)
        if state.optimizer != engine.optimizer_name:
            raise UserError(
                f"start.optimizer keep: {run.path} holds the state of {state.optimizer}, and this engine has "
                f"{engine.optimizer_name}: set it to fresh"
            )

    def _content(self) -> dict[str, str]:
        """Hash of each domain's documents: a resumed run must find the same."""
        return {name: info.content_sha256 for name, info in self.catalogue.domains.items()}

    def _recorded(self) -> dict[int, MixtureRecord]:
        """Collective. The schedule on disk; a new run's begins with the initial mixture."""
        text = None
        if self.world.is_leader:
            records = self.run.mixtures()
            if not records:
                first = MixtureRecord(version=0, step=0, weights=self.weights, why="initial mixture")
                records = [first]
                files.append_jsonl(self.run.mixtures_file, first.model_dump())
            text = "\n".join(record.model_dump_json() for record in records)
        lines = self.world.share_text(text).splitlines()
        schedule = (MixtureRecord.model_validate_json(line) for line in lines)
        return {record.step: record for record in schedule}

    def _callbacks(self, reporter: ProgressReporter, checkpointer: Checkpointer) -> list[Callback]:
        """Checkpoints come last: what a checkpoint's step has logged is on disk before it counts."""
        callbacks: list[Callback] = []
        if self.world.is_leader:
            logging_config = self.config.logging
            callbacks += [JsonlLogger(), reporter]
            if logging_config.tensorboard:
                callbacks.append(TensorBoardLogger(str(self.run.path / "metrics" / "tensorboard")))
            if logging_config.wandb_project:
                plain = self.config.model_dump(mode="json")
                callbacks.append(
                    WandbLogger(logging_config.wandb_project, self.run.path.name, plain, str(self.run.path))
                )
            if logging_config.prometheus_port is not None:
                require("prometheus_client", "logging.prometheus_port")
                from opmix_dist.train.prometheus import PrometheusExporter

                callbacks.append(
                    PrometheusExporter(
                        self.run,
                        self.config.train.steps,
                        host=logging_config.prometheus_host,
                        port=logging_config.prometheus_port,
                    )
                )
        callbacks.append(CheckpointCallback(checkpointer, self.config.checkpoint.interval_steps))
        return callbacks

    def _export(self) -> None:
        """Collective. The final model and its tokenizer, loadable with transformers alone.

        Raises:
            UserError: on every rank; it could not be written.
        """
        folder = self.run.export
        self.world.enter("export", self.config.train.steps)
        failure = self.writer.write(
            folder,
            dtype=torch.float32,
            marker={"step": self.config.train.steps},
            extra=self.catalogue.load_tokenizer().save_pretrained,
        )
        if not failure and self.config.model.lora is not None:
            failure = self.writer.write_adapter(self.run.adapter)
        if failure:
            raise UserError(f"the model could not be exported to {folder}: {failure}; resume to try again")

    def _sum_up(self, trainer: Trainer, last: EvalLine, search_losses: list[float]) -> None:
        """summary.json, which tells the pool that the run has ended."""
        state = trainer.state
        summary = Summary(
            steps=state.step,
            tokens=state.tokens,
            domain_tokens=state.domain_tokens,
            final_loss=last.loss,
            final_stderr=last.stderr,
            history=dict(self.history),
            final_search_loss=dict(zip(self.catalogue.names, search_losses, strict=True)),
            mixture=state.weights,
            costs=trainer.ledger.costs,
            parameters=trainer.engine.num_parameters,
            world_size=self.world.size,
            versions={
                "opmix_dist": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "numpy": numpy.__version__,
            },
        )
        write_record(self.run.eval_file.with_name(HELD_OUT), trainer.held_out_losses())
        points.point("job.summary")
        write_record(self.run.summary_file, summary)
