"""Whole jobs on short documents and chats: masks, uneven targets, what a resume may change about the data."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from opmix_dist.data.build import held_out_samples, open_data
from opmix_dist.data.catalogue import Catalogue
from opmix_dist.data.ingest import prepare
from opmix_dist.data.loader import MixtureLoader
from opmix_dist.data.prepare_config import PrepareConfig
from opmix_dist.exchange.rundir import RunDir, read_record
from opmix_dist.models.loss import losses_by_domain, sample_loss_sums
from opmix_dist.seeds import derive_seed
from opmix_dist.train.checkpoint import STATE_FILE
from opmix_dist.train.state import TrainerState
from tests.train.jobs import BATCH, LENGTH, Job, complete, curve, schedule, tiny_config

pytestmark = pytest.mark.launch

SHORT = ("chats", "notes")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


def note(number: int) -> dict[str, object]:
    """A text of a dozen tokens or two."""
    rng = np.random.default_rng([0, number])
    steps = " then ".join(f"{word} {rng.integers(100)}" for word in rng.choice(["add", "take", "keep"], 3))
    return {"text": f"Note {number}: {steps}."}


def chat(number: int) -> dict[str, object]:
    """A question and an answer of very different lengths."""
    rng = np.random.default_rng([1, number])
    few, many = rng.integers(1, 3), rng.integers(4, 12)
    turns = [
        ("user", f"Count {many} from {number}"),
        ("assistant", " ".join(map(str, range(number, number + few)))),
    ]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture(scope="module")
def short_data(streaming: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several documents in each sample of 64 tokens; of the chats only the answers are learnt."""
    folder = tmp_path_factory.mktemp("short")
    for name, make in (("chats", chat), ("notes", note)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(make(i)) + "\n" for i in range(900)))
    (folder / "template").write_text(CHAT_TEMPLATE)
    prepare(
        PrepareConfig(
            out=folder / "data", domains={name: [str(folder / f"{name}.jsonl")] for name in SHORT},
            chat_domains=["chats"], chat_template=folder / "template", vocab_size=400, sequence_length=LENGTH,
            eval_fraction=0.2, workers=1,
        )
    )  # fmt: skip
    return folder / "data"


def masked_config(data: Path, run: Path, **sections: object) -> dict:
    """One rank that trains and searches."""
    config = tiny_config(data, run, **{"pool": {"ranks": 0}, **sections})
    config["data"] |= {"domains": list(SHORT), "mask_documents": True}
    return config


@pytest.fixture(scope="module")
def masked(short_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return complete(masked_config(short_data, tmp_path_factory.mktemp("masked") / "run"), ranks=1)


def test_reported_losses_are_means_over_targets_of_documents_apart(masked: RunDir) -> None:
    config, summary = masked.config(), masked.summary()
    heldout = held_out_samples(config.data, open_data(config.data), samples_per_domain=4, seed=0, skip=4)
    targets, positions = heldout.batch.targets, heldout.batch.position_ids
    assert positions is not None
    assert (positions == 0).sum() > 2 * len(heldout.batch), "one document a sample: nothing is masked"
    assert targets[:4].max() < targets[4:].min(), "chats have as many targets as notes"
    model = AutoModelForCausalLM.from_pretrained(masked.export).eval()
    sums = sample_loss_sums(model, heldout.batch, 4)
    found = losses_by_domain(sums.numpy(), targets.numpy(), heldout.domain_ids.numpy(), 2)
    assert found.loss.tolist() == pytest.approx([summary.final_loss[name] for name in SHORT], rel=1e-5)
    assert found.stderr.tolist() == pytest.approx([summary.final_stderr[name] for name in SHORT], rel=1e-3)
    whole = sample_loss_sums(model, heldout.batch.of_tokens(heldout.batch.tokens), 4).sum() / targets.sum()
    assert abs(whole - sums.sum() / targets.sum()) > 0.1, "masks change nothing"


def test_a_kill_and_a_move_of_the_data_change_nothing(
    masked: RunDir, short_data: Path, tmp_path: Path
) -> None:
    """The second part reads the same shards as from a store, through a cache and a process of its own."""
    config = masked_config(short_data, tmp_path / "run")
    job = Job(config, ranks=1)
    job.wait_until(lambda: bool(job.run.complete_checkpoints()), "a checkpoint")
    job.kill()
    assert not job.run.summary_file.exists(), "the kill came too late"
    config["data"] |= {"root": f"file://{short_data}", "cache": str(tmp_path / "cache"), "num_workers": 1}
    found = complete(config, ranks=1)
    assert list((tmp_path / "cache").rglob("*.mds")), "nothing was fetched"
    assert masked.mixtures()[1].changed
    assert (curve(found), schedule(found)) == (curve(masked), schedule(masked))
    assert found.eval_lines() == masked.eval_lines()


def test_two_ranks_and_other_micro_batches_train_alike(
    masked: RunDir, short_data: Path, tmp_path: Path
) -> None:
    """Ranks and micro-batches then have other numbers of targets. Before the search, whose result is as exact
    as float32 allows only."""
    config = masked_config(short_data, tmp_path / "run", mixture={"policy": "static"})
    config["train"] |= {"micro_batch_size": 1}
    run = complete(config, ranks=2)
    for found, expected in zip(run.train_lines()[:4], masked.train_lines(), strict=False):
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.domain_loss == pytest.approx(expected.domain_loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)


def test_a_model_that_cannot_keep_documents_apart_is_refused(short_data: Path, tmp_path: Path) -> None:
    """On two ranks, over which it is sharded; before the run directory holds anything."""
    bloom = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2}
    config = masked_config(short_data, tmp_path / "run")
    config["model"] = {"config": bloom, "attention": "eager"}
    job = Job(config, ranks=2)
    assert job.finish() != 0
    assert "BloomForCausalLM with model.attention eager does not keep attention within doc" in job.log()
    assert not job.run.config_file.exists()


def test_a_run_continues_with_another_global_batch_and_a_cap(short_data: Path, tmp_path: Path) -> None:
    """Steps of 8 samples, then of 4, in which a domain is used up and leaves the mixture."""
    config = masked_config(
        short_data,
        tmp_path / "run",
        mixture={"policy": "static"},
        checkpoint={"keep": 9, "interval_steps": 1},
    )
    config["train"]["steps"] = 40
    job = Job(config, ranks=1)
    job.wait_until(lambda: len(job.run.complete_checkpoints()) > 2, "a checkpoint")
    job.kill()
    before = job.run.complete_checkpoints()[-1]
    assert before < 30, "the kill came too late"
    allowed = before * BATCH // 2 + 3
    samples = Catalogue.open(short_data).domains["notes"].splits["train"].samples
    config["train"]["global_batch_size"] = 4
    config["data"] |= {"max_epochs": {"notes": (allowed + 0.5) / samples}, "on_exhausted": "renormalize"}
    run = complete(config, ranks=1)
    after = config["train"]["steps"] - before
    assert [line.tokens for line in run.train_lines()] == (
        np.cumsum([BATCH] * before + [4] * after) * LENGTH
    ).tolist()  # fmt: skip
    read = {name: tokens // LENGTH for name, tokens in run.summary().domain_tokens.items()}
    assert allowed - 2 < read["notes"] <= allowed
    assert sum(read.values()) == BATCH * before + 4 * after
    state = read_record(run.checkpoint(40) / STATE_FILE, TrainerState)
    assert state.global_batch_size == 4
    require_that_loaders_read_the_same(config, [(BATCH, before), (4, after)], state)


def require_that_loaders_read_the_same(
    config: dict, spans: list[tuple[int, int]], state: TrainerState
) -> None:
    """Loaders that hand out ``spans`` of (samples, batches), each from the state of the one before, come to
    the job's own state; what they read of a domain is the beginning of its order, without loss or repeat."""
    catalogue, even = Catalogue.open(Path(config["data"]["root"])), dict.fromkeys(SHORT, 0.5)
    found: dict[str, list] = {name: [] for name in SHORT}
    position = None
    for size, batches in spans:
        loader = open_loader(catalogue, even, size, config["data"]["max_epochs"] if position else None)
        if position is not None:
            loader.load_state_dict(position)
        for loaded in itertools.islice(loader, batches):
            for domain, tokens in zip(loaded.domain_ids.tolist(), loaded.batch.tokens.tolist(), strict=True):
                found[SHORT[domain]].append(tuple(tokens))
        position = loader.state_dict()
    assert position == state.loader
    for name, rows in found.items():
        assert len(rows) == state.domain_tokens[name] // LENGTH
        beginning = next(open_loader(catalogue, {name: 1.0}, len(rows), None)).batch.tokens.tolist()
        assert sorted(rows) == sorted(tuple(tokens) for tokens in beginning)


def open_loader(
    catalogue: Catalogue, weights: dict[str, float], size: int, max_epochs: dict[str, float] | None
) -> MixtureLoader:
    """As a job of seed 0 opens it."""
    return MixtureLoader(
        catalogue, weights, global_batch_size=size, rank=0, world_size=1, seed=derive_seed(0, "data"),
        max_epochs=max_epochs, on_exhausted="renormalize",
    )  # fmt: skip
