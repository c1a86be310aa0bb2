"""A small run directory, written with the schemas and writers that trainers and pool use."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from opmix_dist.atomic import write_bytes
from opmix_dist.config import check_config
from opmix_dist.exchange import files
from opmix_dist.exchange.rundir import RunDir, SearchDir, write_record
from opmix_dist.exchange.schemas import (
    Decision,
    EvalLine,
    Fit,
    Gain,
    Interval,
    MemoryUse,
    MixtureRecord,
    PhaseCost,
    Proposal,
    SearchRequest,
    SearchStage,
    SearchStatus,
    Summary,
    TrainLine,
)
from opmix_dist.search.laws import LogLinearLaw

DOMAINS = ["web", "code", "books"]
UNIFORM = dict.fromkeys(DOMAINS, 1 / 3)
PROPOSED = {"web": 0.2, "code": 0.5, "books": 0.3}
COMPONENTS = ["old", *DOMAINS]
COMPOSITION = np.array([[1 / 3] * 3, *(0.9 * np.eye(3) + 0.1 / 3)])
LAW = LogLinearLaw(
    np.log([2.0, 1.0, 2.5]),
    np.array([[0.5, 0.4, 0.6, 0.55], [0.6, 0.7, 0.2, 0.65], [0.3, 0.35, 0.4, 0.1]]),
)
STEPS, TOKENS_PER_STEP = 100, 1000


class RunWriter:
    """Writes the parts of a run one by one, so that a test can stop anywhere."""

    def __init__(self, path: Path, policy: str = "opmix", **settings: Any) -> None:
        self.run = RunDir(path)
        self.run.write_config(
            check_config(
                {
                    "run_dir": str(path),
                    "model": {"config": {"model_type": "llama"}},
                    "data": {"root": "data"},
                    "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2},
                    "mixture": {"policy": policy},
                    **settings,
                }
            )
        )

    def mixture(self, step: int, weights: dict[str, float], why: str, search: str | None = None) -> RunWriter:
        version = len(self.run.mixtures())
        record = MixtureRecord(version=version, step=step, weights=weights, why=why, search=search)
        files.append_jsonl(self.run.mixtures_file, record.model_dump(mode="json"))
        return self

    def training(self, steps: int = STEPS, *, first_measured: int = STEPS // 2) -> RunWriter:
        """Lines up to ``first_measured`` are as runs had them before speed and memory were measured."""
        lines = [
            TrainLine(
                step=step,
                loss=3 + 6 / step,
                domain_loss=dict.fromkeys(DOMAINS, 3 + 6 / step),
                grad_norm=1.0,
                lr=1e-3,
                tokens=step * TOKENS_PER_STEP,
                tokens_per_second=1e4,
                mixture_version=0,
                **(measured(step) if step > first_measured else {}),
            )
            for step in range(1, steps + 1)
        ]
        rows = (line.model_dump(mode="json", exclude_unset=True) for line in lines)
        files.rewrite_jsonl(self.run.train_file, rows)
        return self

    def evaluation(self, step: int, losses: list[float]) -> RunWriter:
        line = EvalLine(
            step=step,
            tokens=step * TOKENS_PER_STEP,
            loss=dict(zip(DOMAINS, losses, strict=True)),
            stderr=dict.fromkeys(DOMAINS, 0.03),
        )
        files.append_jsonl(self.run.eval_file, line.model_dump(mode="json"))
        return self

    def summary(
        self,
        losses: list[float],
        costs: dict[str, PhaseCost],
        *,
        domain_tokens: dict[str, int] | None = None,
        history: dict[str, int] | None = None,
    ) -> RunWriter:
        record = Summary(
            steps=STEPS,
            tokens=STEPS * TOKENS_PER_STEP if domain_tokens is None else sum(domain_tokens.values()),
            domain_tokens=domain_tokens or dict.fromkeys(DOMAINS, 33_333),
            history=history or {},
            final_loss=dict(zip(DOMAINS, losses, strict=True)),
            final_stderr=dict.fromkeys(DOMAINS, 0.03),
            final_search_loss={domain: loss + 0.0625 for domain, loss in zip(DOMAINS, losses, strict=True)},
            mixture=self.run.mixtures()[-1].weights,
            costs=costs,
            parameters=1_234_567,
            world_size=2,
            versions={"torch": "2.13"},
        )
        write_record(self.run.summary_file, record)
        return self

    def request(self) -> SearchDir:
        search = self.run.search("0001")
        record = SearchRequest(
            search=search.name,
            step=20,
            snapshot="snapshots/step_20",
            components=COMPONENTS,
            domains=DOMAINS,
            composition=COMPOSITION.tolist(),
            current=UNIFORM,
            prior=UNIFORM,
            base_lr=1e-3,
            seed=0,
        )
        write_record(search.request_file, record)
        return search

    def search(self) -> SearchDir:
        """A search that proposed, with every file of it."""
        search = self.request()
        for name in COMPONENTS:
            points = [{"step": s, "loss": 4 - 0.01 * s} for s in range(1, 51)]
            files.rewrite_jsonl(search.probe(name) / "curve.jsonl", points)
        u = np.array([0.1, 0.1, 0.5, 0.3])
        write_candidates(search, u)
        write_record(search.fit_file, _fit())
        write_record(search.proposal_file, _proposal(search.name, u))
        write_record(search.status_file, SearchStatus(stage=SearchStage.PROPOSED))
        return search


# Held-out losses of a lifecycle before its first stage and after each of three, in the order of DOMAINS, and
# what each stage reads: web, then code, then books.
STAGE_LOSSES = ([9.0, 9.0, 9.0], [3.0, 7.0, 8.0], [3.5, 2.0, 7.0], [3.75, 2.25, 4.0])
STAGE_NAMES = ("pretrain", "midtrain", "instruct")
STAGE_TOKENS = 60_000


def write_lifecycle(path: Path, *, seed: int = 0, shift: float = 0.0, flops: float = 6e12) -> Path:
    """A lifecycle of three stages that have ended, losses higher by ``shift`` after the last one."""
    write_bytes(
        path / "lifecycle.yaml", yaml.safe_dump({"stages": [{"name": n} for n in STAGE_NAMES]}).encode()
    )
    history: dict[str, int] = {}
    for i, (name, domain) in enumerate(zip(STAGE_NAMES, DOMAINS, strict=True)):
        writer = RunWriter(path / "stages" / name, policy="static", seed=seed)
        writer.mixture(0, {domain: 1.0}, "initial mixture").evaluation(0, STAGE_LOSSES[i])
        losses = [loss + (shift if i == 2 else 0.0) for loss in STAGE_LOSSES[i + 1]]
        costs = {"train": PhaseCost(seconds=10, device_seconds=20, flops=flops, tokens=STAGE_TOKENS)}
        tokens = dict.fromkeys(DOMAINS, 0) | {domain: STAGE_TOKENS}
        writer.summary(losses, costs, domain_tokens=tokens, history=history)
        history = {**history, domain: STAGE_TOKENS}
    return path


def measured(step: int) -> dict[str, object]:
    """Of a step of a tenth of a second on two devices; memory every tenth step, the most at the last."""
    memory = MemoryUse(
        rank=1, parameters=1 << 30, gradients=2 << 30, optimizer=3 << 30, activations_and_others=step << 30,
        offloaded=0, peak=(6 + step) << 30, reserved=(7 + step) << 30, measured="allocated",
    )  # fmt: skip
    return {
        "tokens_per_second_per_device": 5e3,
        "seconds": 0.1,
        "data_seconds": 0.002,
        "mfu": 0.4,
        "hfu": 0.5,
        "memory": memory if step % 10 == 0 else None,
    }


def write_candidates(search: SearchDir, proposal: np.ndarray) -> None:
    """Losses that follow LAW with noise: 12 candidates, the snapshot and the proposal."""
    rng = np.random.default_rng([1, 2])
    U = np.concatenate([rng.dirichlet(np.ones(4), 12), np.zeros((1, 4)), proposal[None]])
    kinds = ["candidate"] * 12 + ["snapshot", "proposal"]
    predicted = np.where(U.sum(axis=1, keepdims=True) > 0, LAW.predict(U), np.nan)
    losses = LAW.predict(U) + rng.normal(0, 0.005, (14, 3))
    left_out = predicted + np.where(np.arange(14) < 12, 0.002, np.nan)[:, None]
    rows = [
        {"candidate": -1 if kind == "snapshot" else m, "kind": kind}
        | {f"u_{c}": U[m, k] for k, c in enumerate(COMPONENTS)}
        | {f"x_{name}": (U[m] @ COMPOSITION)[i] for i, name in enumerate(DOMAINS)}
        | {"domain": domain, "loss": losses[m, d], "stderr": 0.01, "stderr_change": 0.005, "tokens": 4096}
        | {"predicted": predicted[m, d], "left_out": left_out[m, d]}
        for m, kind in enumerate(kinds)
        for d, domain in enumerate(DOMAINS)
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    files.write_bytes(search.candidates_file, buffer.getvalue())


def _fit() -> Fit:
    return Fit(
        domains=DOMAINS,
        components=COMPONENTS,
        family="log_linear",
        parameters={"log_c": LAW.log_c.tolist(), "t": LAW.t.tolist()},
        r2=[0.98, 0.91, None],
        spearman=[0.97, 0.93, 0.99],
        loo_error=[0.004, 0.006, 0.005],
        calibration=[1.01, 0.95, None],
        warnings=["books: few candidates"],
    )


def _proposal(name: str, u: np.ndarray) -> Proposal:
    predicted = dict(zip(DOMAINS, LAW.predict(u[None])[0].tolist(), strict=True))
    return Proposal(
        search=name,
        step=20,
        coefficients=dict(zip(COMPONENTS, u.tolist(), strict=True)),
        weights=PROPOSED,
        current=UNIFORM,
        predicted=predicted,
        simulated={domain: loss + 0.003 for domain, loss in predicted.items()},
        snapshot={domain: loss + 0.2 for domain, loss in predicted.items()},
        predicted_current={domain: loss + 0.02 for domain, loss in predicted.items()},
        simulated_current={domain: loss + 0.021 for domain, loss in predicted.items()},
        objective=3.0,
        kl=0.1,
        intervals={name: Interval(low=weight - 0.1, high=weight + 0.05) for name, weight in PROPOSED.items()},
        confidence=0.9,
        gain=Gain(predicted=0.02, interval=Interval(low=0.011, high=0.03), measured=0.018, stderr=0.002),
        decision=Decision(move=True, reason="gain 0.018 ± 0.002: above 0 at 90% confidence"),
        horizon_tokens=51_200,
        costs={
            "probes": PhaseCost(seconds=4, device_seconds=8, flops=2e12, tokens=200_000),
            "evaluation": PhaseCost(seconds=2, device_seconds=4, flops=1e12, tokens=100_000),
        },
        warnings=["books: few candidates"],
    )
