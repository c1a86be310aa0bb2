"""Logging to standard error: one line each, with the role and rank that speaks."""

from __future__ import annotations

import logging

from opmix_dist.telling import PrintableFormatter


def set_up_logging(who: str, level: int = logging.INFO) -> None:
    """Other libraries stay at warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter(f"%(asctime)s [{who}] %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("opmix_dist").setLevel(level)
