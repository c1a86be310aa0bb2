"""What ``opmix fit`` leaves in its folder: JSON, CSV, and the mixture in other trainers' forms."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv

from opmix_dist.atomic import write_bytes, write_json
from opmix_dist.fit.analysis import Analysis, Outcome
from opmix_dist.fit.config import FitConfig, SwarmConfig
from opmix_dist.fit.plots import fit_page
from opmix_dist.mixture_files import FORMATS, MixtureSource, write_mixture_files
from opmix_dist.search.laws import LawFit, LogLinearLaw
from opmix_dist.settings import to_yaml

PROPOSAL = "proposal.json"
LAWS = "laws.json"
PREDICTIONS = "predictions.csv"
PAGE = "fit.html"
SETTINGS = "fit.yaml"
MIXTURE = "mixture"


def write_outputs(analysis: Analysis, folder: Path, sources: Mapping[str, MixtureSource]) -> list[Path]:
    """Write the laws, and where there is one the proposal, below ``folder``; returns the files.

    Other trainers get what was decided: the proposal, or the current mixture where it is better to stay. What
    an earlier call left there of a proposal goes, when this one proposes nothing.

    Raises:
        UserError: a source of a domain that the mixture does not have.
    """
    mixtures = _write_mixtures(analysis, folder / MIXTURE, sources)
    files = [folder / name for name in (LAWS, PREDICTIONS, SETTINGS, PAGE)]
    write_json(files[0], laws_record(analysis))
    write_bytes(files[1], _csv(analysis))
    write_bytes(files[2], to_yaml(_from_anywhere(analysis.config)).encode())
    write_bytes(files[3], fit_page(analysis))
    if analysis.outcome is None:
        (folder / PROPOSAL).unlink(missing_ok=True)
        return files
    write_json(folder / PROPOSAL, proposal_record(analysis, analysis.outcome))
    return [folder / PROPOSAL, *files, *mixtures]


def _write_mixtures(analysis: Analysis, folder: Path, sources: Mapping[str, MixtureSource]) -> list[Path]:
    outcome, domains = analysis.outcome, analysis.inputs.domains
    if outcome is None:
        for name, _ in FORMATS.values():
            (folder / name).unlink(missing_ok=True)
        return []
    stays = outcome.decision is not None and not outcome.decision.move
    chosen = analysis.inputs.current if stays else _exactly_one(outcome.proposal.mixture)
    assert chosen is not None  # a decision is made where there is a current mixture
    return write_mixture_files(folder, dict(zip(domains, chosen.tolist(), strict=True)), sources)


def _exactly_one(mixture: np.ndarray) -> np.ndarray:
    """The solver's shares [X], which are off by some 1e-9."""
    shares = np.maximum(mixture, 0)
    return shares / shares.sum()


def _from_anywhere(config: FitConfig) -> FitConfig:
    """With absolute paths of the tables, so that the settings can be read from any folder."""
    tables = {name: str(Path(path).resolve()) for name, path in config.swarm.model_dump().items()}
    return config.model_copy(update={"swarm": SwarmConfig(**tables)})


def proposal_record(analysis: Analysis, outcome: Outcome) -> dict[str, Any]:
    """proposal.json. Names are those of a search's proposal.json where they mean the same."""
    domains, metrics = analysis.inputs.domains, analysis.inputs.metrics
    proposal, resampled = outcome.proposal, outcome.bootstrap
    confidence = analysis.config.bootstrap.confidence
    record: dict[str, Any] = {
        "weights": _named(domains, _exactly_one(proposal.mixture)),
        "intervals": {},
        "predicted": _named(metrics, proposal.predicted),
        "predicted_intervals": {},
        "confidence": confidence if resampled else None,
        "objective": float(proposal.objective),
        "objective_name": outcome.problem.objective,
        "kl_reg": float(outcome.problem.kl),
        "kl": _finite(proposal.kl_divergence),
        "prior": _named(domains, outcome.problem.prior),
        "current": None,
        "predicted_current": None,
        "gain": None,
        "decision": None,
        "family": analysis.fit.family,
        "solver_status": proposal.solver_status,
        "warnings": list(analysis.warnings),
    }
    if resampled:
        record["intervals"] = _intervals(domains, *resampled.interval(confidence))
        low, high = resampled.predict_interval(proposal.u[None], confidence)
        record["predicted_intervals"] = _intervals(metrics, low[0], high[0])
    if analysis.inputs.current is not None and outcome.current_losses is not None:
        record["current"] = _named(domains, analysis.inputs.current)
        record["predicted_current"] = _named(metrics, outcome.current_losses)
    if outcome.gain and outcome.decision and resampled:
        low, high = np.quantile(resampled.gains, [(1 - confidence) / 2, (1 + confidence) / 2])
        interval = {"low": float(low), "high": float(high)}
        record["gain"] = {
            "predicted": outcome.gain.value,
            "interval": interval,
            "stderr": outcome.gain.stderr,
        }
        record["decision"] = {"move": bool(outcome.decision.move), "reason": outcome.decision.reason}
    return record


def laws_record(analysis: Analysis) -> dict[str, Any]:
    """laws.json: L_i(x) = exp(log_c_i) + exp(t_i . x), or another family's name, and how well they hold."""
    fit, inputs = analysis.fit, analysis.inputs
    record: dict[str, Any] = {
        "family": fit.family,
        "domains": list(inputs.domains),
        "metrics": list(inputs.metrics),
        "runs": len(inputs.fitted.runs),
        "runs_held_out": len(inputs.held_out.runs) if inputs.held_out else 0,
    }
    if isinstance(fit.law, LogLinearLaw):
        record["log_c"] = _named(inputs.metrics, fit.law.log_c)
        record["t"] = {
            metric: _named(inputs.domains, row) for metric, row in zip(inputs.metrics, fit.law.t, strict=True)
        }
        if fit.law.averaging is not None:
            record["averaging"] = _named(inputs.metrics, fit.law.averaging)
    quality = quality_rows(analysis)
    record["quality"] = dict(zip(inputs.metrics, quality, strict=True))
    record["comparison"] = {
        family: _named(inputs.metrics, errors) for family, errors in fit.comparison.items()
    }
    record["warnings"] = list(analysis.warnings)
    return record


def quality_rows(analysis: Analysis) -> list[dict[str, float | None]]:
    """How well the law of each metric holds [D]; errors in the metric's own unit, None where undefined."""
    fit = analysis.fit
    columns = {
        "r2": fit.r2,
        "spearman": fit.spearman,
        "loo_error": fit.loo_error,
        "calibration": fit.calibration,
        "test_error": _test_error(analysis),
    }
    return [
        {name: _finite(values[i]) for name, values in columns.items() if values is not None}
        for i in range(len(fit.r2))
    ]


def _test_error(analysis: Analysis) -> np.ndarray | None:
    """Root mean square error on the runs that were held out [D]."""
    held_out, predicted = analysis.inputs.held_out, analysis.held_out_losses
    if held_out is None or predicted is None:
        return None
    return np.sqrt(((predicted - held_out.losses) ** 2).mean(axis=0))


def _csv(analysis: Analysis) -> bytes:
    """A row for each run and metric: measured, fitted, and predicted by a law of the other runs."""
    fit, inputs = analysis.fit, analysis.inputs
    rows = _long(fit, inputs.fitted.runs)
    if inputs.held_out and analysis.held_out_losses is not None:
        absent = np.full_like(analysis.held_out_losses, np.nan)
        test = (inputs.held_out.losses, analysis.held_out_losses, absent)
        rows = pa.concat_tables([rows, _table(inputs.held_out.runs, inputs.metrics, "test", *test)])
    buffer = io.BytesIO()
    csv.write_csv(rows, buffer)
    return buffer.getvalue()


def _long(fit: LawFit, runs: Sequence[str]) -> pa.Table:
    return _table(runs, fit.observations.names, "fit", fit.measured, fit.predicted, fit.left_out)


def _table(
    runs: Sequence[str],
    metrics: Sequence[str],
    part: str,
    measured: np.ndarray,
    predicted: np.ndarray,
    left_out: np.ndarray,
) -> pa.Table:
    """Of values [M, D] each."""
    return pa.table(
        {
            "run": np.repeat(np.array(runs, dtype=object), len(metrics)),
            "metric": np.tile(np.array(metrics, dtype=object), len(runs)),
            "part": pa.array([part] * measured.size, pa.string()),
            "measured": measured.ravel(),
            "predicted": predicted.ravel(),
            "left_out": pa.array(left_out.ravel(), pa.float64(), from_pandas=True),  # nan as an empty cell
        }
    )


def _named(names: Iterable[str], values: np.ndarray) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in zip(names, values, strict=True)}


def _intervals(names: Iterable[str], low: np.ndarray, high: np.ndarray) -> dict[str, dict[str, float]]:
    return {name: {"low": float(a), "high": float(b)} for name, a, b in zip(names, low, high, strict=True)}


def _finite(value: float) -> float | None:
    """JSON has no nan and no inf."""
    return float(value) if math.isfinite(value) else None
