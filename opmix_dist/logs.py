"""Logging to standard error: one line each, with the role and rank that speaks."""

from __future__ import annotations

import logging


def set_up_logging(who: str, level: int = logging.INFO) -> None:
    """Other libraries stay at warnings."""
    logging.basicConfig(
        level=logging.WARNING, format=f"%(asctime)s [{who}] %(message)s", datefmt="%H:%M:%S", force=True
    )
    logging.getLogger("opmix_dist").setLevel(level)
