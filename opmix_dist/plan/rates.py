"""FLOP/s that the ranks of a plan compute at: what their GPUs can do, times the MFU that is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from opmix_dist.config import EngineConfig
from opmix_dist.errors import UserError
from opmix_dist.models.devices import peak_flops, product_precision
from opmix_dist.plan.gpus import Gpu
from opmix_dist.plan.question import Question


@dataclass(frozen=True)
class Rates:
    """FLOP/s of one rank.

    peak, inline_peak, pool_peak: of its GPU at most: in training, in a search on the trainers' ranks, and on
    the pool's. training, inline, pool: of these, what is used.
    """

    peak: float
    inline_peak: float
    pool_peak: float
    training: float
    inline: float
    pool: float


def rates(question: Question) -> Rates:
    """
    Raises:
        UserError: a GPU has no products in the precision that is configured.
    """
    engine = question.config.engine
    # probes and candidates are computed in engine.param_dtype at least
    searching = engine.model_copy(update={"float8": False})
    given = None if engine.peak_tflops is None else engine.peak_tflops * 1e12
    peak = given or _peak(question.gpu, engine, "--gpu")
    inline = given if given and not engine.float8 else _peak(question.gpu, searching, "--gpu")
    same = question.pool_gpu == question.gpu
    pool = inline if same else _peak(question.pool_gpu, searching, "--pool-gpu")
    return Rates(
        peak=peak,
        inline_peak=inline,
        pool_peak=pool,
        training=peak * question.mfu,
        inline=inline * question.search_mfu,
        pool=pool * question.search_mfu,
    )


def _peak(gpu: Gpu, engine: EngineConfig, option: str) -> float:
    precision = product_precision(engine)
    found = peak_flops(gpu.device, precision)
    if found is None:
        raise UserError(f"{option} {gpu.name} has no {precision} products: set engine.peak_tflops")
    return found
