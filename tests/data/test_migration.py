"""docs/migration.md holds what it says: its commands are run, its output and its settings are compared.

Of the page's fenced blocks, ``bash`` is run, in order, in one folder; ``text`` is part of what the ``bash``
above it prints, and a line that is cut ends in ``...``; ``yaml`` is ours, unless its first line is a comment;
that, ``sh`` and ``python`` are other systems' and give the weights that ours have to express.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from opmix_dist.config import RunConfig, check_config
from opmix_dist.data.caps import EpochCaps
from opmix_dist.data.catalogue import SPLITS, Catalogue
from opmix_dist.data.loader import MixtureLoader
from opmix_dist.train.policy import chosen_mixture
from tests.data.corpora import read_documents
from tests.data.migration_inputs import CHAT_TEMPLATE, EOS, chats, domain_texts, write_inputs, write_mds
from tests.data.shard_files import write_catalogue
from tests.helpers import ROOT
from tests.pages import Block, compare_shown, read_blocks, run_blocks
from tests.s3_server import S3Server, s3_server

pytestmark = [pytest.mark.launch, pytest.mark.usefixtures("streaming")]

PAGE = ROOT / "docs" / "migration.md"
SYSTEMS = ("Megatron-LM", "OLMo-core", "MosaicML streaming", "Hugging Face datasets")


@dataclass
class Section:
    """A part of the page under one heading."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    def of(self, language: str) -> list[str]:
        return [block.content for block in self.blocks if block.language == language]

    def ours(self) -> dict[str, Any]:
        """The one block of our settings."""
        (content,) = (one for one in self.of("yaml") if not one.startswith("#"))
        return yaml.safe_load(content)

    def theirs(self) -> dict[str, Any]:
        (content,) = (one for one in self.of("yaml") if one.startswith("#"))
        return yaml.safe_load(content)


def read_page() -> dict[str, Section]:
    parts = re.split(r"^## (.*)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    sections = {}
    for title, text in zip(parts[::2], parts[1::2], strict=True):
        sections[title] = Section(title, read_blocks(text))
    return sections


@dataclass(frozen=True)
class Ran:
    """The page after its commands were run in ``folder``."""

    folder: Path
    sections: Mapping[str, Section]

    def config(self, title: str) -> RunConfig:
        """The demo's configuration with a section's settings."""
        settings = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
        for name, changed in self.sections[title].ours().items():
            settings[name] = {**settings[name], **changed}
        return check_config(settings)

    def catalogue(self, title: str) -> Catalogue:
        """What was prepared; before it was uploaded, where that was done."""
        config = self.config(title).data
        root = config.root.replace("s3://corpus/prepared", "data/mosaic")
        return Catalogue.open(self.folder / root, config.domains)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def ran(server: S3Server, streaming: None, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("migration")
    write_inputs(folder)
    server.upload(folder / "mosaic", "mosaic")
    sections = read_page()
    for section in sections.values():
        run_blocks(section.blocks, folder)
    return Ran(folder, sections)


# --- commands ----------------------------------------------------------------------------------------------


def test_every_system_has_a_section_whose_commands_prepare_and_list(ran: Ran) -> None:
    assert list(ran.sections)[: len(SYSTEMS)] == list(SYSTEMS)
    for title in SYSTEMS:
        commands = "".join(ran.sections[title].of("bash"))
        assert "opmix prepare " in commands
        assert "opmix data ls " in commands


def test_what_the_page_prints_below_a_command_is_what_the_command_printed(ran: Ran) -> None:
    compared = sum(compare_shown(section.blocks) for section in ran.sections.values())
    assert compared > 20


def test_the_arguments_that_a_file_of_prefixes_gives_are_those_of_the_command_above(ran: Ran) -> None:
    arguments = (ran.folder / "domains.txt").read_text().split()
    (prepare,) = (one for one in ran.sections["Megatron-LM"].of("bash") if "opmix prepare" in one)
    assert arguments == re.findall(r"--domain|\w+=megatron/\w+", prepare)
    weights = yaml.safe_load((ran.folder / "weights.txt").read_text())
    assert weights == ran.sections["Megatron-LM"].ours()["mixture"]["initial"]


# --- documents ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", SYSTEMS)
def test_the_catalogue_has_every_document_of_the_other_system(ran: Ran, title: str) -> None:
    catalogue = ran.catalogue(title)
    tokenizer = catalogue.load_tokenizer()
    for name in catalogue.names:
        expected = [render(row) for row in chats()] if name == "chat" else domain_texts(name)
        found = []
        for split in SPLITS:
            documents = read_documents(catalogue, name, split)
            found += [tokenizer.decode(ids if name == "chat" else without_eos(ids)) for ids in documents]
        assert Counter(found) == Counter(expected), name


def test_there_are_as_many_tokens_as_ids_in_the_files(ran: Ran) -> None:
    catalogue = ran.catalogue("OLMo-core")
    for name in catalogue.names:
        ids = sum(file.stat().st_size // 4 for file in (ran.folder / "olmo" / name).glob("*.npy"))
        assert sum(split.tokens for split in catalogue.domains[name].splits.values()) == ids


def without_eos(ids: list[int]) -> list[int]:
    """Ids of a document, which has one EOS, at its end."""
    assert ids[-1] == EOS
    assert ids.count(EOS) == 1
    return ids[:-1]


def render(row: Mapping[str, Any]) -> str:
    from jinja2 import Template

    # as transformers sets it up; a trailing line break is the template's own
    return Template(CHAT_TEMPLATE, trim_blocks=True, lstrip_blocks=True).render(row)


# --- settings ----------------------------------------------------------------------------------------------


def megatron_weights(section: Section) -> dict[str, float]:
    """Of ``--data-path WEIGHT PREFIX ...``."""
    words = section.of("sh")[0].split("--data-path")[1].split("--split")[0].split()
    names = [Path(prefix).name.removesuffix("_text_document") for prefix in words[1::2]]
    return dict(zip(names, map(float, words[::2]), strict=True))


def olmo_weights(section: Section) -> dict[str, float]:
    return {one["source_name"]: one["target_ratio"] for one in section.theirs()["sources"]}


def mosaic_weights(section: Section) -> dict[str, float]:
    return {name: one["choose"] for name, one in section.theirs()["dataset"]["streams"].items()}


WEIGHTS: dict[str, Callable[[Section], dict[str, float]]] = {
    "Megatron-LM": megatron_weights,
    "OLMo-core": olmo_weights,
    "MosaicML streaming": mosaic_weights,
}


def row_probabilities(section: Section) -> dict[str, float]:
    """Of the call of ``interleave_datasets``."""
    (call,) = (node for node in ast.walk(ast.parse(section.of("python")[0])) if isinstance(node, ast.Call))
    keywords = {one.arg: one.value for one in call.keywords}
    names = [node.id for node in ast.walk(call.args[0]) if isinstance(node, ast.Name)]
    return dict(zip(names, ast.literal_eval(keywords["probabilities"]), strict=True))


@pytest.mark.parametrize("title", WEIGHTS)
def test_the_mixture_is_the_other_systems_weights_over_their_sum(ran: Ran, title: str) -> None:
    theirs = WEIGHTS[title](ran.sections[title])
    expected = {name: weight / sum(theirs.values()) for name, weight in theirs.items()}
    assert chosen_mixture(ran.config(title).mixture.initial, ran.catalogue(title)) == pytest.approx(expected)


def test_shares_of_rows_become_shares_of_samples(ran: Ran) -> None:
    """So that a run reads as many documents of each domain as ``interleave_datasets`` would have given."""
    title = "Hugging Face datasets"
    catalogue = ran.catalogue(title)
    weights = chosen_mixture(ran.config(title).mixture.initial, catalogue)
    splits = {name: catalogue.domains[name].splits["train"] for name in catalogue.names}
    rows = {name: weights[name] * splits[name].documents / splits[name].samples for name in weights}
    found = {name: count / sum(rows.values()) for name, count in rows.items()}
    assert found == pytest.approx(row_probabilities(ran.sections[title]), rel=1e-4)


@pytest.mark.parametrize("title", SYSTEMS)
def test_a_loader_hands_the_domains_out_as_the_settings_say(ran: Ran, title: str) -> None:
    config, catalogue = ran.config(title), ran.catalogue(title)
    weights = chosen_mixture(config.mixture.initial, catalogue)
    batches = MixtureLoader(catalogue, weights, global_batch_size=4, rank=0, world_size=1, seed=config.seed)
    for batch in islice(batches, 5):
        assert batch.batch.tokens.shape == (4, 256)
    assert batches.counts() == pytest.approx([20 * weights[name] for name in catalogue.names], abs=1)


def test_repetition_ratios_are_caps_on_epochs(ran: Ran) -> None:
    catalogue, data = ran.catalogue("OLMo-core"), ran.config("OLMo-core").data
    assert isinstance(data.max_epochs, dict)
    totals = catalogue.samples("train")
    caps = EpochCaps(catalogue.names, totals, data.max_epochs, on_exhausted=data.on_exhausted)
    sources = {one["source_name"]: one for one in ran.sections["OLMo-core"].theirs()["sources"]}
    ratios = [sources[name].get("max_repetition_ratio", 1.0) for name in catalogue.names]
    assert caps.samples.tolist() == (totals * ratios).tolist()


# --- proportions that change on resume ---------------------------------------------------------------------

SEEN, NEXT, EPOCH = 2_000, 1_000, 10_000
_STREAMING = f"""
from itertools import islice
from opmix_dist.data.mds import import_streaming
import_streaming()
from streaming import Stream, StreamingDataset

def dataset(share):
    streams = [Stream(local="a", proportion=share), Stream(local="b", proportion=1 - share)]
    return StreamingDataset(
        streams=streams, epoch_size={EPOCH}, batch_size=10, shuffle=True, num_canonical_nodes=1
    )

for share in (0.5, 0.8):
    first = dataset(0.5)
    seen = [row["id"] for row in islice(iter(first), {SEEN})]
    state = first.state_dict({SEEN}, False)
    del first
    second = dataset(share)
    second.load_state_dict(state)
    later = [row["id"] for row in islice(iter(second), {NEXT})]
    del second
    print(len(seen) + len(later) - len({{*seen, *later}}))
"""


def test_changed_proportions_repeat_samples_there_as_the_page_says(tmp_path: Path) -> None:
    for name in "ab":
        write_mds(tmp_path / name, {"id": "str"}, ({"id": f"{name}{i}"} for i in range(EPOCH)))
    single = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _STREAMING],
        cwd=tmp_path,
        env={**os.environ, **single, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    unchanged, changed = map(int, done.stdout.split()[-2:])
    said = (
        f"Of the next 1,000 samples, {changed} had been seen; with the proportions left alone, {unchanged}."
    )
    assert said in " ".join(PAGE.read_text(encoding="utf-8").split())
    assert changed > 0


def test_changed_weights_repeat_nothing_here(tmp_path: Path) -> None:
    catalogue = write_catalogue(tmp_path, {"a": EPOCH, "b": EPOCH}, per_shard=500)
    first, second = even_loader(catalogue), even_loader(catalogue)
    drawn = rows(first, SEEN // 50)
    second.load_state_dict(first.state_dict())
    second.set_weights({"a": 0.8, "b": 0.2})
    drawn += rows(second, NEXT // 50)
    assert len(drawn) == len(set(drawn)) == SEEN + NEXT
    assert second.counts().tolist() == [1000 + 800, 1000 + 200]


def even_loader(catalogue: Catalogue) -> MixtureLoader:
    weights = {"a": 0.5, "b": 0.5}
    return MixtureLoader(catalogue, weights, global_batch_size=50, rank=0, world_size=1, seed=0)


def rows(loader: MixtureLoader, batches: int) -> list[tuple[int, ...]]:
    """Domain and tokens of each sample."""
    return [
        (domain, *tokens)
        for loaded in islice(loader, batches)
        for domain, tokens in zip(loaded.domain_ids.tolist(), loaded.batch.tokens.tolist(), strict=True)
    ]
