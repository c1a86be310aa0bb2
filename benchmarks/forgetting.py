"""What training methods keep of old domains, and what it costs: one run goes on from another on a new domain.

    python -m benchmarks.forgetting --out benchmarks/results/forgetting.md

Built-in domains, a Llama of two blocks of width 32, one seed: enough to see that a method works and of which
size its strength is, and no ranking of methods. Runs that are in ``--folder`` already are not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, table
from opmix_dist.config import check_config
from opmix_dist.data.ingest import PrepareConfig, prepare
from opmix_dist.exchange.rundir import RunDir
from opmix_dist.train.roles import run_job

ROOT = Path(__file__).parent.parent
OLD, NEW = ["json", "prose"], "python"
STEPS, MORE_STEPS = 400, 150
LORA = {"rank": 8, "alpha": 16}


def config(folder: Path, name: str, steps: int, **sections: Any) -> dict[str, Any]:
    return {
        "run_dir": str(folder / name),
        "data": {"root": str(folder / "data")},
        "model": {
            "config": {
                "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
            }
        },
        "optimizer": {"lr": 3e-3},
        "mixture": {"policy": "static"},
        "train": {"steps": steps, "global_batch_size": 16, "micro_batch_size": 16, "log_interval_steps": 50},
        "checkpoint": {"interval_steps": 0},
        "search": {"candidates": {"samples_per_domain": 4}},
        **sections,
    }  # fmt: skip


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and sections of the second run."""
    yield "plain", {}
    yield "replay: 10% old, 90% new", {"mixture": {"policy": "static", "initial": {"old": 0.1, "new": 0.9}}}
    for strength in (1.0, 10.0, 100.0):
        yield f"ewc, strength {strength:g}", {"method": {"name": "ewc", "ewc": {"strength": strength}}}
    sampled = {"strength": 10.0, "fisher": "sampled"}
    yield "ewc, strength 10, sampled labels", {"method": {"name": "ewc", "ewc": sampled}}
    for strength in (0.001, 0.01, 0.1):
        yield f"mas, strength {strength:g}", {"method": {"name": "mas", "mas": {"strength": strength}}}
    for projection in ("gem", "a_gem"):
        settings = {"samples_per_step": 16, "projection": projection}
        yield f"{projection}, 16 samples per step and domain", {"method": {"name": "gem", "gem": settings}}
    yield "adapters only, rank 8", {"model": {"lora": LORA}}


def run(settings: dict[str, Any]) -> RunDir:
    found = RunDir(settings["run_dir"])
    if not found.summary_file.exists():
        run_job(check_config(settings))
    return found


def described(name: str, found: RunDir) -> list[str]:
    """A row: losses, and FLOPs and seconds over those of plain steps."""
    summary = found.summary()
    costs = summary.costs
    losses = [f"{summary.final_loss[domain]:.3f}" for domain in (*OLD, NEW)]
    beside = [costs[phase] for phase in ("importance", "memory gradients", "penalty") if phase in costs]
    flops = sum(cost.flops for cost in beside) / costs["train"].flops
    seconds = sum(cost.seconds for cost in beside)
    return [name, *losses, f"{flops:.2f}", f"{costs['train'].seconds:.0f}", f"{seconds:.0f}"]


def measure(folder: Path) -> list[list[str]]:
    if not (folder / "data").exists():
        prepare(
            PrepareConfig(
                out=folder / "data", builtin=True, builtin_max_bytes=400_000, vocab_size=512,
                sequence_length=64, eval_fraction=0.1, workers=1,
            )
        )  # fmt: skip
    first = config(folder, "first", STEPS)
    first["data"] |= {"domains": OLD, "watch": [NEW]}
    start = run(first)
    rows = [described("before", start)]
    for number, (name, sections) in enumerate(variants()):
        given = config(folder, f"next_{number}", MORE_STEPS, start={"run": str(start.path)})
        given |= {"model": {}} | sections
        replays = "initial" in given["mixture"]
        given["data"] |= {"domains": [*OLD, NEW]} if replays else {"domains": [NEW], "watch": OLD}
        rows.append(described(name, run(given)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "forgetting")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    head = ["method", *OLD, f"{NEW} (new)", "extra FLOPs", "s, steps", "s, method"]
    text = "\n".join(
        [
            "# What training methods keep",
            "",
            "`python -m benchmarks.forgetting`: " + describe("torch"),
            "",
            f"{STEPS} steps on {' and '.join(OLD)}, then {MORE_STEPS} on {NEW}; held-out losses at the end, "
            "nats per token, 64 samples per domain; one seed. Extra FLOPs are the method's over those of the "
            "second run's steps; seconds are wall time on a machine that did other things too.",
            "",
            table(head, measure(arguments.folder)),
            "",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
