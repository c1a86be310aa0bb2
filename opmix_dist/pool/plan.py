"""How candidates are evaluated: method, micro-batches, arithmetic.

All of it changes the last digits of losses, so that one rank decides it once per search, and what it decided
is kept beside the evaluations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from opmix_dist.config import SharedConfig
from opmix_dist.errors import UserError
from opmix_dist.exchange.rundir import read_record, write_record
from opmix_dist.exchange.schemas import EvaluationPlan
from opmix_dist.models.compute import Compute, kernels_fault
from opmix_dist.models.flops import FlopCounts, num_parameters
from opmix_dist.models.loss import uses_flash_attention
from opmix_dist.models.sharding import plain_class
from opmix_dist.pool.candidates import Method, cheaper_method
from opmix_dist.pool.method_times import cache_folder, method_times
from opmix_dist.pool.trials import MARGIN, Trials, largest_fit
from opmix_dist.search_config import CandidateConfig

log = logging.getLogger(__name__)

CPU_BYTES = 4 << 30
"""Memory that the logits and activations of a pass may take on a CPU."""
CPU_BATCH, JOINT = 16, 4
GROUPS = 4
"""That the first candidates make at least: a pool of so many ranks is not to wait for one of them, and on any
number of ranks there are to be the same groups."""
TOKENS_AT_ONCE = 1 << 16
"""Tokens in a pass from which a GPU gains nothing by more."""
WHOLE_WEIGHTS = "they read whole weights, and pool.ranks_per_model shards them"


def require_kernels(setting: str, device: torch.device) -> None:
    """UserError where ``search.kernels`` asks for what cannot run; to be asked before a run begins."""
    fault = kernels_fault(device) if setting == "triton" else None
    if fault is not None:
        raise UserError(f"search.kernels is triton, but {fault}: set it to auto or torch")


def chosen_kernels(setting: str, device: torch.device, ranks_per_model: int = 1) -> bool:
    """Whether Triton kernels compute, by ``search.kernels``; the log says so where that is not as written.

    Raises:
        UserError: they are asked for where they cannot run.
    """
    if setting == "triton":
        require_kernels(setting, device)
        return True
    if setting == "torch" or device.type != "cuda":
        return False
    fault = kernels_fault(device) if ranks_per_model == 1 else WHOLE_WEIGHTS
    log.info("search.kernels: %s", "triton" if fault is None else f"torch, since {fault}")
    return fault is None


def chosen_dtype(config: SharedConfig, device: torch.device, model: torch.nn.Module) -> str:
    """Name of the dtype of the products of simulated models."""
    wanted, engine = config.search.candidates.dtype, config.engine.param_dtype
    flash = uses_flash_attention(model)
    if wanted != "auto":
        return wanted
    return engine if flash or device.type == "cuda" else "float32"


def compute_of(plan: EvaluationPlan) -> Compute:
    return Compute(getattr(torch, plan.dtype), plan.kernels)


class Planner:
    """Decides, for one rank; :meth:`decide` runs where ``dtype`` and ``kernels`` are in force.

    Args:
        file: of the plan.
        trials: of the model with its adapters.
        folder: of measured times.
    """

    def __init__(
        self,
        file: Path,
        trials: Trials,
        flops: FlopCounts,
        settings: CandidateConfig,
        *,
        dtype: str,
        kernels: bool,
        sharded: bool = False,
        folder: Path | None = None,
    ) -> None:
        """``sharded``: nothing is tried, since a pass needs other ranks: sizes decide."""
        self.file, self.trials, self.flops, self.settings = file, trials, flops, settings
        self.dtype, self.kernels = dtype, kernels
        self._folder = folder
        self.wanted = settings.method
        self.samples, self.on_gpu = len(trials.heldout.batch), trials.device.type == "cuda"
        self.tries = self.on_gpu and not sharded

    def decide(self, *, gradients: bool) -> EvaluationPlan:
        """The plan that is there, if it was decided for these settings, sizes and device, or a new one."""
        # gradients always go by low-rank terms; in 16 bits merged losses differ from those in the last digits
        self.wanted = "lowrank" if gradients and self.settings.method == "auto" else self.settings.method
        plan = self._kept() or self._decided()
        if gradients and plan.gradient_batch_size is None:
            plan = plan.model_copy(update={"gradient_batch_size": self._gradient_batch()})
        write_record(self.file, plan)
        log.info(
            "candidates: %s in %s (%s), %d together, %d samples each in a pass",
            "low-rank terms" if plan.method == "lowrank" else "merged deltas",
            plan.dtype,
            "Triton kernels" if plan.kernels else "plain torch",
            plan.joint,
            plan.batch_size,
        )
        return plan

    def _kept(self) -> EvaluationPlan | None:
        if not self.file.exists():
            return None
        try:
            plan = read_record(self.file, EvaluationPlan)
        except UserError as error:
            log.warning("%s: decided anew", error)
            return None
        return plan if plan.decided_for == self._circumstances() else None

    def _circumstances(self) -> dict[str, str | int]:
        settings = self.settings
        return {
            "batch_size": settings.batch_size,
            "joint": settings.joint,
            "method": self.wanted,
            "dtype": self.dtype,
            "kernels": "triton" if self.kernels else "torch",
            "samples": self.samples,
            **self._shape(),
        }

    def _shape(self) -> dict[str, str | int]:
        adapters = self.trials.adapters
        return {
            "device": self._device_name(),
            "architecture": plain_class(adapters.model).__name__,
            "parameters": num_parameters(adapters.model),
            "components": len(adapters.names),
            "rank": adapters.rank,
            "sequence_length": self.trials.heldout.batch.sequence_length,
        }

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.trials.device) if self.on_gpu else self.trials.device.type

    def _decided(self) -> EvaluationPlan:
        passes: dict[Method, tuple[int, int]] = {}
        wanted = self.wanted
        if wanted == "auto" and not self.tries:
            tokens = self.trials.heldout.batch.tokens.numel()
            wanted = cheaper_method(self.flops, self.trials.num_adapters, tokens)
        methods: tuple[Method, ...] = ("lowrank", "merge") if wanted == "auto" else (wanted,)
        for method in methods:
            passes[method] = self._pass(method)
        method = self.measured_method(passes) if wanted == "auto" else wanted
        joint, batch_size = passes[method]
        return EvaluationPlan(
            method=method,
            joint=joint,
            batch_size=batch_size,
            dtype=self.dtype,
            kernels=self.kernels,
            decided_for=self._circumstances(),
        )

    def measured_method(self, passes: dict[Method, tuple[int, int]]) -> Method:
        """The faster one, of passes of these numbers of candidates and samples each."""
        shape = {
            **self._shape(),
            "dtype": self.dtype,
            "kernels": "triton" if self.kernels else "torch",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        times = method_times(
            self.trials,
            shape,
            lowrank=passes["lowrank"],
            merged=passes["merge"][1],
            folder=self._folder or cache_folder(),
        )
        log.info(
            "a candidate takes %.3g s by low-rank terms, %.3g s merged",
            self.samples * times.lowrank_per_sample,
            times.merge + self.samples * times.merged_per_sample,
        )
        return times.faster(self.samples)

    def _pass(self, method: Method) -> tuple[int, int]:
        """Candidates in a pass, and samples of each."""
        joint = 1 if method == "merge" else self.settings.joint
        batch = self.settings.batch_size
        if isinstance(joint, int) and isinstance(batch, int):
            return joint, batch
        rows = self._rows(lambda rows: self._try(method, rows))
        if isinstance(batch, int):
            return max(1, min(self._joint(), rows // batch)), batch
        together = joint if isinstance(joint, int) else min(rows, self._joint())
        return together, self._batch(rows // together)

    def _joint(self) -> int:
        """On a GPU that the samples do not fill, more candidates do; but all make some groups."""
        most = JOINT if not self.on_gpu else max(JOINT, self._most() // self.samples)
        return min(most, -(-self.settings.count // GROUPS))

    def _try(self, method: Method, rows: int) -> None:
        """A pass of so many samples, as low-rank terms of several candidates where they are more than there
        are."""
        batch = min(rows, self.samples)
        self.trials.run(method, -(-rows // batch) if method == "lowrank" else 1, batch)

    def _gradient_batch(self) -> int:
        batch = self.settings.batch_size
        if isinstance(batch, int):
            return batch
        return self._batch(self._rows(self._try_gradients, gradients=True))

    def _try_gradients(self, rows: int) -> None:
        self.trials.run_with_gradients(min(rows, self.samples))

    def _batch(self, rows: int) -> int:
        most = self.samples if self.on_gpu else CPU_BATCH
        return max(1, min(rows, most))

    def _most(self) -> int:
        """Samples in a pass that are enough."""
        if not self.on_gpu:
            return JOINT * CPU_BATCH
        return max(1, TOKENS_AT_ONCE // self.trials.heldout.batch.sequence_length)

    def _rows(self, work: Callable[[int], None], *, gradients: bool = False) -> int:
        """Samples in a pass that fit."""
        if not self.tries:
            # of a GPU, half is left to the blocks that are gathered and to what the formula does not know
            memory = int(MARGIN * self.trials.memory()) // 2 if self.on_gpu else CPU_BYTES
            return max(1, min(self._most(), memory // self._formula_bytes(gradients)))

        def peak(rows: int) -> int:
            return self.trials.peak(lambda: work(rows))

        return largest_fit(peak, self.trials.memory(), self._most())

    def _formula_bytes(self, gradients: bool) -> int:
        """Of one sample in a pass, float32: logits three times, for the softmax; some ten activations of a
        block's width and four of its MLP's, of every block where gradients need them."""
        config = self.trials.adapters.model.config.get_text_config()
        mlp = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        block = 10 * config.hidden_size + 4 * mlp
        kept = block * (config.num_hidden_layers if gradients else 1)
        return 4 * self.trials.heldout.batch.sequence_length * (3 * config.vocab_size + kept)


def halved(plan: EvaluationPlan) -> EvaluationPlan | None:
    """The plan with half of the samples in a pass, with gradients and without; None where each is one
    already."""
    gradient = plan.gradient_batch_size
    smaller = {
        "joint": max(1, plan.joint // 2) if plan.batch_size == 1 else plan.joint,
        "batch_size": max(1, plan.batch_size // 2),
        "gradient_batch_size": None if gradient is None else max(1, gradient // 2),
    }
    found = plan.model_copy(update=smaller)
    return None if found == plan else found
