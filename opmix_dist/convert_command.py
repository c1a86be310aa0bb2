"""``opmix convert``: a checkpoint of another trainer as one that ``model.checkpoint`` takes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from opmix_dist.terminal import open_console, say


def add_convert_command(commands: Any) -> None:
    """Add ``convert`` to the subcommands of ``opmix``."""
    convert = commands.add_parser(
        "convert",
        help="make a Hugging Face folder for model.checkpoint of a DeepSpeed universal checkpoint",
        description="Reads the parameters, not AdamW's state: a run begins from them. Files that hold more "
        "than tensors and plain data are refused.",
    )
    convert.add_argument("universal", type=Path, help="what deepspeed.checkpoint.ds_to_universal wrote")
    convert.add_argument("--config", required=True, help="folder or hub id with the model's config.json")
    convert.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    convert.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    convert.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace, rest: list[str]) -> None:
    import torch

    from opmix_dist.models.universal import convert_universal

    number = convert_universal(
        arguments.universal, arguments.config, arguments.out, dtype=getattr(torch, arguments.dtype)
    )
    say(open_console(), f"{arguments.out}: {number:,} parameters, without AdamW's state")
