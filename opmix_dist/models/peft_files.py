"""One adapter as a folder in PEFT's format, which ``PeftModel.from_pretrained`` loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opmix_dist.bounded import require_ordinary
from opmix_dist.errors import UserError

ADAPTER_FILE = "adapter_model.safetensors"
Shapes = tuple[torch.Size, torch.Size]
"""Of A [r, d_in] and B [d_out, r]."""


def write_peft(
    folder: Path,
    layers: Mapping[str, tuple[Tensor, Tensor]],
    *,
    rank: int,
    alpha: int,
    dropout: float,
    base_model: str,
) -> None:
    """
    Args:
        layers: A [r, d_in] and B [d_out, r] by the adapted layer's name.
        base_model: folder or hub id of the model that the adapter belongs to, for who reads the folder.
    """
    from peft import LoraConfig  # a second, for who writes an adapter only

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (A, B) in layers.items():
        for half, tensor in (("A", A), ("B", B)):
            tensors[_key(name, half)] = tensor.detach().cpu().contiguous()
    LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(layers),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    ).save_pretrained(str(folder))
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})


def read_peft(folder: Path, shapes: Mapping[str, Shapes]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer of ``shapes``.

    Raises:
        UserError: the folder is damaged, or does not fit ``shapes``.
    """
    file = folder / ADAPTER_FILE
    try:
        require_ordinary(file)
        tensors = load_file(file)
    except (SafetensorError, OSError, MemoryError) as error:  # the last as of mapping a file
        raise UserError(f"{file} cannot be read: {error}") from None
    found = {}
    for name, of_layer in shapes.items():
        keys = _key(name, "A"), _key(name, "B")
        for key, shape in zip(keys, of_layer, strict=True):
            if key not in tensors or tensors[key].shape != shape:
                raise UserError(f"{file} does not fit this model at {key}")
        found[name] = (tensors[keys[0]], tensors[keys[1]])
    return found


def _key(layer: str, half: str) -> str:
    return f"base_model.model.{layer}.lora_{half}.weight"
