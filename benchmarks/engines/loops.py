"""Ways to train one model on the same batches: this project's engines, a loop by hand, HF's Trainer."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import PretrainedConfig, PreTrainedModel

from benchmarks.engines.cases import EngineCase
from benchmarks.kernels.models import Llama
from opmix_dist.config import EngineConfig, OptimizerConfig
from opmix_dist.data.batch import TokenBatch
from opmix_dist.distributed import Placement, Role, World
from opmix_dist.engines.fsdp import FSDPEngine
from opmix_dist.engines.optimizer import adamw
from opmix_dist.engines.single import SingleEngine, materialise
from opmix_dist.models.attention import WITHOUT_MASK
from opmix_dist.models.source import ModelSource
from opmix_dist.seeds import derive_seed

BATCHES = 4
"""Different ones; each loop sees them in turn."""
NO_TARGET = -100

Mark = Callable[[], bool]
"""Called before a loop's first step and after every so many steps; false: it is to stop."""


class DrawnSource(ModelSource):
    """Normal weights that are drawn on the device: transformers' own take a minute for a billion."""

    def __init__(self, hf_config: PretrainedConfig, device: torch.device, *, attention: str = "sdpa") -> None:
        self.device = device
        super().__init__(hf_config, attention=attention)

    def _fresh(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self.device)
        generator = torch.Generator(self.device).manual_seed(derive_seed(0, name))
        return torch.randn(shape, generator=generator, device=self.device) * 0.02


def llama_config(sizes: Llama, length: int) -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocab,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )


@dataclass(frozen=True)
class Task:
    """What every loop of a row is given."""

    case: EngineCase
    micro: int
    device: torch.device

    def source(self, attention: str = "sdpa") -> ModelSource:
        config = llama_config(self.case.model, self.case.length)
        return DrawnSource(config, self.device, attention=attention)

    @cached_property
    def batches(self) -> list[Tensor]:
        """Random tokens, [samples, T] each, where a loader would leave them: in the host's memory."""
        generator = torch.Generator().manual_seed(5)
        shape = (self.case.batch, self.case.length)
        drawn = [torch.randint(self.case.model.vocab, shape, generator=generator) for _ in range(BATCHES)]
        return [tokens.pin_memory() if self.device.type == "cuda" else tokens for tokens in drawn]

    @property
    def backend(self) -> str:
        """Of torch.compile. On a CPU, where nothing is measured: traced, and run as traced."""
        return "inductor" if self.device.type == "cuda" else "eager"

    @property
    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(lr=self.case.lr)

    def autocast(self) -> AbstractContextManager[None]:
        return cast(AbstractContextManager[None], torch.autocast(self.device.type, torch.bfloat16))


class TrainingLoop(ABC):
    """One model in training."""

    @abstractmethod
    def drive(self, steps: int, mark: Mark) -> None:
        """Train, with ``mark`` before the first step and after every ``steps``, until it says no."""

    @abstractmethod
    def loss(self) -> float:
        """Mean loss per target on the first batch's first samples."""

    def close(self) -> None:  # noqa: B027  (most hold tensors only)
        """Give back what is held besides tensors."""


class Stepped(TrainingLoop):
    """One whose steps can be called one by one."""

    def drive(self, steps: int, mark: Mark) -> None:
        while mark():
            self.run(steps)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    @abstractmethod
    def step(self) -> None: ...


class Ours(Stepped):
    """An engine of this project, asked as its trainer asks it."""

    def __init__(self, task: Task) -> None:
        case = task.case
        kind = SingleEngine if case.loop == "single" else FSDPEngine
        placement = Placement(Role.TRAINER, 0, 1)
        self.joined = None if case.loop == "single" else World.join(placement, device=task.device.type)
        world = self.joined or World(placement, task.device)
        config = EngineConfig(
            name=case.loop, param_dtype="bfloat16", compile=case.compiled, **case.settings
        )  # fmt: skip
        self.micro, self.lr = task.micro, task.case.lr
        self.engine = kind(
            task.source(), world, config=config, optimizer=task.optimizer, sequence_length=case.length
        )
        self.samples = TokenBatch.of_tokens(task.batches[0][: task.micro])
        self.batches = cycle([TokenBatch.of_tokens(tokens) for tokens in task.batches])

    def step(self) -> None:
        self.engine.train_step(next(self.batches).split(self.micro), lr=self.lr)

    def loss(self) -> float:
        sums = self.engine.evaluate(self.samples, self.micro)
        return float(sums.sum() / self.samples.targets.sum())

    def close(self) -> None:
        if self.joined is not None:
            self.joined.leave()


class ByHand(Stepped):
    """The upper bound: the same model and arithmetic in as few lines as it takes, compiled as a whole, with
    no word between host and GPU that is not needed: it neither reads losses nor looks for a NaN."""

    def __init__(self, task: Task) -> None:
        self.task, self.device = task, task.device
        self.model = drawn_model(task.source(WITHOUT_MASK), task.device)
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        self.optimizer = adamw(self.model, shapes, task.optimizer, fused=True)
        self.compute = torch.compile(self._sum) if task.case.compiled else self._sum
        self.total = task.case.batch * (task.case.length - 1)
        self.batches = cycle(task.batches)

    def _sum(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Of the losses of [B, T] tokens."""
        with self.task.autocast():
            logits = self.model(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NO_TARGET, reduction="sum"
        )

    def step(self) -> None:
        tokens = next(self.batches).to(self.device, non_blocking=True)
        targets = next_tokens(tokens)
        parts = zip(tokens.split(self.task.micro), targets.split(self.task.micro), strict=True)
        for part in parts:
            (self.compute(*part) / self.total).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.task.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def loss(self) -> float:
        tokens = self.task.batches[0][: self.task.micro].to(self.device)
        return float(self._sum(tokens, next_tokens(tokens))) / (len(tokens) * (tokens.shape[1] - 1))


class HFTrainer(TrainingLoop):
    """Transformers' Trainer, which is accelerate's loop, as its documentation would have one set it up for
    speed: bfloat16, fused AdamW, torch.compile, pinned memory, no logs."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model = drawn_model(task.source(), task.device)

    def drive(self, steps: int, mark: Mark) -> None:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        task, case, optimizer = self.task, self.task.case, self.task.optimizer

        class Marks(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                mark()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step % steps == 0 and not mark():
                    control.should_training_stop = True

        class InOrder(Trainer):
            def get_train_dataloader(self) -> Any:
                pinned = task.device.type == "cuda"
                rows = DataLoader(_Rows(task.batches), task.micro, pin_memory=pinned, collate_fn=_labelled)
                return self.accelerator.prepare(rows)

        with tempfile.TemporaryDirectory(prefix="hf-trainer-") as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=task.micro,
                gradient_accumulation_steps=case.batch // task.micro,
                max_steps=1_000_000,  # the marks end it before
                bf16=True,
                use_cpu=task.device.type == "cpu",
                optim="adamw_torch_fused",
                learning_rate=optimizer.lr,
                lr_scheduler_type="constant",
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.betas[0],
                adam_beta2=optimizer.betas[1],
                adam_epsilon=optimizer.eps,
                max_grad_norm=optimizer.max_grad_norm,
                torch_compile=case.compiled,
                torch_compile_backend=task.backend if case.compiled else None,
                logging_strategy="no",
                logging_nan_inf_filter=False,  # it would ask for every loss
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
            )
            InOrder(model=self.model, args=arguments, callbacks=[Marks()]).train()

    @torch.no_grad()
    def loss(self) -> float:
        tokens = self.task.batches[0][: self.task.micro].to(self.task.device)
        with self.task.autocast():
            logits = self.model(input_ids=tokens, use_cache=False).logits
        return float(
            F.cross_entropy(
                logits.flatten(0, 1).float(), next_tokens(tokens).flatten(), ignore_index=NO_TARGET
            )
        )


class _Rows(Dataset[Tensor]):
    """The samples of all batches, over and over."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.rows = torch.cat(batches)

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index % len(self.rows)]


def _labelled(rows: list[Tensor]) -> dict[str, Tensor]:
    tokens = torch.stack(rows)
    return {"input_ids": tokens, "labels": tokens}


def next_tokens(tokens: Tensor) -> Tensor:
    """What each position predicts, [B, T]; the last one nothing."""
    return F.pad(tokens[:, 1:], (0, 1), value=NO_TARGET)


def drawn_model(source: ModelSource, device: torch.device) -> PreTrainedModel:
    """In float32 on the device, with the same weights as the engines' own."""
    model = source.build()
    materialise(model, device)
    with torch.no_grad():
        for name in source.shapes:
            model.get_parameter(name).copy_(source.tensor(name))
    return cast(PreTrainedModel, cast(nn.Module, model).train())


def built(task: Task) -> TrainingLoop:
    """The loop of the task's case."""
    return {"single": Ours, "fsdp": Ours, "hand": ByHand, "hf": HFTrainer}[task.case.loop](task)
