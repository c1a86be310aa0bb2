"""What hangs on the training loop without changing it: logs, progress, trackers, checkpoints."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.schemas import EvalLine, MixtureRecord, SearchStatus, TrainLine
from opmix_dist.terminal import Terminal

if TYPE_CHECKING:
    from opmix_dist.train.checkpoint import Checkpointer
    from opmix_dist.train.trainer import Trainer


class Callback:
    """Hooks of the training loop, all optional. Unless a hook says otherwise, only the leader may do work
    in it that takes time, and no hook communicates."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, after a checkpoint (if any) was loaded."""

    def on_step(self, trainer: Trainer, line: TrainLine) -> None:
        """After each optimiser step; every rank, with the same ``line``. May communicate."""

    def on_mixture(self, trainer: Trainer, record: MixtureRecord) -> None:
        """A policy has decided; the next batch follows ``record``."""

    def on_evaluation(self, trainer: Trainer, line: EvalLine) -> None:
        """After each evaluation."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step and the last evaluation; every rank. May communicate."""

    def on_stop(self, trainer: Trainer) -> None:
        """The run ends before its last step, as asked or for want of data; every rank. May communicate."""

    def close(self) -> None:
        """The loop was left, by its end or by an error."""


class JsonlLogger(Callback):
    """metrics/train.jsonl and metrics/eval.jsonl, on the leader. A full disk does not end training.

    To fsync every step's line would hold all ranks up by milliseconds: it is done before a checkpoint, behind
    which a resume drops what there is."""

    def on_start(self, trainer: Trainer) -> None:
        """Drop lines of steps that a resumed run is about to do again."""
        self.train = files.PatientLines(trainer.run.train_file)
        self.eval = files.PatientLines(trainer.run.eval_file)
        for path in (trainer.run.train_file, trainer.run.eval_file):
            if path.exists():
                kept = [row for row in files.read_jsonl(path) if row["step"] <= trainer.state.step]
                files.rewrite_jsonl(path, kept)

    def on_step(self, trainer: Trainer, line: TrainLine) -> None:
        if trainer.world.is_leader:
            self.train.append(line.model_dump(), sync=False)

    def on_evaluation(self, trainer: Trainer, line: EvalLine) -> None:
        self.eval.append(line.model_dump())


class ProgressReporter(Callback):
    """A bar on a terminal, a line every ``log_interval_steps`` elsewhere. On the leader only."""

    def __init__(self, interval_steps: int) -> None:
        self.interval_steps = interval_steps
        self.console = Terminal(width=None if sys.stdout.isatty() else 160)
        self.bar = Progress(
            TextColumn("train"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def on_start(self, trainer: Trainer) -> None:
        self.bar.start()
        self.task = self.bar.add_task("", total=trainer.config.train.steps, completed=trainer.state.step)
        self.console.print(
            f"{trainer.run.path}: {trainer.engine.num_parameters:,} parameters, "
            f"{trainer.world.size} trainer rank(s), {type(trainer.engine).__name__}, from step "
            f"{trainer.state.step} to {trainer.config.train.steps}"
        )

    def on_step(self, trainer: Trainer, line: TrainLine) -> None:
        text = f"loss {line.loss:.4f}  lr {line.lr:.2e}  {speed_text(line, trainer.world.size)}"
        if self.console.is_terminal:
            shown = f"{text}  {mixture_text(trainer.state.weights)}"
            self.bar.update(self.task, completed=line.step, description=shown)
        elif line.step % self.interval_steps == 0 or line.step == trainer.config.train.steps:
            self.console.print(f"step {line.step:>6}/{trainer.config.train.steps}  {text}")

    def on_search(self, search: str, status: SearchStatus | None) -> None:
        """A search's answer is awaited; its progress is the text of the bar; else the pool logs it."""
        if self.console.is_terminal:
            stage = f"{status.stage} {status.done}/{status.total}" if status else "requested"
            self.bar.update(self.task, description=f"search {search}: {stage}")

    def on_mixture(self, trainer: Trainer, record: MixtureRecord) -> None:
        self.console.print(f"step {record.step:>6}  mixture {mixture_text(record.weights)}  ({record.why})")

    def on_evaluation(self, trainer: Trainer, line: EvalLine) -> None:
        self.console.print(f"step {line.step:>6}  {heldout_text(line, trainer.catalogue.names)}")

    def close(self) -> None:
        self.bar.stop()


def heldout_text(line: EvalLine, trained: Sequence[str]) -> str:
    """``held-out mean 2.5000  code 3.000  web 2.000  (watched: old 4.000)``: the mean is over the domains
    that are trained on; others (``data.watch``) are told apart."""
    watched = [name for name in line.loss if name not in trained]
    mean = sum(line.loss[name] for name in trained) / len(trained)
    text = f"held-out mean {mean:.4f}  {_losses_text(line, trained)}"
    return f"{text}  (watched: {_losses_text(line, watched)})" if watched else text


def _losses_text(line: EvalLine, names: Sequence[str]) -> str:
    return "  ".join(f"{name} {line.loss[name]:.3f}" for name in names)


def mixture_text(weights: dict[str, float]) -> str:
    """``code 40% web 35% ...``: the largest six."""
    largest = sorted(weights.items(), key=lambda item: -item[1])[:6]
    return " ".join(f"{name} {weight:.0%}" for name, weight in largest)


def speed_text(line: TrainLine, ranks: int) -> str:
    """``12,345 tokens/s (6,172 each)  MFU 41.2%  data 12%  3.21 GiB``: what is known, and waiting for data
    where it is more than a twentieth of the step."""
    each = line.tokens_per_second_per_device
    parts = [f"{line.tokens_per_second:,.0f} tokens/s" + (f" ({each:,.0f} each)" if ranks > 1 else "")]
    if line.mfu is not None:
        parts.append(f"MFU {line.mfu:.1%}")
    if line.data_seconds and line.seconds and line.data_seconds > 0.05 * line.seconds:
        parts.append(f"data {line.data_seconds / line.seconds:.0%}")
    if line.memory is not None:
        parts.append(f"{line.memory.peak / 2**30:.2f} GiB")
    return "  ".join(parts)


_SPEED = ("tokens_per_second", "tokens_per_second_per_device", "seconds", "data_seconds", "mfu", "hfu")
_MEMORY = ("parameters", "gradients", "optimizer", "activations_and_others", "offloaded", "peak", "reserved")


def _scalars(line: TrainLine) -> dict[str, float]:
    scalars = {"train/loss": line.loss, "train/grad_norm": line.grad_norm, "train/lr": line.lr}
    known = {f"train/{name}": getattr(line, name) for name in _SPEED}
    known |= {f"memory/{name}": getattr(line.memory, name, None) for name in _MEMORY}
    scalars |= {name: value for name, value in known.items() if value is not None}
    return scalars | {f"train_domain/{name}": loss for name, loss in line.domain_loss.items()}


def require(package: str, setting: str) -> None:
    """UserError where a package that ``setting`` asks for is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{setting} needs the package {package}: install it or unset {setting}")


class TensorBoardLogger(Callback):
    """Losses, learning rate, speed, mixture and held-out losses as TensorBoard events, on the leader."""

    def __init__(self, folder: str) -> None:
        require("tensorboard", "logging.tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder)

    def on_step(self, trainer: Trainer, line: TrainLine) -> None:
        for name, value in _scalars(line).items():
            self.writer.add_scalar(name, value, line.step)

    def on_mixture(self, trainer: Trainer, record: MixtureRecord) -> None:
        for name, weight in record.weights.items():
            self.writer.add_scalar(f"mixture/{name}", weight, record.step)

    def on_evaluation(self, trainer: Trainer, line: EvalLine) -> None:
        for name, loss in line.loss.items():
            self.writer.add_scalar(f"eval/{name}", loss, line.step)

    def close(self) -> None:
        self.writer.close()


class WandbLogger(Callback):
    """The same in Weights & Biases, on the leader."""

    def __init__(self, project: str, name: str, config: dict[str, Any], folder: str) -> None:
        require("wandb", "logging.wandb_project")
        import wandb

        self.run = wandb.init(project=project, name=name, config=config, dir=folder, resume="allow")

    def on_step(self, trainer: Trainer, line: TrainLine) -> None:
        mixture = {f"mixture/{name}": weight for name, weight in trainer.state.weights.items()}
        self.run.log(_scalars(line) | mixture, step=line.step)

    def on_evaluation(self, trainer: Trainer, line: EvalLine) -> None:
        self.run.log({f"eval/{name}": loss for name, loss in line.loss.items()}, step=line.step)

    def close(self) -> None:
        self.run.finish()


class CheckpointCallback(Callback):
    """Saves every ``interval_steps``, at the end, and where data run out; every rank."""

    def __init__(self, checkpointer: Checkpointer, interval_steps: int) -> None:
        self.checkpointer, self.interval_steps = checkpointer, interval_steps
        self._saved: int | None = None

    def on_step(self, trainer: Trainer, line: TrainLine) -> None:
        last = line.step == trainer.config.train.steps
        if last or (self.interval_steps and line.step % self.interval_steps == 0):
            self._save(trainer)

    def on_stop(self, trainer: Trainer) -> None:
        if trainer.state.step not in (self._saved, trainer.first_step):  # else it is there
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.checkpointer)
        self._saved = trainer.state.step

    def close(self) -> None:
        """Also after an error: a save under way is whole, and the resumed run may want it."""
        self.checkpointer.wait()
