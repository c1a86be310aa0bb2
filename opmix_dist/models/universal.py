"""DeepSpeed's universal checkpoints as Hugging Face folders: the way in from a run that DeepSpeed began.

A universal checkpoint has a folder for each parameter with its float32 values, whole whatever ZeRO stage and
number of ranks wrote it. AdamW's moments, which lie beside them, stay where they are: what is written here
begins a run, and does not resume one.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from opmix_dist.errors import UserError
from opmix_dist.models.source import ModelSource

_FILE_BYTES = 2 << 30


def convert_universal(universal: Path, config: str, out: Path, *, dtype: torch.dtype) -> int:
    """Write ``out``, a folder for ``model.checkpoint``; no more than a file of it is in memory at a time.

    Args:
        universal: what ``deepspeed.checkpoint.ds_to_universal`` wrote: its folder ``zero`` is read.
        config: folder or hub id with the model's config.json.
        out: must not exist.

    Returns:
        The number of parameters that were written.

    Raises:
        UserError: a parameter of the model is missing or of another shape there, a file holds more than
            tensors and plain data, or ``out`` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already: name a new folder")
    source = _model(config)
    places = {name: _place(universal, name) for name in source.shapes}
    out.mkdir(parents=True)
    files = _write_all(source, places, out, dtype)
    total = sum(shape.numel() for shape in source.shapes.values())
    index = {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": files}
    source.save_config(out, dtype)
    (out / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1))
    return total


def _model(config: str) -> ModelSource:
    try:
        return ModelSource(AutoConfig.from_pretrained(config))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model's configuration {config}: {_one_line(error)}") from None


def _place(universal: Path, name: str) -> Path:
    path = universal / "zero" / name / "fp32.pt"
    if not path.is_file():
        raise UserError(
            f"{universal} has no zero/{name}/fp32.pt, which the model needs: it is of another model, or no "
            "universal checkpoint (python -m deepspeed.checkpoint.ds_to_universal makes one)"
        )
    return path


def _write_all(source: ModelSource, places: dict[str, Path], out: Path, dtype: torch.dtype) -> dict[str, str]:
    """File of each tensor."""
    files: dict[str, str] = {}
    for number, names in enumerate(_parts(source.shapes, dtype), 1):
        file = f"model-{number:05d}.safetensors"
        tensors = {name: _read(places[name], source.shapes[name]).to(dtype) for name in names}
        save_file(tensors, out / file, {"format": "pt"})
        files |= dict.fromkeys(names, file)
    buffers = source.persistent_buffers()
    if buffers:
        save_file(buffers, out / "buffers.safetensors", {"format": "pt"})
    return files | dict.fromkeys(buffers, "buffers.safetensors")


def _parts(shapes: dict[str, torch.Size], dtype: torch.dtype) -> Iterator[list[str]]:
    """Names whose tensors make a file."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        added = shape.numel() * dtype.itemsize
        if names and size + added > _FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += added
    yield names


def _read(path: Path, shape: torch.Size) -> Tensor:
    """DeepSpeed keeps some parameters flat."""
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise UserError(f"{path} is not read: {_one_line(error)}") from None
    tensor = found.get("param") if isinstance(found, dict) else None
    if not isinstance(tensor, Tensor) or tensor.numel() != shape.numel():
        size = tuple(tensor.shape) if isinstance(tensor, Tensor) else "no tensor"
        raise UserError(f"{path} holds {size}, but the model's parameter is {tuple(shape)}")
    return tensor.float().reshape(shape).contiguous()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
