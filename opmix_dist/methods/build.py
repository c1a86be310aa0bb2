"""Choosing a training method by its name in the configuration."""

from __future__ import annotations

import importlib
from typing import cast

from opmix_dist.methods.base import Method, MethodAround

# imported when it is chosen: some need packages that take long to import
METHODS = {
    "plain": ("opmix_dist.methods.base", "Method"),
    "ewc": ("opmix_dist.methods.ewc", "EWC"),
    "mas": ("opmix_dist.methods.mas", "MAS"),
    "gem": ("opmix_dist.methods.gem", "GEM"),
    "o_lora": ("opmix_dist.methods.o_lora", "OLoRA"),
    "sdft": ("opmix_dist.methods.sdft", "SDFT"),
    "distill": ("opmix_dist.methods.distill", "Distill"),
}


def build_method(around: MethodAround) -> Method:
    """Collective over the trainer ranks.

    Raises:
        UserError: what the chosen method's constructor refuses.
    """
    module, attribute = METHODS[around.config.method.name]
    return cast(type[Method], getattr(importlib.import_module(module), attribute))(around)
