"""``deterministic: true``: the same run twice gives the same bits, or an error says which setting forbids it.

What each library needs to be told, and what it cannot promise, is in docs/engines.md with its sources.
"""

from __future__ import annotations

import os

import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal

from opmix_dist.config import RunConfig, SharedConfig
from opmix_dist.errors import UserError

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # else cuBLAS chooses among streams' workspaces
    "FLASH_ATTENTION_DETERMINISTIC": "1",  # transformers hands it to the backward pass, which adds by atomics
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine's attention
    "NCCL_NVLS_ENABLE": "0",  # sums in the switch come in any order (NVIDIA/nccl issue 1497)
}
"""Variables, and their values where they are not set."""
_OTHER_VALUES = {"CUBLAS_WORKSPACE_CONFIG": (":16:8",)}
_FLASH_ATTENTION = "2.4.1"
"""The first with a deterministic backward pass; transformers says nothing where an older one lacks it."""


def use_deterministic_kernels() -> None:
    """Before any GPU work and before a process group is made; both roles, so that the search repeats as
    exactly as the training.

    Raises:
        UserError: the environment asks for the opposite.
    """
    for name, value in ENVIRONMENT.items():
        found = os.environ.setdefault(name, value)
        if found != value and found not in _OTHER_VALUES.get(name, ()):
            raise UserError(f"deterministic needs {name}={value} in the environment, not {found}: unset it")
    torch.use_deterministic_algorithms(True)  # torch.compile's choice of kernels, too
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def require_repeatable_run(config: RunConfig) -> None:
    """What in the configuration of a training run makes two runs differ, whatever the kernels do.

    Raises:
        UserError: naming the key.
    """
    if not config.deterministic:
        return
    _require_flash_attention(config)
    if config.mixture.policy == "opmix" and config.search.mode == "async":
        raise UserError(
            "deterministic: search.mode async changes the mixture whenever the search is done, at another "
            "step in each run: set it to sync"
        )


def require_repeatable_search(config: SharedConfig, device: torch.device) -> None:
    """What makes two searches on ``device`` differ: on a GPU, ``auto`` goes by measured times and free
    memory, and each way to compute has last digits of its own.

    Raises:
        UserError: naming the key.
    """
    if not config.deterministic:
        return
    _require_flash_attention(config)
    if device.type != "cuda":
        return
    for name in ("method", "joint", "batch_size"):
        if getattr(config.search.candidates, name) == "auto":
            raise UserError(
                f"deterministic: search.candidates.{name} auto is measured anew on a GPU: set it to a value"
            )


def _require_flash_attention(config: SharedConfig) -> None:
    old = is_flash_attn_2_available() and not is_flash_attn_greater_or_equal(_FLASH_ATTENTION)
    if config.model.attention == "flash_attention_2" and old:
        raise UserError(
            f"deterministic: model.attention flash_attention_2 needs the package flash_attn "
            f"{_FLASH_ATTENTION} or newer: update it, or set model.attention to sdpa"
        )
