"""``opmix prepare`` end to end: what is on disk decodes to the sources."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from opmix_dist.data.catalogue import Catalogue, SourceInfo, check_domain_name, tokenizer_fingerprint
from opmix_dist.data.chat import require_syntax
from opmix_dist.data.ingest import prepare
from opmix_dist.data.survey import document_digest
from opmix_dist.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer, vocab_size
from opmix_dist.errors import UserError
from tests.data.corpora import (
    CHAT_TEMPLATE,
    SILENT,
    T,
    chat,
    config,
    digests,
    make_texts,
    read_documents,
    read_samples,
    write_lines,
    write_texts,
)


@pytest.fixture(scope="module")
def corpus(streaming: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("corpus")
    return {
        "a": [write_lines(folder / "a", make_texts(0, 80), files=6)],
        "b": [write_texts(folder / "b", make_texts(1, 80))],
    }


@pytest.fixture(scope="module")
def prepared(corpus: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return prepare(config(tmp_path_factory.mktemp("data"), corpus, shard_bytes=4_000), SILENT)


# --- content -----------------------------------------------------------------------------------------------


def test_samples_give_every_document_back_each_with_eos(prepared: Catalogue) -> None:
    """Nothing is lost: train and eval together are the corpus, in its order within each split."""
    tokenizer = prepared.load_tokenizer()
    for seed, name in enumerate(prepared.names):
        texts, info = make_texts(seed, 80), prepared.domains[name]
        found = {split: read_documents(prepared, name, split) for split in ("train", "eval")}
        decoded = {split: [tokenizer.decode(ids) for ids in ids_of] for split, ids_of in found.items()}
        assert sorted(decoded["train"] + decoded["eval"]) == sorted(text + END_OF_TEXT for text in texts)
        for split, documents in decoded.items():
            assert documents == [text + END_OF_TEXT for text in texts if text + END_OF_TEXT in documents]
            samples = read_samples(prepared, name, split)
            lengths = [len(sample.tokens) for sample in samples]
            assert lengths[:-1] == [T] * (len(samples) - 1)
            assert 0 < lengths[-1] <= T
            assert all(sample.tokens.dtype == np.uint16 and sample.spans is None for sample in samples)
            size = info.splits[split]
            assert (size.samples, size.tokens) == (len(samples), sum(lengths))
            assert size.documents == len(documents)
        assert info.tokens_dropped == 0


def test_a_document_that_writes_the_end_token_does_not_end_there(prepared: Catalogue) -> None:
    eos = prepared.load_tokenizer().eos_token_id
    for name in prepared.names:
        documents = read_documents(prepared, name, "train")
        assert all(ids.index(eos) == len(ids) - 1 for ids in documents)


def test_shards_are_cut_and_hashed(prepared: Catalogue) -> None:
    index = json.loads((prepared.split_dir("a", "train") / "index.json").read_text())
    assert len(index["shards"]) > 3
    assert all(shard["raw_data"]["bytes"] < 2 * 4_000 for shard in index["shards"])
    assert all("xxh3_128" in shard["raw_data"]["hashes"] for shard in index["shards"])


@pytest.mark.parametrize("settings", [{"workers": 2}, {"record_seconds": 0.0}])
def test_bytes_depend_on_neither_the_workers_nor_the_records(
    prepared: Catalogue, corpus: dict[str, list[str]], tmp_path: Path, settings: dict[str, float]
) -> None:
    prepare(config(tmp_path / "again", corpus, shard_bytes=4_000, **settings), SILENT)
    assert digests(tmp_path / "again") == digests(prepared.root)


def test_compressed_shards_hold_the_same(
    prepared: Catalogue, corpus: dict[str, list[str]], tmp_path: Path
) -> None:
    zipped = prepare(config(tmp_path / "zstd", corpus, shard_bytes=4_000, compression="zstd"), SILENT)
    names = {file.name for file in (zipped.root / "a" / "train").glob("shard*")}
    index = json.loads((zipped.root / "a" / "train" / "index.json").read_text())
    assert names == {shard["zip_data"]["basename"] for shard in index["shards"]}
    assert all(name.endswith(".mds.zstd") for name in names)
    for shard in index["shards"]:
        folder = zipped.root / "a" / "train"
        packed = (folder / shard["zip_data"]["basename"]).read_bytes()
        (folder / shard["raw_data"]["basename"]).write_bytes(zstandard.decompress(packed))
    assert read_documents(zipped, "a", "train") == read_documents(prepared, "a", "train")


def test_the_files_that_were_read_are_listed(prepared: Catalogue, corpus: dict[str, list[str]]) -> None:
    texts, folder = make_texts(0, 80), Path(corpus["a"][0])
    lines = (prepared.root / "a" / "sources.jsonl").read_bytes()
    found = [SourceInfo.model_validate_json(line) for line in lines.splitlines()]
    assert [info.name for info in found] == [str(folder / f"{number:03}.jsonl") for number in range(6)]
    assert [info.documents for info in found] == [14, 14, 13, 13, 13, 13]
    assert found[1].bytes == (folder / "001.jsonl").stat().st_size
    of_second = b"".join(document_digest(text) for text in texts[14:28])
    assert found[1].sha256 == hashlib.sha256(of_second).hexdigest()
    assert prepared.domains["a"].sources_sha256 == hashlib.sha256(lines).hexdigest()
    kept = (prepared.root / "a" / "digests.bin").read_bytes()
    assert kept == b"".join(document_digest(text) for text in texts)
    assert prepared.domains["a"].digests_sha256 == hashlib.sha256(kept).hexdigest()


def test_a_store_is_read_by_the_process_that_has_its_credentials(streaming: None, tmp_path: Path) -> None:
    """fsspec's memory:// exists in one process only: workers get bytes, never a URL to open."""
    texts = make_texts(4, 30)
    for number in range(3):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[number::3])
        fsspec.filesystem("memory").pipe(f"/ingest/{number}.jsonl.gz", gzip.compress(lines.encode()))
    catalogue = prepare(config(tmp_path, {"a": ["memory://ingest/*.jsonl.gz"]}, workers=2), SILENT)
    size = catalogue.domains["a"].splits
    assert size["train"].documents + size["eval"].documents == 30
    listed = (tmp_path / "a" / "sources.jsonl").read_text().splitlines()
    names = [json.loads(line)["name"].rpartition("ingest/")[2] for line in listed]
    assert names == ["0.jsonl.gz", "1.jsonl.gz", "2.jsonl.gz"]


def test_few_tokens_make_one_short_sample(streaming: None, tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "t", ["one", "two", "three"])
    catalogue = prepare(
        config(tmp_path / "out", {"a": [folder]}, sequence_length=512, eval_documents=1), SILENT
    )
    assert catalogue.samples("train").tolist() == catalogue.samples("eval").tolist() == [1]
    assert len(read_documents(catalogue, "a", "train")) == 2


# --- what is left out, and what is held out ----------------------------------------------------------------


def test_duplicates_over_domains_and_runs_are_counted(corpus: dict[str, list[str]], tmp_path: Path) -> None:
    """A finished domain counts by its digests: its source is not even there any more."""
    first = {"a": [write_texts(tmp_path / "first", make_texts(0, 80))]}
    repeated = write_texts(tmp_path / "c", make_texts(0, 3) + make_texts(7, 60) + [" \n"])
    together = prepare(config(tmp_path / "one", {**first, "c": [repeated]}), SILENT)
    prepare(config(tmp_path / "two", first), SILENT)
    for file in Path(first["a"][0]).iterdir():
        file.write_bytes(b"x" * file.stat().st_size)  # what a second reading would find
    apart = prepare(config(tmp_path / "two", {**first, "c": [repeated]}), SILENT)
    for catalogue in (together, apart):
        info = catalogue.domains["c"]
        assert (info.documents_duplicate, info.documents_empty) == (3, 1)
        assert info.splits["train"].documents + info.splits["eval"].documents == 60


def test_a_damaged_list_of_digests_is_refused(corpus: dict[str, list[str]], tmp_path: Path) -> None:
    prepare(config(tmp_path, {"a": corpus["a"]}), SILENT)
    (tmp_path / "a" / "digests.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"a/digests.bin is missing or damaged: prepare a again"):
        prepare(config(tmp_path, corpus), SILENT)


def test_exactly_so_many_documents_are_held_out(corpus: dict[str, list[str]], tmp_path: Path) -> None:
    catalogue = prepare(config(tmp_path / "out", corpus, eval_documents=13), SILENT)
    assert [catalogue.domains[name].splits["eval"].documents for name in "ab"] == [13, 13]
    with pytest.raises(UserError, match="domain a has 80 documents, not more than the 80 to hold out"):
        prepare(config(tmp_path / "all", corpus, eval_documents=80), SILENT)


def test_documents_that_share_words_with_evaluation_texts_are_dropped(
    streaming: None, tmp_path: Path
) -> None:
    texts = make_texts(0, 60)
    leak = "the answer to the first question of the test is forty two"
    spoilt = [f"{texts[0]} {leak.upper()}!", f"see:\n{leak}", leak.replace("first", "second")]
    folder = write_texts(tmp_path / "t", texts + spoilt)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"text": f"Q: {leak}, they say"}) + "\n")
    said = io.StringIO()
    settings = {"decontaminate": [str(tmp_path / "eval.jsonl")], "decontaminate_ngram": 8}
    catalogue = prepare(config(tmp_path / "out", {"a": [folder]}, **settings), Console(file=said, width=200))
    decode = catalogue.load_tokenizer().decode
    kept = [decode(ids) for split in ("train", "eval") for ids in read_documents(catalogue, "a", split)]
    assert sorted(kept) == sorted(text + END_OF_TEXT for text in [*texts, spoilt[2]])
    assert catalogue.domains["a"].documents_contaminated == 2
    assert "2 documents with words of the evaluation texts dropped" in said.getvalue()
    with pytest.raises(UserError, match="another `decontaminate_ngram`"):
        prepare(config(tmp_path / "out", {"a": [folder]}, **{**settings, "decontaminate_ngram": 9}), SILENT)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"text": "other words that nobody shares here"}) + "\n")
    with pytest.raises(UserError, match="another `decontaminate`"):
        prepare(config(tmp_path / "out", {"a": [folder]}, **settings), SILENT)


def test_a_split_without_documents_is_refused(streaming: None, tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "t", make_texts(0, 20))
    with pytest.raises(UserError, match="empty domain: a has 20 documents to train on and 0 held out"):
        prepare(config(tmp_path / "out", {"a": [folder]}, eval_fraction=1e-9), SILENT)
    assert not (tmp_path / "out" / "a").exists()


# --- chats and token ids -----------------------------------------------------------------------------------


def test_chats_are_fitted_whole_with_what_is_learnt(streaming: None, tmp_path: Path) -> None:
    chats = [chat(f"q{number}", *[f"answer {number}"] * (1 + number % 3)) for number in range(60)]
    long = chat("a question that is longer than a sample " * 20, "never seen")
    cut = chat("q", "seen " * 200)
    folder = write_lines(tmp_path / "t", [*chats, long, cut, chats[0]], files=3)
    (tmp_path / "template").write_text(CHAT_TEMPLATE)
    settings = {"chat_domains": ["c"], "chat_template": tmp_path / "template", "sequence_length": 128}
    catalogue = prepare(config(tmp_path / "out", {"c": [folder]}, **settings), SILENT)
    info, tokenizer = catalogue.domains["c"], catalogue.load_tokenizer()
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (info.packing, info.documents_duplicate, info.documents_unlearnt) == ("best_fit", 1, 1)
    documents, learnt = [], []
    for split in ("train", "eval"):
        for sample in read_samples(catalogue, "c", split):
            assert sample.spans is not None
            assert len(sample.tokens) <= 128
            learnt += [tokenizer.decode(sample.tokens[a:b]) for a, b in sample.spans]
        documents += [tokenizer.decode(ids) for ids in read_documents(catalogue, "c", split)]
    whole = [tokenizer.apply_chat_template(one["messages"], tokenize=False) for one in chats]
    assert set(whole) < set(documents)
    assert len(documents) == 61
    short = [answer.strip() for answer in learnt if not answer.strip().startswith("seen")]
    assert sorted(short) == sorted(
        m["content"] for one in chats for m in one["messages"] if m["role"] != "user"
    )
    rendered = [len(tokenizer(tokenizer.apply_chat_template(one["messages"], tokenize=False)).input_ids)
                for one in (long, cut)]  # fmt: skip
    assert info.tokens_dropped == sum(rendered) - 2 * 128
    tokens = sum(info.splits[split].tokens for split in ("train", "eval"))
    samples = sum(info.splits[split].samples for split in ("train", "eval"))
    assert tokens / samples > 0.8 * 128


def test_a_chat_that_forges_a_turn_is_named_with_its_file(streaming: None, tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "t", [chat("q", "a"), chat(f"x{END_OF_TEXT}", "b")] * 9, files=1)
    (tmp_path / "template").write_text(CHAT_TEMPLATE)
    settings = {"chat_domains": ["c"], "chat_template": tmp_path / "template", "eval_documents": 1}
    with pytest.raises(UserError, match=r"000.jsonl: the conversation that begins 'x<|endoftext|>' writes"):
        prepare(config(tmp_path / "out", {"c": [folder]}, **settings), SILENT)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}\n{{ m.content }", r"template:2 is not Jinja \(unexpected '}'\): mend it"),
        (None, "a tokenizer trained here has no chat template: give --chat-template FILE"),
        ("{{ nothing }}", "no conversation with a learnt token .* mend a --chat-template"),
    ],
)
def test_a_template_that_cannot_serve_is_told(tmp_path: Path, template: str | None, message: str) -> None:
    folder = write_lines(tmp_path / "chats", [chat("a", "yes"), chat("b", "no")], 1)
    settings: dict[str, object] = {"chat_domains": ["c"], "eval_documents": 1}
    if template is not None:
        (tmp_path / "template").write_text(template)
        settings["chat_template"] = tmp_path / "template"
    with pytest.raises(UserError, match=message):
        prepare(config(tmp_path / "out", {"c": [folder]}, **settings), SILENT)


def test_a_template_may_want_a_first_message(tmp_path: Path) -> None:
    strict = "{% if not messages %}{{ raise_exception('empty') }}{% endif %}" + CHAT_TEMPLATE
    require_syntax(strict, "it")
    require_syntax("{{ messages[0].role.upper() }}", "it")
    require_syntax("{% generation %}{{ messages[0] }}{% endgeneration %}", "it")


def test_chats_of_one_folder_share_a_template(streaming: None, tmp_path: Path) -> None:
    folders = [
        write_lines(tmp_path / name, [chat(name, "yes")] * 2 + [chat("x" + name, "no")], 1) for name in "cd"
    ]
    for name, text in (("one", CHAT_TEMPLATE), ("other", "{{ bos_token }}" + CHAT_TEMPLATE)):
        (tmp_path / name).write_text(text)
    settings = {"eval_documents": 1, "sequence_length": 64, "chat_template": tmp_path / "one"}
    out = tmp_path / "out"
    prepare(config(out, {"c": [folders[0]]}, chat_domains=["c"], **settings), SILENT)
    other = {**settings, "chat_template": tmp_path / "other"}
    with pytest.raises(UserError, match="holds domain c with another `chat_template`"):
        prepare(config(out, {"d": [folders[1]]}, chat_domains=["d"], **other), SILENT)
    both = prepare(config(out, {"d": [folders[1]]}, chat_domains=["d"], **settings), SILENT)
    assert Catalogue.open(out).names == ("c", "d")
    assert both.domains["d"].documents_duplicate == 1


@pytest.fixture(scope="module")
def own_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(make_texts(0, 30), 300).save_pretrained(folder)
    return str(folder)


def test_token_ids_end_in_eos_and_are_dropped_by_their_words(
    streaming: None, own_tokenizer: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(own_tokenizer)
    texts = [text.replace(END_OF_TEXT, "") for text in make_texts(3, 30)]
    documents = [tokenizer(text).input_ids for text in [*texts, texts[0], "a leak of these words"]]
    ids = [token for document in documents for token in [*document, tokenizer.eos_token_id]]
    np.save(tmp_path / "ids.npy", np.array(ids, np.uint16))
    (tmp_path / "eval.txt").write_text("leak of these")
    settings = {
        "tokenizer": own_tokenizer,
        "decontaminate": [str(tmp_path / "eval.txt")],
        "eval_documents": 5,
    }
    catalogue = prepare(config(tmp_path / "out", {"a": [str(tmp_path / "ids.npy")]}, **settings), SILENT)
    found = [*read_documents(catalogue, "a", "train"), *read_documents(catalogue, "a", "eval")]
    assert sorted(found) == sorted([*document, tokenizer.eos_token_id] for document in documents[:30])
    info = catalogue.domains["a"]
    assert (info.documents_duplicate, info.documents_contaminated) == (1, 1)


def test_token_ids_need_the_tokenizer_that_made_them(
    streaming: None, own_tokenizer: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", np.array([5, 0, 400, 0], np.uint16))
    domains = {"a": [str(tmp_path / "ids.npy")]}
    with pytest.raises(UserError, match=r"ids.npy.*--tokenizer"):
        prepare(config(tmp_path / "none", domains), SILENT)
    with pytest.raises(UserError, match=r"ids.npy holds the token id 400, .* has ids below 300"):
        prepare(config(tmp_path / "other", domains, tokenizer=own_tokenizer), SILENT)


# --- what is there already ---------------------------------------------------------------------------------


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
    with pytest.raises(UserError, match="prepared from other files, or these have changed: pass --overwrite"):
        prepare(config(tmp_path / "out", {"a": [folder]}), SILENT)


def test_a_folder_of_the_users_own_is_never_replaced(corpus: dict[str, list[str]], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="is in the way"):
        prepare(config(tmp_path, {"a": corpus["a"]}, overwrite=True), SILENT)


# --- what is refused ---------------------------------------------------------------------------------------

HOSTILE = ["..", ".", "", "../x", "a/b", "/etc", ".hidden", "-flag", "a\n", "a b", "x" * 65, "tokenizer", "é"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_domain_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot name a domain"):
        check_domain_name(name)
    with pytest.raises(UserError, match="cannot name a domain"):
        config(tmp_path, {name: ["x"]})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"eval_fraction": 1.0}, "--eval-fraction"),
        ({"eval_documents": 0}, "--eval-documents"),
        ({"eval_documents": 1, "max_eval_documents": 1}, "either --eval-documents or --max-eval-documents"),
        ({"sequence_length": 1}, "--sequence-length"),
        ({"chat_template": Path("x")}, "--chat-domain"),
        ({"chat_domains": ["b"]}, "names b, which is none"),
        ({"decontaminate_ngram": 0}, "--decontaminate-ngram"),
        ({"shard_bytes": 0}, "--shard-bytes"),
        ({"vocab_size": 256}, "--vocab-size"),
        ({"workers": 0}, "--workers"),
        ({"seed": -1}, "--seed"),
        ({"builtin": True}, "--builtin"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        config(Path("out"), {"a": ["x"]}, **settings)


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
        ({"format_version": 1}, "`format_version`"),
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
