"""``opmix prepare`` end to end: what is on disk decodes to the sources, whatever happens on the way."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from rich.console import Console

from opmix_dist.data.catalogue import Catalogue, Split, check_domain_name, tokenizer_fingerprint
from opmix_dist.data.ingest import PrepareConfig, prepare
from opmix_dist.data.mds import import_streaming
from opmix_dist.data.sources import FileSource, parse_domains
from opmix_dist.data.survey import document_digest, survey
from opmix_dist.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer, vocab_size
from opmix_dist.errors import UserError

T = 16
SILENT = Console(file=io.StringIO())


def make_texts(seed: int, count: int, words: int = 60) -> list[str]:
    """Distinct documents with odd white space and characters of one to four bytes."""
    rng = np.random.default_rng(seed)
    vocabulary = ["alpha", "bêta", "γάμμα", "delta\n", "  eps", "😀", "7", "zeta", END_OF_TEXT]
    return [f"{seed}.{number} " + " ".join(rng.choice(vocabulary, words).tolist()) for number in range(count)]


def write_texts(folder: Path, texts: Sequence[str]) -> str:
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number:05}.txt").write_text(text, encoding="utf-8", newline="")
    return str(folder)


def config(out: Path, domains: dict[str, list[str]], **settings: object) -> PrepareConfig:
    plain = {"vocab_size": 300, "sequence_length": T, "eval_fraction": 0.2, "workers": 1}
    return PrepareConfig(out=out, domains=domains, **{**plain, **settings})


def read_tokens(catalogue: Catalogue, name: str, split: Split) -> np.ndarray:
    """All tokens of a split, [samples * T], through streaming's own reader."""
    import_streaming()
    from streaming.base.format import reader_from_json

    folder = catalogue.split_dir(name, split)
    index = json.loads((folder / "index.json").read_text())
    shards = [reader_from_json(str(folder.parent), folder.name, shard) for shard in index["shards"]]
    return np.concatenate([shard[i]["tokens"] for shard in shards for i in range(shard.samples)])


def digests(root: Path) -> dict[str, str]:
    """Every file's path and hash, hidden ones included."""
    files = (file for file in root.rglob("*") if file.is_file())
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def corpus(streaming: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("corpus")
    return {name: [write_texts(folder / name, make_texts(seed, 80))] for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def prepared(corpus: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return prepare(config(tmp_path_factory.mktemp("data"), corpus), SILENT)


# --- content -----------------------------------------------------------------------------------------------


def test_shards_decode_to_the_documents_each_with_eos(prepared: Catalogue) -> None:
    tokenizer = prepared.load_tokenizer()
    for seed, name in enumerate(prepared.names):
        texts = make_texts(seed, 80)
        found = survey(texts, set(), seed=0, eval_fraction=0.2, max_eval=None)
        info = prepared.domains[name]
        dropped = 0
        for split in ("train", "eval"):
            held = [text for text, chosen in zip(texts, found.splits(), strict=True) if chosen == split]
            tokens = read_tokens(prepared, name, split)
            decoded = tokenizer.decode(tokens)
            wanted = "".join(text + END_OF_TEXT for text in held)
            # The tail that fills no sample is missing; it may cut a character, which decodes to U+FFFD.
            assert wanted.startswith(decoded.rstrip("\ufffd"))
            assert len(wanted.encode()) - len(decoded.encode()) < 20 * T
            assert tokens.dtype == np.uint16
            assert len(tokens) == info.splits[split].tokens == info.splits[split].samples * T
            assert info.splits[split].documents == len(held)
            dropped += len(wanted) > len(decoded)
        assert 0 < info.tokens_dropped < 2 * T
        assert dropped


def test_a_document_that_writes_the_end_token_does_not_end_there(prepared: Catalogue) -> None:
    eos = prepared.load_tokenizer().eos_token_id
    for name in prepared.names:
        for split in ("train", "eval"):
            ends = int((read_tokens(prepared, name, split) == eos).sum())
            documents = prepared.domains[name].splits[split].documents
            assert documents - 1 <= ends <= documents  # the last end may lie in the dropped tail


def test_bytes_do_not_depend_on_the_number_of_workers(
    prepared: Catalogue, corpus: dict[str, list[str]], tmp_path: Path
) -> None:
    prepare(config(tmp_path / "two", corpus, workers=2), SILENT)
    assert digests(tmp_path / "two") == digests(prepared.root)


def test_compressed_lines_and_parquet_equal_text_files(tmp_path: Path) -> None:
    texts = make_texts(5, 40)
    lines = [json.dumps({"id": i, "body": text}).encode() + b"\n" for i, text in enumerate(texts)]
    half = len(lines) // 2
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    frames = [zstandard.compress(b"".join(part)) for part in (lines[:half], lines[half:])]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))  # what parallel compressors write
    parquet.write_table(pa.table({"body": texts, "id": range(40)}), tmp_path / "d.parquet", row_group_size=7)
    plain = list(FileSource([write_texts(tmp_path / "plain", texts)]).documents())
    assert plain == texts
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        assert list(FileSource([str(tmp_path / name)], "body").documents()) == texts, name


def test_globs_and_folders_are_sorted_and_counted_once(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "t", ["zero", "one"])
    source = FileSource([f"{folder}/*1.txt", folder, f"{folder}/00000.txt"])
    assert list(source.documents()) == ["zero", "one"]


# --- duplicates and splits ---------------------------------------------------------------------------------


def test_a_document_stays_in_the_first_domain_only() -> None:
    seen: set[bytes] = set()
    first = survey(["x y", "x  y\n", " ", "z"], seen, seed=0, eval_fraction=0.5, max_eval=None)
    second = survey(["z ", "w", "x\ty"], seen, seed=0, eval_fraction=0.5, max_eval=None)
    assert (first.documents, first.duplicates, first.empty) == (2, 1, 1)
    assert list(first.kept(["x y", "x  y\n", " ", "z"])) == ["x y", "z"]
    assert (second.documents, second.duplicates, second.empty) == (1, 2, 0)
    assert list(second.kept(["z ", "w", "x\ty"])) == ["w"]


def test_duplicates_are_counted_on_disk(corpus: dict[str, list[str]], tmp_path: Path) -> None:
    repeated = write_texts(tmp_path / "c", make_texts(0, 3) + make_texts(7, 60))
    catalogue = prepare(config(tmp_path / "out", {"a": corpus["a"], "c": [repeated]}), SILENT)
    assert catalogue.domains["a"].documents_duplicate == 0
    assert catalogue.domains["c"].documents_duplicate == 3


@given(st.permutations(list(range(40))), st.integers(0, 2**63 - 1), st.none() | st.integers(1, 5))
def test_the_split_follows_content_and_not_order(order: list[int], seed: int, max_eval: int | None) -> None:
    texts = [f"document {number}" for number in range(40)]

    def held_out(documents: list[str]) -> set[str]:
        found = survey(documents, set(), seed=seed, eval_fraction=0.3, max_eval=max_eval)
        train = set(found.train(documents))
        assert len(train) + sum(split == "eval" for split in found.splits()) == 40
        return set(documents) - train

    shuffled = held_out([texts[i] for i in order])
    assert shuffled == held_out(texts)
    assert max_eval is None or len(shuffled) <= max_eval


def test_the_held_out_share_is_the_one_asked_for() -> None:
    """10,000 draws at 0.05: 500 expected, standard deviation 21.8; the bound is five of them."""
    found = survey(map(str, range(10_000)), set(), seed=3, eval_fraction=0.05, max_eval=None)
    assert abs(sum(split == "eval" for split in found.splits()) - 500) < 109
    capped = survey(map(str, range(10_000)), set(), seed=3, eval_fraction=0.05, max_eval=100)
    assert sum(split == "eval" for split in capped.splits()) == 100


@given(
    st.lists(st.sampled_from(["a", "b"]), min_size=1),
    st.lists(st.sampled_from([" ", "\n", "\t"]), min_size=1),
)
def test_white_space_does_not_hide_a_duplicate(words: list[str], spaces: list[str]) -> None:
    stretched = "".join(word + "".join(spaces) for word in words)
    assert document_digest(stretched) == document_digest(" ".join(words))


# --- interruption and reruns -------------------------------------------------------------------------------

RUN = """
import sys
from pathlib import Path
from opmix_dist.data.ingest import PrepareConfig, prepare
a, b, out = sys.argv[1:]
prepare(PrepareConfig(out=Path(out), domains={"a": [a], "b": [b]}, vocab_size=300, sequence_length=16,
                      eval_fraction=0.2, workers=1))
"""


def test_a_killed_run_leaves_no_half_domain_and_no_process_and_repeats_to_the_same_bytes(
    corpus: dict[str, list[str]], tmp_path: Path
) -> None:
    big = write_texts(tmp_path / "big", make_texts(9, 500, words=500))
    domains = {"a": corpus["a"], "b": [big]}
    out = tmp_path / "killed"
    command = [sys.executable, "-c", RUN, corpus["a"][0], big, str(out)]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: (out / "a").exists() and (out / ".b.tmp" / "train").exists())
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert Catalogue.open(out).names == ("a",)
    wait_until(lambda: not group_lives(child.pid))
    finished = (out / "a" / "domain.json").stat().st_mtime_ns
    for folder in (out, tmp_path / "whole"):
        prepare(config(folder, domains), SILENT)
    assert (out / "a" / "domain.json").stat().st_mtime_ns == finished
    assert digests(out) == digests(tmp_path / "whole")


def wait_until(happened: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_finished_domain_is_kept_or_refused_or_replaced(
    corpus: dict[str, list[str]], tmp_path: Path
) -> None:
    out, only_a = tmp_path / "out", {"a": corpus["a"]}
    before = prepare(config(out, only_a), SILENT)
    said = io.StringIO()
    prepare(config(out, only_a), Console(file=said))
    assert said.getvalue() == "a: already prepared\n"
    with pytest.raises(UserError, match="another `eval_fraction`: pass --overwrite"):
        prepare(config(out, only_a, eval_fraction=0.4), SILENT)
    with pytest.raises(UserError, match="domain a with another `sequence_length`: pass another --out"):
        prepare(config(out, {"b": corpus["b"]}, sequence_length=T + 1), SILENT)
    after = prepare(config(out, only_a, eval_fraction=0.4, overwrite=True), SILENT)
    assert after.samples("eval")[0] > before.samples("eval")[0]
    assert not list(out.glob(".*"))


def test_a_new_domain_takes_the_tokenizer_of_those_that_are_there(
    prepared: Catalogue, corpus: dict[str, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare(config(out, {"a": corpus["a"]}), SILENT)
    alone = tokenizer_fingerprint(out / "tokenizer")
    both = prepare(config(out, corpus), SILENT)
    assert both.tokenizer_fingerprint == alone != prepared.tokenizer_fingerprint


@pytest.mark.usefixtures("streaming")
def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "t", make_texts(0, 60))
    prepare(config(tmp_path / "out", {"a": [folder]}), SILENT)
    (Path(folder) / "99999.txt").write_text("one more")
    with pytest.raises(UserError, match="another `files`"):
        prepare(config(tmp_path / "out", {"a": [folder]}), SILENT)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow past 12,000 bytes: a write beyond fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("streaming", "small_files")
def test_a_failed_write_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    sources = {"a": [write_texts(tmp_path / "a", make_texts(0, 20, words=20))],
               "b": [write_texts(tmp_path / "b", make_texts(1, 200))]}  # fmt: skip
    with pytest.raises(UserError, match=r"cannot write .*/out/b: File too large"):
        prepare(config(tmp_path / "out", sources, vocab_size=260), SILENT)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "tokenizer"]
    with pytest.raises(UserError, match=r"cannot write .*/big/tokenizer: File too large"):
        prepare(config(tmp_path / "big", sources, vocab_size=900), SILENT)
    assert not list((tmp_path / "big").iterdir())


def test_a_folder_of_the_users_own_is_never_replaced(corpus: dict[str, list[str]], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="is in the way"):
        prepare(config(tmp_path, {"a": corpus["a"]}, overwrite=True), SILENT)


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not valid JSON"),
        (b'{"body": "x"}', "no field 'text'"),
        (b'["x"]', "no field 'text'"),
        (b'{"text": 3}', "is int, not text"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"text": "\xff"}', "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
    ],
)
def test_a_malformed_line_names_file_and_line(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(UserError) as caught:
        list(FileSource([str(file)]).documents())
    assert str(caught.value).startswith(f"{file}:3")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_cut_off_file_is_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x{suffix}"
    line = b'{"text": "some text that goes on"}\n'
    if suffix == ".parquet":
        parquet.write_table(pa.table({"text": ["a", "b"]}), file)
    else:
        file.write_bytes((gzip if suffix.endswith("gz") else zstandard).compress(line * 999))
    file.write_bytes(file.read_bytes()[:-6])
    with pytest.raises(UserError, match=str(file)):
        list(FileSource([str(file)]).documents())


def test_sources_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    parquet.write_table(pa.table({"body": ["a", None]}), tmp_path / "t.parquet")
    for name, field, reason in [
        ("latin.txt", "text", "not UTF-8 text .byte 0."),
        ("absent/*.txt", "text", "matches no file"),
        ("t.parquet", "text", "no column 'text', but body"),
        ("t.parquet", "body", "row 2: 'body' is NoneType"),
    ]:
        with pytest.raises(UserError, match=reason):
            list(FileSource([str(tmp_path / name)], field).documents())


HOSTILE = ["..", ".", "", "../x", "a/b", "/etc", ".hidden", "-flag", "a\n", "a b", "x" * 65, "tokenizer", "é"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_domain_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot name a domain"):
        check_domain_name(name)
    with pytest.raises(UserError, match="cannot name a domain"):
        config(tmp_path, {name: ["x"]})


def test_domain_arguments() -> None:
    assert parse_domains(["w=a/*.x", "w=b", "c.d=e=f"]) == {"w": ["a/*.x", "b"], "c.d": ["e=f"]}
    for bad in ("w", "w=", "../w=a"):
        with pytest.raises(UserError):
            parse_domains([bad])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"eval_fraction": 1.0}, "--eval-fraction"),
        ({"sequence_length": 1}, "--sequence-length"),
        ({"vocab_size": 256}, "--vocab-size"),
        ({"workers": 0}, "--workers"),
        ({"seed": -1}, "--seed"),
        ({"builtin": True}, "--builtin"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        config(Path("out"), {"a": ["x"]}, **settings)


@pytest.mark.usefixtures("streaming")
def test_too_little_text_for_one_sample_is_refused(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "t", make_texts(0, 20))
    with pytest.raises(UserError, match=r"empty domain: a has .* eval documents"):
        prepare(config(tmp_path / "out", {"a": [folder]}, eval_fraction=1e-9), SILENT)
    assert not (tmp_path / "out" / "a").exists()


# --- the catalogue -----------------------------------------------------------------------------------------


def test_the_catalogue_describes_what_was_written(prepared: Catalogue) -> None:
    catalogue = Catalogue.open(prepared.root)
    assert catalogue.names == ("a", "b")
    assert Catalogue.open(prepared.root, ["b", "a"]).names == ("b", "a")
    assert catalogue.sequence_length == T
    assert catalogue.vocab_size == len(catalogue.load_tokenizer()) == 300
    assert catalogue.samples("train").tolist() == [
        catalogue.domains[name].splits["train"].samples for name in "ab"
    ]


@pytest.fixture
def copy(prepared: Catalogue, tmp_path: Path) -> Path:
    """A folder whose ``domain.json`` files may be spoilt."""
    for name in prepared.names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "domain.json").write_bytes((prepared.root / name / "domain.json").read_bytes())
    (tmp_path / "tokenizer").symlink_to(prepared.root / "tokenizer")
    return tmp_path


def spoil(root: Path, domain: str, changes: dict[str, object]) -> None:
    file = root / domain / "domain.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


EMPTY_SPLIT = {"samples": 0, "tokens": 0, "documents": 0}
FULL_SPLIT = {"samples": 1, "tokens": T, "documents": 1}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer_fingerprint": "0" * 64}, "domain b was tokenised with another tokenizer"),
        ({"sequence_length": 32}, "domain b has samples of 32 tokens, others of 16"),
        ({"splits": {"train": FULL_SPLIT, "eval": EMPTY_SPLIT}}, "empty domain: b .* eval split"),
        ({"splits": {"train": FULL_SPLIT}}, r"splits \['train'\]"),
        ({"name": "a"}, "describes 'a'"),
        ({"format_version": 2}, "`format_version`"),
        ({"unheard_of": 1}, "`unheard_of`"),
        ({"settings": {"x": "y" * (1 << 20)}}, "larger than"),
    ],
)
def test_domains_that_do_not_fit_are_refused(copy: Path, changes: dict[str, object], reason: str) -> None:
    assert Catalogue.open(copy).names == ("a", "b")
    spoil(copy, "b", changes)
    with pytest.raises(UserError, match=reason):
        Catalogue.open(copy)
    assert Catalogue.open(copy, ["a"]).names == ("a",)


def test_missing_things_are_named(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match="no domain 'bb': the nearest is `b`"):
        Catalogue.open(copy, ["a", "bb"])
    with pytest.raises(UserError, match=r"no domain '\.\./a'"):
        Catalogue.open(copy, ["../a"])
    with pytest.raises(UserError, match="is no folder"):
        Catalogue.open(copy / "absent")
    with pytest.raises(UserError, match="holds no domain"):
        Catalogue.open(tmp_path_factory.mktemp("empty"))
    (copy / "b" / "domain.json").write_text("{")
    with pytest.raises(UserError, match=r"b/domain.json is not valid JSON"):
        Catalogue.open(copy)


# --- the tokenizer -----------------------------------------------------------------------------------------


def test_the_fingerprint_survives_save_and_load_and_sees_a_changed_vocabulary(tmp_path: Path) -> None:
    texts = make_texts(0, 30)
    train_tokenizer(texts, 300).save_pretrained(tmp_path / "one")
    train_tokenizer(texts, 300).save_pretrained(tmp_path / "same")
    loaded = load_tokenizer(str(tmp_path / "one"))
    loaded("cut", truncation=True, max_length=1)  # leaves its truncation in tokenizer.json
    loaded.save_pretrained(tmp_path / "again")
    train_tokenizer(texts, 299).save_pretrained(tmp_path / "other")
    prints = {name: tokenizer_fingerprint(tmp_path / name) for name in ("one", "same", "again", "other")}
    assert prints["one"] == prints["same"] == prints["again"] != prints["other"]


@given(st.text())
def test_every_text_decodes_to_itself(text: str) -> None:
    assert _TOKENIZER.decode(_TOKENIZER.encode(text)) == text


_TOKENIZER = train_tokenizer(make_texts(0, 10), 280)


def test_a_loaded_tokenizer_is_used_as_it_is(corpus: dict[str, list[str]], tmp_path: Path) -> None:
    _TOKENIZER.save_pretrained(tmp_path / "mine")
    settings = {"tokenizer": str(tmp_path / "mine"), "vocab_size": 5000}
    catalogue = prepare(config(tmp_path / "out", {"a": corpus["a"]}, **settings), SILENT)
    assert catalogue.tokenizer_fingerprint == tokenizer_fingerprint(tmp_path / "mine")
    assert catalogue.vocab_size == vocab_size(_TOKENIZER) == 280


def test_a_tokenizer_without_eos_or_not_there_is_refused(tmp_path: Path) -> None:
    mute = train_tokenizer(["text"], 280)
    mute.eos_token = None
    mute.save_pretrained(tmp_path / "mute")
    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(str(tmp_path / "mute"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(str(tmp_path / "empty"))
