"""Replies by vLLM to prompts of training, in each trainer's own process and on its device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from opmix_dist.engines.single import DTYPES
from opmix_dist.errors import UserError
from opmix_dist.method_config import OnPolicyConfig
from opmix_dist.methods.base import MethodAround
from opmix_dist.methods.generation import Policy
from opmix_dist.tasks.generation import Generated, Sampling, most_positions
from opmix_dist.tasks.vllm import VLLM, EngineOptions, require_vllm


class VLLMPolicy(Policy):
    """Each rank replies to its own prompts with the whole model; no rank waits for another's replies."""

    def __init__(self, around: MethodAround, config: OnPolicyConfig, end_ids: Sequence[int]) -> None:
        """Collective over the trainer ranks.

        Raises:
            UserError: vLLM is missing, made for other devices, or cannot run the model.
        """
        setting = f"method.{around.config.method.name}.generation"
        require_vllm(setting)
        source = around.source
        if source.trust_remote_code:
            raise UserError(f"{setting} vllm does not run code of a checkpoint: take transformers")
        self.config, self.end_ids = config, end_ids
        self._dtype = DTYPES[around.config.engine.param_dtype]
        self._shapes = source.shapes
        self._kept: dict[str, Tensor] | None = None
        longest = around.catalogue.sequence_length + config.max_new_tokens
        most = most_positions(source.hf_config)
        options = EngineOptions(
            setting,
            around.world.device,
            self._dtype,
            max_tokens=longest if most is None else min(longest, most),
            memory=config.vllm_memory,
            sequences=config.generation_batch_size,
        )
        with TemporaryDirectory(prefix="opmix-vllm-") as folder:
            source.save_config(Path(folder), self._dtype)
            self._llm = VLLM(folder, options, weights=False)

    def refresh(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        passing = iter(parameters) if self._kept is None else _keeping(parameters, self._kept)
        self._llm.load(passing)
        for _ in passing:  # what vLLM has no use for: other ranks wait for each of them
            pass

    def sample(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], seed: int) -> Generated:
        return self._llm.generate(
            prompts,
            limits,
            end_ids=self.end_ids,
            sampling=Sampling(self.config.temperature, self.config.top_p, seed),
        )

    def kept(self) -> dict[str, Tensor]:
        """A second copy, in the host's memory: vLLM's own has another form."""
        self._kept = {name: torch.zeros(shape, dtype=self._dtype) for name, shape in self._shapes.items()}
        return {f"policy.{name}": tensor for name, tensor in self._kept.items()}

    def restore(self) -> None:
        if self._kept is not None:
            self._llm.load(iter(self._kept.items()))

    def close(self) -> None:
        self._llm.close()


def _keeping(
    parameters: Iterable[tuple[str, Tensor]], kept: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in parameters:
        kept[name].copy_(tensor)
        yield name, tensor
