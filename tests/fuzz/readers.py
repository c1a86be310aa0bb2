"""Every file that is read, how a good one is made, and what reads it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.distributed.checkpoint as dcp
import yaml
import zstandard
from pyarrow import csv, ipc, parquet
from transformers import GenerationConfig

from opmix_dist.config import DeepSpeedConfig
from opmix_dist.data.catalogue import TOKENIZER, Catalogue
from opmix_dist.data.shards import ShardedSplit
from opmix_dist.data.sources import FileSource
from opmix_dist.data.tokenizer import load_tokenizer
from opmix_dist.engines.deepspeed_config import _user_settings
from opmix_dist.exchange import files
from opmix_dist.exchange.manifest import CheckpointMarker, FileDigest
from opmix_dist.exchange.rundir import RunDir, read_record, write_record
from opmix_dist.exchange.schemas import BadStep, EvaluationPlan, Record, Stopped
from opmix_dist.fit.config import load_fit_config
from opmix_dist.fit.tables import read_table
from opmix_dist.mixture_command import read_mixture
from opmix_dist.models.lora import JointAdapters
from opmix_dist.models.source import checkpoint_source
from opmix_dist.pool import method_times
from opmix_dist.pool.evaluation_files import EvaluationFiles, Measured
from opmix_dist.report.html import write_report
from opmix_dist.report.reading import read_run
from opmix_dist.tasks.records import read_tasks
from opmix_dist.train.checkpoint_storage import SafePlanner, SafeReader
from opmix_dist.train.state import TrainerState
from opmix_kernels.runtime import read_tuning
from tests.data.migration_inputs import write_mds
from tests.data.shard_files import write_catalogue, write_split
from tests.fuzz.compared_readers import COMPARED, make_compared
from tests.fuzz.kept_readers import KEPT, make_kept
from tests.helpers import tiny_llama
from tests.report.runs import COMPONENTS, DOMAINS, UNIFORM, RunWriter

EOS = 9
TARGETS = np.arange(5)
U = np.array([0.25, 0.75])
TABLE = pa.table({"run": ["r0", "r1", "r2", "r3"], "web": [0.1, 0.2, 0.3, 0.4], "code": [1.0, 2.0, 3.0, 4.0]})
TEXTS = ["one", "zwei ü", "3" * 300, "vier"]


@dataclass(frozen=True)
class Reader:
    """One way in which a file is read.

    file: below the folder that :func:`make_all` fills.
    read: given that folder; raises UserError where the file is not what it must be.
    refuses: what it may raise besides, as its docstring or its caller's says.
    dear: takes so long that it is given fewer files.
    """

    name: str
    file: str
    read: Callable[[Path], object]
    refuses: tuple[type[Exception], ...] = ()
    dear: bool = False

    @property
    def is_json(self) -> bool:
        return self.file.endswith(".json")

    @property
    def is_jsonl(self) -> bool:
        return self.file.endswith(".jsonl")


def make_all(root: Path) -> None:
    """A run with a search, its model and a checkpoint; a prepared folder; sources to prepare; tables."""
    _make_run(root / "run")
    _make_model(root / "model")
    _make_checkpoint(root / "checkpoint")
    write_catalogue(root / "data", {"web": 20}, eval_samples=3)
    write_split(root / "packed" / "web" / "train", 0, 20, compression="zstd")
    for shard in (root / "packed" / "web" / "train").glob("*.mds"):
        shard.unlink()
    _make_sources(root / "sources")
    _make_tables(root / "tables")
    make_kept(root)
    make_compared(root)


Action = Literal["skip", "rollback"]
ACTIONS: tuple[Action, ...] = ("skip", "rollback")


def _bad_step(action: Action) -> BadStep:
    place = {"checkpoint": 2, "loader": {"batches": 4}, "domain_tokens": {"web": 64}}
    return BadStep(
        kind="nan",
        action=action,
        step=3,
        batch=3,
        reason="the gradient norm is nan",
        domain_loss={"web": None},
        at="2026-01-01",
        **(place if action == "rollback" else {}),
    )


def _make_run(path: Path) -> None:
    writer = RunWriter(path).mixture(0, UNIFORM, "initial mixture").mixture(20, UNIFORM, "search", "0001")
    writer.training(20).evaluation(10, [3.0, 2.0, 3.5]).evaluation(20, [2.9, 1.9, 3.4])
    writer.summary([2.8, 1.8, 3.3], {})
    search = writer.search()
    plan = EvaluationPlan(
        method="lowrank", joint=2, batch_size=4, dtype="float32", kernels=False, decided_for={"device": "cpu"}
    )
    write_record(search.plan_file, plan)
    write_record(writer.run.stopped_file, Stopped(step=3, checkpoint=None, signal="SIGTERM", at="2026-01-01"))
    for action in ACTIONS:
        files.append_jsonl(writer.run.events_file, _bad_step(action).model_dump(mode="json"))
    kept = EvaluationFiles(search.evaluations, "identity", TARGETS)
    kept.write(U, Measured(kept.key(U), np.ones(5), None, None, 1.0))
    kept.path(kept.key(U)).rename(search.evaluations / "one.safetensors")
    times = method_times.MethodTimes(
        measured_for={"device": "cpu"}, lowrank_per_sample=1.0, merged_per_sample=1.0, merge=1.0
    )
    write_record(path / "times.json", times)


def _make_model(folder: Path) -> None:
    """Two adapters beside a sharded model."""
    model = tiny_llama()
    model.save_pretrained(folder, max_shard_size="60KB")
    GenerationConfig(eos_token_id=1).save_pretrained(folder)
    index = folder / "model.safetensors.index.json"
    first = min(folder.glob("*.safetensors"))
    first.rename(folder / "first.safetensors")
    index.write_text(index.read_text().replace(first.name, "first.safetensors"))
    adapters = JointAdapters(tiny_llama(), ["a"], rank=2, alpha=4, seeds=[0])
    adapters.save_peft(0, folder / "adapter", "base")


def _make_checkpoint(folder: Path) -> None:
    state = {"parameter": {"w": torch.arange(6.0)}, "step": torch.tensor([3])}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    trainer = TrainerState(
        step=3, weights=UNIFORM, domain_tokens=dict.fromkeys(DOMAINS, 7), world_size=1, global_batch_size=4,
        content=dict.fromkeys(DOMAINS, "0" * 64), loader={"drawn": [1, 2, 3]},
    )  # fmt: skip
    write_record(folder / "trainer.json", trainer)
    marker = CheckpointMarker(step=3, files={"a": FileDigest(size=1, xxh3_128="0" * 32)})
    files.write_json(folder / files.COMPLETE, marker.model_dump(mode="json"))


def _make_sources(folder: Path) -> None:
    folder.mkdir()
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    (folder / "x.jsonl").write_bytes(lines)
    (folder / "y.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "z.jsonl.zst").write_bytes(zstandard.compress(lines))
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    chat = {"messages": messages, "tools": []}
    (folder / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    table = pa.table({"text": TEXTS})
    parquet.write_table(table, folder / "x.parquet")
    with ipc.new_stream(folder / "stream.arrow", table.schema) as stream:
        stream.write_table(table)
    with ipc.new_file(folder / "file.arrow", table.schema) as stream:
        stream.write_table(table)
    np.save(folder / "x.npy", np.array([1, 2, EOS, 3, EOS], np.uint16))
    (folder / "x.txt").write_text("\n".join(TEXTS))
    _write_megatron(folder / "pair")
    write_mds(folder / "mds", {"text": "str"}, ({"text": text} for text in TEXTS))


def _write_megatron(prefix: Path) -> None:
    from opmix_dist.data.sources.megatron import _import_indexed_dataset

    builder = _import_indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for row in ([1, 2, EOS], [4, EOS]):
        builder.add_item(torch.tensor(row))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def _make_tables(folder: Path) -> None:
    folder.mkdir()
    csv.write_csv(TABLE, folder / "runs.csv")
    parquet.write_table(TABLE, folder / "runs.parquet")
    fit = {"swarm": {"ratios": "runs.csv", "metrics": "runs.csv"}}
    (folder / "fit.yaml").write_text(yaml.safe_dump(fit))
    (folder / "mixture.json").write_text(json.dumps({"weights": {"web": 0.4, "code": 0.6}}))
    (folder / "mixture.yaml").write_text("web: 0.4\ncode: 0.6\n")
    (folder / "tuned.json").write_text(json.dumps({"choices": {}}))
    task = {"kind": "tool_call", "messages": messages("2+2?"), "answer": {"name": "f", "arguments": {"n": 1}}}
    choice = {"kind": "multiple_choice", "messages": messages("?"), "choices": ["A", "B"], "answer": "A"}
    (folder / "tasks.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (task, choice)))
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"overlap_comm": True}}))


def messages(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def _run(root: Path) -> RunDir:
    return RunDir(root / "run")


def _search(root: Path) -> Any:
    return _run(root).search("0001")


def _view(root: Path) -> object:
    return read_run(_run(root))


def _marker(root: Path) -> object:
    return files.require_complete(root / "checkpoint", "checkpoint")


def _report(root: Path) -> object:
    """All of a run as the report shows it, with all that it computes from it."""
    return write_report(_run(root)).read_bytes()


def _read_checkpoint(root: Path) -> object:
    state = {"parameter": {"w": torch.zeros(6)}, "step": torch.zeros(1, dtype=torch.int64)}
    dcp.load(state, storage_reader=SafeReader(root / "checkpoint"), planner=SafePlanner(), no_dist=True)
    return state


def _read_model(root: Path) -> object:
    """Config, index and weights, each tensor once."""
    source = checkpoint_source(str(root / "model"), local_only=True)
    assert source.weights is not None
    source.weights.generation_config()
    return [source.weights.read(key, ()) for key in source.weights.keys], source.whole()


def _read_adapter(root: Path) -> object:
    adapters = JointAdapters(tiny_llama(), ["a"], rank=2, alpha=4, seeds=[0])
    return adapters.load_peft(0, root / "model" / "adapter")


def _read_evaluation(root: Path) -> object:
    """Under the name that it is looked for; None is what a damaged one is."""
    search = _search(root)
    kept = EvaluationFiles(search.evaluations, "identity", TARGETS)
    link = kept.path(kept.key(U))
    link.unlink(missing_ok=True)
    link.symlink_to(search.evaluations / "one.safetensors")
    return kept.read(U)


def _read_split(folder: Path) -> object:
    split = ShardedSplit(folder, verify=True)
    return [split.read(i) for i in range(min(len(split), 30))]


def _read_domains(root: Path) -> object:
    catalogue = Catalogue.open(root / "data")
    return catalogue.samples("train"), catalogue.sequence_length


def _read_tokenizers(root: Path) -> object:
    return load_tokenizer(str(root / "data" / TOKENIZER)), Catalogue.open(root / "data").load_tokenizer()


def _packed(root: Path) -> object:
    folder = root / "packed" / "web" / "train"
    for shard in folder.glob("*.mds"):
        shard.unlink()
    return _read_split(folder)


def _source(name: str, messages: str | None = None) -> Callable[[Path], object]:
    def read(root: Path) -> object:
        names = [str(root / "sources" / name)]
        source = FileSource(names, messages_field=messages, eos_id=EOS, token_dtype="uint16")
        return [document for _, chunk in source.chunks() for document in chunk.documents()]

    return read


def _of(name: str, file: str, read: Callable[[Path], object], *refuses: type[Exception]) -> Reader:
    """A reader that is given the file itself."""
    return Reader(name, file, lambda root: read(root / file), refuses)


def _record(name: str, file: str, kind: type[Record]) -> Reader:
    return _of(name, file, partial(read_record, kind=kind))


def _deepspeed(file: Path) -> object:
    return _user_settings(DeepSpeedConfig(config=str(file)))


SEARCH = "run/searches/0001"
READERS = (
    Reader("config", "run/config.yaml", lambda root: _run(root).any_config()),
    Reader("mixtures", "run/mixtures.jsonl", lambda root: _run(root).mixtures()),
    Reader("training metrics", "run/metrics/train.jsonl", lambda root: _run(root).train_lines()),
    Reader("evaluations", "run/metrics/eval.jsonl", lambda root: _run(root).eval_lines()),
    Reader("summary", "run/summary.json", lambda root: _run(root).summary()),
    Reader("stopped", "run/stopped.json", lambda root: _run(root).stopped()),
    Reader("bad steps", "run/events.jsonl", lambda root: _run(root).bad_steps()),
    Reader("request", f"{SEARCH}/request.json", lambda root: _search(root).request()),
    Reader("status", f"{SEARCH}/status.json", lambda root: _search(root).status()),
    Reader("proposal", f"{SEARCH}/proposal.json", lambda root: _search(root).proposal()),
    Reader("fit", f"{SEARCH}/fit.json", lambda root: _search(root).fit()),
    _record("evaluation plan", f"{SEARCH}/evaluation.json", EvaluationPlan),
    Reader("evaluated candidate", f"{SEARCH}/evaluations/one.safetensors", _read_evaluation),
    Reader("candidates", f"{SEARCH}/candidates.parquet", _view),
    Reader(
        "probe's curve", f"{SEARCH}/probes/{COMPONENTS[0]}/curve.jsonl", lambda root: read_run(_run(root))
    ),
    Reader("report of mixtures", "run/mixtures.jsonl", _report, dear=True),
    Reader("report of evaluations", "run/metrics/eval.jsonl", _report, dear=True),
    Reader("report of a proposal", f"{SEARCH}/proposal.json", _report, dear=True),
    Reader("report of a request", f"{SEARCH}/request.json", _report, dear=True),
    Reader("report of a fit", f"{SEARCH}/fit.json", _report, dear=True),
    Reader("report of a summary", "run/summary.json", _report, dear=True),
    Reader("report of candidates", f"{SEARCH}/candidates.parquet", _report, dear=True),
    _of("method times", "run/times.json", partial(method_times._read, shape={})),
    _record("checkpoint's marker", "checkpoint/COMPLETE.json", CheckpointMarker),
    Reader("a marker", "checkpoint/COMPLETE.json", _marker),
    _record("trainer's state", "checkpoint/trainer.json", TrainerState),
    Reader("checkpoint's index", "checkpoint/.metadata", _read_checkpoint),
    Reader("checkpoint's tensors", "checkpoint/__0_0.distcp", _read_checkpoint),
    Reader("model's config", "model/config.json", _read_model, dear=True),
    Reader("model's index", "model/model.safetensors.index.json", _read_model, dear=True),
    Reader("model's weights", "model/first.safetensors", _read_model, dear=True),
    Reader("model's generation config", "model/generation_config.json", _read_model, dear=True),
    Reader("probe's adapter", "model/adapter/adapter_model.safetensors", _read_adapter, dear=True),
    Reader("domain", "data/web/domain.json", _read_domains),
    Reader("tokenizer", f"data/{TOKENIZER}/tokenizer.json", _read_domains),
    Reader("tokenizer, built", f"data/{TOKENIZER}/tokenizer.json", _read_tokenizers, dear=True),
    Reader("tokenizer's config", f"data/{TOKENIZER}/tokenizer_config.json", _read_tokenizers, dear=True),
    Reader("shards' index", "data/web/train/index.json", lambda root: _read_split(root / "data/web/train")),
    Reader("shard", "data/web/train/shard.00000.mds", lambda root: _read_split(root / "data/web/train")),
    Reader("packed shard", "packed/web/train/shard.00000.mds.zstd", _packed),
    Reader("lines", "sources/x.jsonl", _source("x.jsonl")),
    Reader("chats", "sources/chat.jsonl", _source("chat.jsonl", "messages")),
    Reader("gzip lines", "sources/y.jsonl.gz", _source("y.jsonl.gz")),
    Reader("zstd lines", "sources/z.jsonl.zst", _source("z.jsonl.zst")),
    Reader("Parquet rows", "sources/x.parquet", _source("x.parquet")),
    Reader("Arrow stream", "sources/stream.arrow", _source("stream.arrow")),
    Reader("Arrow file", "sources/file.arrow", _source("file.arrow")),
    Reader("ids", "sources/x.npy", _source("x.npy")),
    Reader("text", "sources/x.txt", _source("x.txt")),
    Reader("Megatron's index", "sources/pair.idx", _source("pair.bin")),
    Reader("Megatron's ids", "sources/pair.bin", _source("pair.bin")),
    Reader("others' shards' index", "sources/mds/index.json", _source("mds")),
    Reader("others' shard", "sources/mds/shard.00000.mds.zstd", _source("mds")),
    _of("table", "tables/runs.csv", read_table),
    _of("Parquet table", "tables/runs.parquet", read_table),
    _of("fit's settings", "tables/fit.yaml", load_fit_config),
    _of("mixture", "tables/mixture.json", read_mixture),
    _of("mixture in YAML", "tables/mixture.yaml", read_mixture),
    Reader(
        "kernels' tuning",
        "tables/tuned.json",
        lambda root: read_tuning(root / "tables/tuned.json"),
        (ValueError,),
    ),
    _of("tasks", "tables/tasks.jsonl", read_tasks),
    _of("DeepSpeed's settings", "tables/ds.json", _deepspeed),
    *(Reader(name, file, read, dear=dear) for name, file, read, dear in (*KEPT, *COMPARED)),
)
