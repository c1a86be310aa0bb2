"""Is the simulation true? A pretraining and a midtraining search of a tiny model on the built-in corpus.

    make validate-small

Trains a prefix on four domains and searches (`opmix train`), searches again for a domain that joins (`opmix
search`), validates both (`opmix validate`), and writes benchmarks/results/validate_small.{md,json} from what
these have found. Each part that is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine
from opmix_dist.exchange.files import read_json
from opmix_dist.exchange.rundir import read_record
from opmix_dist.validate.records import Validation, ValidationDir
from opmix_dist.validate.tables import all_rows, sentences

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OLD, NEW = ["cpp", "json", "prose", "python"], "reference"
LENGTH, BATCH = 128, 16
MODEL = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
}
"""0.5 million parameters with a vocabulary of 2,048."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "validate_small")
    parser.add_argument("--out", type=Path, default=RESULTS / "validate_small")
    parser.add_argument("--prefix", type=int, default=500, help="steps before the search")
    parser.add_argument("--horizon", type=int, default=100, help="steps of probes and of real runs")
    parser.add_argument("--mixtures", type=int, default=6, help="of the design, besides the named ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of real runs' data order")
    parser.add_argument("--samples", type=int, default=32, help="held-out samples of each domain")
    parser.add_argument("--ranks", type=int, default=2)
    chosen = parser.parse_args()
    data = chosen.runs / "data"
    opmix("prepare", "--builtin", "--eval-fraction", "0.1", "--vocab-size", "2048",
          "--sequence-length", str(LENGTH), "--out", str(data))  # fmt: skip
    pretraining, midtraining = chosen.runs / "pretraining", chosen.runs / "midtraining"
    pretrain(pretraining, data, chosen)
    search_new_domain(midtraining, data, pretraining / "export" / "hf", chosen)
    found = {
        "A pretraining search": validate(pretraining, chosen),
        f"A midtraining search: {NEW} joins": validate(midtraining, chosen),
    }
    write(found, chosen)


def opmix(*arguments: str, ranks: int = 1) -> None:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if ranks > 1 else dict(os.environ)
    print("---", *arguments[:2], flush=True)
    subprocess.run([*command, "-m", "opmix_dist.cli", *arguments], check=True, cwd=ROOT, env=environment)


def shared(run: Path, data: Path, chosen: argparse.Namespace) -> dict:
    """Settings of both searches."""
    return {
        "run_dir": str(run),
        "data": {"root": str(data), "domains": OLD},
        "optimizer": {"lr": 3e-3},
        "search": {
            "probes": {"steps": chosen.horizon, "batch_size": BATCH, "micro_batch_size": BATCH},
            "candidates": {"samples_per_domain": chosen.samples},
        },
    }


def settings_file(run: Path, settings: dict) -> str:
    """YAML is a superset of JSON."""
    path = run.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1))
    return str(path)


def pretrain(run: Path, data: Path, chosen: argparse.Namespace) -> None:
    """A prefix, the search at its end, and one step more."""
    steps = chosen.prefix + 1
    settings = shared(run, data, chosen) | {
        "model": {"config": MODEL},
        "train": {"steps": steps, "global_batch_size": BATCH, "micro_batch_size": BATCH // chosen.ranks},
        "schedule": {"name": "constant", "warmup_steps": 20},
        "checkpoint": {"interval_steps": 0},
        "mixture": {"policy": "opmix", "initial": "uniform"},
    }
    settings["search"]["start_fraction"] = chosen.prefix / steps
    opmix("train", settings_file(run, settings), ranks=chosen.ranks)


def search_new_domain(run: Path, data: Path, checkpoint: Path, chosen: argparse.Namespace) -> None:
    settings = shared(run, data, chosen) | {
        "model": {"checkpoint": str(checkpoint)},
        "mixture": {"initial": {**dict.fromkeys(OLD, 1 / len(OLD)), NEW: 0.0}},
    }
    settings["data"]["domains"] = [*OLD, NEW]
    settings["search"]["new_domains"] = [NEW]
    opmix("search", settings_file(run, settings), ranks=chosen.ranks)


def sweep(horizon: int) -> dict[str, dict[str, Any]]:
    """Other ways to simulate. The searches' probes have twice the learning rate and rank 16; ``norm`` puts
    these very probes together in another way."""
    rates = {f"lr-{times}": {"lr_multiplier": float(times)} for times in (4, 8)}
    probes = {**rates, "rank-4": {"rank": 4}, "half-the-steps": {"steps": horizon // 2}}
    return {"norm": {"interpolation": "norm"}, **probes}


def validate(run: Path, chosen: argparse.Namespace) -> Validation:
    opmix(
        "validate",
        str(run),
        *("--design.mixtures", str(chosen.mixtures)),
        *("--real.seeds", json.dumps(chosen.seeds)),
        *("--keep_models", "true"),  # for another sweep
        *("--sweep", json.dumps(sweep(chosen.horizon))),
        ranks=chosen.ranks,
    )
    return read_record(ValidationDir(run / "validation" / "0001").result_file, Validation)


def write(found: dict[str, Validation], chosen: argparse.Namespace) -> None:
    parameters = read_json(chosen.runs / "pretraining" / "summary.json")["parameters"]
    lines = [
        "# Simulated against real training",
        "",
        f"`make validate-small`: {machine.describe('torch')}. {parameters:,} parameters, prefix of "
        f"{chosen.prefix} steps of {BATCH} x {LENGTH} tokens on {', '.join(OLD)} in equal parts; probes and "
        f"real runs of {chosen.horizon} steps, real runs with seeds {', '.join(map(str, chosen.seeds))}.",
    ]
    for title, result in found.items():
        lines += ["", f"## {title}", "", *(f"{line}\n" for line in sentences(result))]
        for name, head, rows in all_rows(result):
            lines += [f"### {name}", "", machine.table(head, rows), ""]
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")
    values = {title: result.model_dump(mode="json") for title, result in found.items()}
    chosen.out.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
