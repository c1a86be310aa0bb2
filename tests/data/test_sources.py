"""Sources: every format gives the same documents, from any place, and says what it cannot read."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from opmix_dist.data.source import START, Conversation, Place
from opmix_dist.data.sources import FileSource, columns, files, files_fingerprint, mds, text, tokens
from opmix_dist.data.sources.text import cut_lines
from opmix_dist.data.sources.tokens import cut_at_eos
from opmix_dist.errors import UserError

EOS = 9
TEXTS = ["one\n", "", "zwei ü\u2028x", "3" * 300, "vier\r\n\tfünf"]
IDS = [[1, 2, 3], [4], [], [5, 6, 7, 8], [1]]
CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
KINDS = ("txt", "jsonl", "jsonl.gz", "jsonl.zst", "json.gz", "parquet", "stream.arrow", "file.arrow")


def documents(source: FileSource, start: Place = START) -> list[Any]:
    """As a worker gets them: chunks go through a pickle."""
    chunks = (pickle.loads(pickle.dumps(chunk)) for _, chunk in source.chunks(start))
    return [document for chunk in chunks for _, document in chunk.documents()]


def ids(source: FileSource) -> list[list[int]]:
    return [document.tolist() for document in documents(source)]


def write(folder: Path, kind: str, texts: list[str]) -> str:
    """Write ``texts`` to a file of ``kind``, or to one file each, and return what names them."""
    folder.mkdir(exist_ok=True)
    file = folder / f"x.{kind}"
    lines = [json.dumps({"text": one}).encode() + b"\n" for one in texts]
    table = pa.table({"other": list(range(len(texts))), "text": texts})
    if kind == "txt":
        for i, one in enumerate(texts):
            (folder / f"{i:05}.txt").write_bytes(one.encode())
        return str(folder)
    if kind == "parquet":
        parquet.write_table(table, file, row_group_size=3)
    elif kind.endswith("arrow"):
        new = ipc.new_stream if kind.startswith("stream") else ipc.new_file
        with pa.OSFile(str(file), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    elif kind.endswith("gz"):
        file.write_bytes(gzip.compress(b"".join(lines[:2])) + gzip.compress(b"".join(lines[2:])))
    elif kind.endswith("zst"):
        # several frames, as parallel compressors write
        file.write_bytes(b"".join(zstandard.compress(line) for line in lines))
    else:
        file.write_bytes(b"".join(lines).rstrip(b"\n"))
    return str(file)


def write_ids(folder: Path, kind: str, rows: list[list[int]], dtype: str) -> str:
    folder.mkdir(exist_ok=True)
    array = np.array([i for row in rows for i in [*row, EOS]], dtype)
    file = folder / f"x.{kind.removeprefix('header.')}"
    if kind == "header.npy":
        np.save(file, array)
    else:
        file.write_bytes(array.tobytes())
    return str(file)


def write_megatron(prefix: Path, rows: list[list[int]], sequences_per_document: int = 1) -> None:
    from opmix_dist.data.sources.megatron import _import_indexed_dataset

    builder = _import_indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for row in rows:
        for part in np.array_split(np.array([*row, EOS], np.uint16), sequences_per_document):
            builder.add_item(torch.from_numpy(part))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few documents already are several chunks."""
    set_chunk_bytes(monkeypatch, 64)


def set_chunk_bytes(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    from opmix_dist.data.sources import megatron

    for module in (columns, files, mds, tokens, megatron):
        monkeypatch.setattr(module, "CHUNK_BYTES", size)
    monkeypatch.setattr(text.cut_lines, "__defaults__", (size,))


# --- text and rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 64, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_documents(
    tmp_path: Path, kind: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_chunk_bytes(monkeypatch, size)
    assert documents(FileSource([write(tmp_path / "d", kind, TEXTS)])) == TEXTS


@pytest.mark.parametrize("kind", [*KINDS, "raw", "header.npy"])
def test_chunks_from_any_place_are_the_tail_of_all_chunks(
    tmp_path: Path, kind: str, small_chunks: None
) -> None:
    for folder in ("a", "b"):
        if kind in ("raw", "header.npy"):
            write_ids(tmp_path / folder, kind, IDS * 20, "uint16")
        else:
            write(tmp_path / folder, kind, TEXTS * 3)
    source = FileSource([str(tmp_path)], eos_id=EOS, token_dtype="uint16")
    whole = [(place, pickle.dumps(chunk)) for place, chunk in source.chunks()]
    assert len(whole) >= 4
    for i, (place, _) in enumerate(whole):
        for start, tail in ((place, i), (place._replace(chunk=place.chunk + 1), i + 1)):
            assert [(at, pickle.dumps(chunk)) for at, chunk in source.chunks(start)] == whole[tail:]


@given(
    st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"")), max_size=20),
    st.integers(1, 40),
)
def test_blocks_are_whole_lines_of_any_size(lines: list[bytes], size: int) -> None:
    data = b"\n".join(lines)
    blocks = list(cut_lines(io.BytesIO(data), "x", size))
    assert b"".join(blocks) == data
    assert all(block.endswith(b"\n") for block in blocks[:-1])
    assert all(b"\n" not in block[size:-1] for block in blocks)  # as small as whole lines allow


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=30), st.integers(1, 200)
)
def test_documents_do_not_depend_on_where_a_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        set_chunk_bytes(patch, size)
        for kind in ("jsonl", "parquet"):
            assert documents(FileSource([write(folder, kind, texts)])) == texts


def test_files_before_the_place_are_not_opened(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / name, "jsonl.gz", [name])
    source = FileSource([str(tmp_path)])
    assert [file.name for file in source.files()] == [str(tmp_path / name / "x.jsonl.gz") for name in "abc"]
    (tmp_path / "a" / "x.jsonl.gz").unlink()
    assert documents(source, Place(1, 0)) == ["b", "c"]


def test_small_text_files_share_a_chunk_and_a_large_one_has_its_own(
    tmp_path: Path, small_chunks: None
) -> None:
    for name, size in (("a", 30), ("b", 30), ("c", 30), ("d", 500), ("e", 1)):
        (tmp_path / name).write_text(name * size)
    chunks = [(place, list(chunk.documents())) for place, chunk in FileSource([str(tmp_path)]).chunks()]
    assert [(place, [number for number, _ in found]) for place, found in chunks] == [
        ((0, 0), [0, 1]),
        ((2, 0), [2]),
        ((3, 0), [3]),
        ((4, 0), [4]),
    ]


def test_globs_and_folders_are_sorted_and_counted_once_without_hidden_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "a[1]", "txt", list("01234"))
    (tmp_path / "a[1]" / ".hidden").write_text("no")
    (tmp_path / "a[1]" / ".git").mkdir()
    (tmp_path / "a[1]" / ".git" / "x").write_text("no")
    source = FileSource([f"{tmp_path}/a*/*1.txt", folder, f"{folder}/00000.txt"])
    assert [Path(file.name).name for file in source.files()] == [f"0000{i}.txt" for i in range(5)]
    assert documents(source) == list("01234")


def test_the_fingerprint_sees_names_and_sizes_and_no_folders(tmp_path: Path) -> None:
    here, there = (FileSource([write(tmp_path / name, "txt", ["x", "y"])]) for name in ("a", "b"))
    assert files_fingerprint(here.files()) == files_fingerprint(there.files())
    (tmp_path / "b" / "00001.txt").write_text("yy")
    assert files_fingerprint(here.files()) != files_fingerprint(FileSource(there.names).files())


def test_a_saved_dataset_is_the_files_that_its_state_names(tmp_path: Path) -> None:
    """Two splits as ``DatasetDict.save_to_disk`` lays them out, and what ``map`` leaves beside them."""
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split, texts in (("train", TEXTS), ("test", ["t"])):
        file = Path(write(tmp_path / split, "stream.arrow", texts))
        file.rename(file.with_name("data-00000-of-00001.arrow"))
        write(tmp_path / split, "stream.arrow", ["cached"])
        (tmp_path / split / "dataset_info.json").write_text("{}")
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (tmp_path / split / "state.json").write_text(json.dumps(state))
    assert documents(FileSource([str(tmp_path)])) == ["t", *TEXTS]
    state["_data_files"][0]["filename"] = "../../secret.arrow"
    (tmp_path / "test" / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"test/state.json names the file '../../secret.arrow'"):
        documents(FileSource([str(tmp_path)]))


# --- chats -------------------------------------------------------------------------------------------------


def test_chats_of_lines_and_columns_are_the_same(tmp_path: Path) -> None:
    """A column gives every call the arguments of all calls, as null; they are not there in the chats."""
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"a": 1}, {"b": "x"})]
    replies = [{"role": "assistant", "content": None, "tool_calls": [call]} for call in calls]
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [{"chat": CHAT, "tools": None}, *({"chat": [CHAT[0], reply], "tools": tools} for reply in replies)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    as_text = [{**row, "tools": row["tools"] and json.dumps(row["tools"])} for row in rows]
    parquet.write_table(pa.Table.from_pylist(as_text), tmp_path / "c.parquet")
    expected = [Conversation(CHAT), *(Conversation([CHAT[0], reply], tools) for reply in replies)]
    for name in ("a.jsonl", "b.parquet", "c.parquet"):
        assert documents(FileSource([str(tmp_path / name)], messages_field="chat")) == expected, name


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "has no field 'messages', but text: name the chat's with --messages-field"),
        ({"messages": "x"}, "'messages' is not a list of messages"),
        ({"messages": []}, "'messages' is not a list of messages"),
        ({"messages": ["x"]}, r"'messages\[0\]' is str, not an object"),
        ({"messages": [{"content": "x"}]}, r"'messages\[0\].role' is NoneType, not text"),
        ({"messages": [*CHAT, {"role": "user"}]}, r"'messages\[2\].content' is NoneType, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content' is list, not text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair"),
        ({"messages": CHAT, "tools": [1]}, "'tools' is not a list of objects"),
        ({"messages": CHAT, "tools": "{"}, "'tools' is not valid JSON"),
    ],
)
def test_a_malformed_chat_names_line_and_message(tmp_path: Path, row: object, reason: str) -> None:
    (tmp_path / "x.jsonl").write_text("\n" + json.dumps(row))
    with pytest.raises(UserError, match=rf"x\.jsonl:2.*{reason}"):
        documents(FileSource([str(tmp_path / "x.jsonl")], messages_field="messages"))


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"text": "\xff"}', "not valid JSON"),
        (b'["text"]', "has no field 'text': name the text's with --text-field"),
        (b'{"text": 1}', "'text' is int, not text"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_malformed_line_names_file_and_line(
    tmp_path: Path, line: bytes, reason: str, small_chunks: None
) -> None:
    good = b'{"text": "a line of about forty bytes"}\n'
    (tmp_path / "x.jsonl").write_bytes(good * 10 + line + b"\n")
    with pytest.raises(UserError, match=rf"x\.jsonl:11.*{reason}"):
        documents(FileSource([str(tmp_path / "x.jsonl")]))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_row_that_is_no_text_is_named_by_its_number_in_the_file(
    tmp_path: Path, kind: str, small_chunks: None
) -> None:
    table = pa.table({"text": [*["x" * 50] * 10, None]})
    if kind == "parquet":
        parquet.write_table(table, tmp_path / "x.parquet", row_group_size=4)
    else:
        with ipc.new_stream(tmp_path / "x.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    with pytest.raises(UserError, match=rf"x\.{kind} row 11: 'text' is NoneType, not text"):
        documents(FileSource([str(tmp_path)]))


@pytest.mark.parametrize(
    "kind", ["jsonl.gz", "jsonl.zst", "parquet", "stream.arrow", "file.arrow", "header.npy"]
)
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_a_cut_off_file_is_refused_by_name(tmp_path: Path, kind: str, share: float) -> None:
    texts = ["".join(map(chr, np.random.default_rng(i).integers(32, 5000, 200))) for i in range(50)]
    name = write_ids(tmp_path, kind, IDS, "int32") if "npy" in kind else write(tmp_path, kind, texts)
    if kind == "jsonl.zst":  # in one frame
        Path(name).write_bytes(
            zstandard.compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode())
        )
    whole = Path(name).read_bytes()
    Path(name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=Path(name).name):
        documents(FileSource([name], eos_id=EOS))


def test_a_stream_cut_between_two_batches_is_refused(tmp_path: Path) -> None:
    name = write(tmp_path, "stream.arrow", TEXTS)
    Path(name).write_bytes(Path(name).read_bytes()[:-8])
    with pytest.raises(UserError, match="x.stream.arrow is not a whole Arrow file"):
        documents(FileSource([name]))


def test_sources_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    parquet.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "x.parquet")
    parquet.write_table(pa.table({"text": ["x", None]}), tmp_path / "null.parquet")
    (tmp_path / "none.parquet").write_bytes(b"PAR1 no PAR1")
    (tmp_path / "x.mds").write_bytes(b"")
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], "i4")), pa.py_buffer(b"\xff")]
    )
    parquet.write_table(pa.table({"text": bad}), tmp_path / "latin.parquet")
    for name, column in (("latin", bad), ("past", pa.array(["x" * 77]))):
        with ipc.new_stream(tmp_path / f"{name}.arrow", pa.schema([("text", pa.string())])) as writer:
            writer.write_batch(pa.record_batch({"text": column}))
    offsets, beyond = (np.array([0, end], "<i4").tobytes() for end in (77, 1 << 30))
    metadata, _, rest = (tmp_path / "past.arrow").read_bytes().rpartition(offsets)
    (tmp_path / "past.arrow").write_bytes(metadata + beyond + rest)
    for name, reason in (
        ("latin.txt", r"latin\.txt is not UTF-8 text \(byte 3\)"),
        ("x.parquet", "has no column 'text', but body, n: name one with --text-field"),
        ("null.parquet", "null.parquet row 2: 'text' is NoneType"),
        ("latin.parquet", "latin.parquet row 1 is not UTF-8"),
        ("latin.arrow", "latin.arrow is not a whole Arrow file: .*UTF8"),
        ("past.arrow", "past.arrow is not a whole Arrow file"),
        ("none.parquet", "none.parquet is not a whole Parquet file"),
        ("nothing/*.txt", r"nothing/\*\.txt matches no file"),
        ("x.mds", "x.mds is a shard that no index.json names"),
    ):
        with pytest.raises(UserError, match=reason):
            documents(FileSource([str(tmp_path / name)]))


# --- token ids ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npy", "bin", "raw", "header.npy"])
@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint32", "int64"])
@pytest.mark.parametrize("size", [8, 1 << 20])
def test_arrays_of_ids_are_cut_at_eos(
    tmp_path: Path, kind: str, dtype: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_chunk_bytes(monkeypatch, size)
    name = write_ids(tmp_path, kind, IDS, dtype)
    given_dtype = None if kind == "header.npy" else dtype
    assert ids(FileSource([name], eos_id=EOS, token_dtype=given_dtype)) == IDS


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.lists(st.integers(0, 60), max_size=8))
def test_cutting_at_eos_keeps_all_tokens_and_whole_documents(stream: list[int], cuts: list[int]) -> None:
    array = np.array([*stream, 0], np.uint16)
    found = list(cut_at_eos(np.split(array, sorted(min(cut, len(stream)) for cut in cuts)), 0, "x"))
    assert np.concatenate(found).tolist() == array.tolist()
    assert all(part[-1] == 0 for part in found)


def test_the_last_document_may_lack_its_eos(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([1, EOS, 2, 3], np.int64))
    assert ids(FileSource([str(tmp_path / "x.npy")], eos_id=EOS)) == [[1], [2, 3]]


def test_arrays_that_are_no_ids_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.mkdir, (str(tmp_path / "pickle was loaded"),)

    np.save(tmp_path / "float.npy", np.ones(3))
    np.save(tmp_path / "pickle.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    np.save(tmp_path / "negative.npy", np.array([-1, EOS]))
    np.save(tmp_path / "no_eos.npy", np.array([1, 2]))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(np.ones((2, 2), int)))
    (tmp_path / "odd.raw").write_bytes(b"12345")
    np.tile(np.array([7, EOS], np.uint32), 50).tofile(tmp_path / "wide.raw")
    for name, reason in (
        ("float.npy", "is an array of float64"),
        ("pickle.npy", "is an array of object"),
        ("negative.npy", "ids below 0"),
        ("no_eos.npy", r"no EOS \(id 9\) in 2 tokens: is it the right tokenizer"),
        ("fortran.npy", "not of token ids in order"),
        ("odd.raw", "5 bytes are no whole number of uint16"),
        ("wide.raw", "every second id is 0 as uint16"),
    ):
        with pytest.raises(UserError, match=rf"{name}.*{reason}"):
            documents(FileSource([str(tmp_path / name)], eos_id=EOS, token_dtype="uint16"))
    assert not (tmp_path / "pickle was loaded").exists()
    monkeypatch.setattr(tokens, "MAX_DOCUMENT_TOKENS", 100)
    monkeypatch.setattr(tokens, "CHUNK_BYTES", 8 * 50)
    np.save(tmp_path / "long.npy", np.array([1, EOS, *[2] * 300, EOS]))
    with pytest.raises(UserError, match=r"long\.npy.*no EOS \(id 9\) in [12]\d\d tokens"):
        documents(FileSource([str(tmp_path / "long.npy")], eos_id=EOS))


def test_what_files_of_ids_do_not_say_is_asked_for(tmp_path: Path) -> None:
    name = write_ids(tmp_path, "npy", IDS, "uint16")
    with pytest.raises(
        UserError, match="x.npy does not say how its token ids are stored: give --token-dtype"
    ):
        documents(FileSource([name], eos_id=EOS))
    with pytest.raises(UserError, match="x.npy holds token ids: name the tokenizer"):
        documents(FileSource([name], token_dtype="uint16"))


@pytest.mark.parametrize("named", ["pair", "pair.bin", "pair.idx", "", "p*"])
def test_a_pair_of_megatron_s_is_named_by_any_of_its_files(
    tmp_path: Path, named: str, small_chunks: None, recwarn: pytest.WarningsRecorder
) -> None:
    write_megatron(tmp_path / "pair", IDS * 10, sequences_per_document=2)
    source = FileSource([f"{tmp_path}/{named}"], eos_id=EOS)
    assert [Path(file.name).name for file in source.files()] == ["pair.bin", "pair.idx"]
    assert len(list(source.chunks())) > 3
    assert ids(source) == IDS * 10
    assert not [warning for warning in recwarn if "Transformer Engine" in str(warning.message)]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_pair_is_refused(tmp_path: Path) -> None:
    write_megatron(tmp_path / "x", IDS)
    index, data = (tmp_path / "x.idx").read_bytes(), (tmp_path / "x.bin").read_bytes()
    negative = bytearray(index)
    negative[34:38] = (-1).to_bytes(4, "little", signed=True)  # the length of the first sequence
    damages = {".idx": [index[:-3], b"no index", bytes(negative)], ".bin": [data[:-2], b""]}
    for end, content in ((end, one) for end, contents in damages.items() for one in contents):
        (tmp_path / "x.idx").write_bytes(index)
        (tmp_path / "x.bin").write_bytes(data)
        (tmp_path / f"x{end}").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.bin and its \.idx do not fit"):
            documents(FileSource([str(tmp_path / "x")], eos_id=EOS))
    (tmp_path / "x.bin").unlink()
    with pytest.raises(UserError, match=r"x\.idx describes a \.bin that is not there"):
        documents(FileSource([str(tmp_path)], eos_id=EOS))


# --- MDS ---------------------------------------------------------------------------------------------------


def write_mds(folder: Path, encodings: dict[str, str], rows: list[dict[str, Any]], **options: Any) -> str:
    from opmix_dist.data.mds import import_streaming

    with import_streaming().MDSWriter(out=str(folder), columns=encodings, **options) as writer:
        for row in rows:
            writer.write(row)
    return str(folder)


@pytest.mark.parametrize("compression", [None, "zstd", "gz"])
def test_shards_of_text_and_chats(
    streaming: None, tmp_path: Path, compression: str | None, small_chunks: None
) -> None:
    rows = [{"id": i, "text": one, "messages": CHAT, "size": b"12"} for i, one in enumerate(TEXTS)]
    encodings = {"id": "int", "text": "str", "messages": "json", "size": "bytes"}
    name = write_mds(tmp_path / "x", encodings, rows, compression=compression, size_limit=800)
    source = FileSource([name])
    assert len(source.files()) > 2
    assert documents(source) == TEXTS
    assert documents(FileSource([name], messages_field="messages")) == [Conversation(CHAT)] * len(TEXTS)


@pytest.mark.parametrize("encoding", ["ndarray", "ndarray:uint16", "ndarray:uint16:3", "bytes"])
def test_samples_of_ids_are_one_stream_over_all_shards(
    streaming: None, tmp_path: Path, encoding: str, small_chunks: None
) -> None:
    """Documents of up to 40 tokens in samples of 3, so that shards begin and end within documents."""
    long = [[*range(1, 9)] * 5, *IDS, [], [1], [2, 3]] * 9
    stream = np.array([i for row in long for i in [*row, EOS]], np.uint16)
    samples = stream.reshape(-1, 3)
    rows = [{"tokens": one.tobytes() if encoding == "bytes" else one} for one in samples]
    name = write_mds(tmp_path / "x", {"tokens": encoding}, rows, size_limit=500)
    source = FileSource([name], eos_id=EOS, token_dtype="uint16")
    assert len(source.files()) > 3
    found = ids(source)
    assert [i for row in found for i in [*row, EOS]][: samples.size] == samples.ravel().tolist()
    assert found == long[: len(found)]
    for number in range(1, len(source.files())):
        begun = [len(list(chunk.documents())) for place, chunk in source.chunks() if place.file < number]
        rest = [one.tolist() for one in documents(source, Place(number, 0))]
        assert rest == ids(source)[sum(begun) :]


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index["shards"][0])
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda shard: shard.update(column_encodings=["pkl"]), "column_encodings.0` is 'pkl'"),
        (lambda shard: shard.update(column_encodings=["pkl:str"]), "column_encodings.0` is 'pkl:str'"),
        (lambda shard: shard["raw_data"].update(basename="../x.mds"), "basename` is '../x.mds'"),
        (lambda shard: shard["raw_data"].update(basename="/etc/passwd"), "basename` is '/etc/passwd'"),
        (lambda shard: shard["raw_data"].update(basename="a/../../x"), "basename` is 'a/../../x'"),
        (
            lambda shard: shard["raw_data"].update(basename="gone.mds"),
            "names the shard gone.mds, which is not",
        ),
        (lambda shard: shard.update(format="json"), "format` is 'json'"),
        (lambda shard: shard.update(column_sizes=[]), "not equally many"),
        (lambda shard: shard["raw_data"].update(bytes=7), "bytes are there, and 7 were written"),
        (lambda shard: shard.update(samples=10**9), "does not fit its index.json"),
        (lambda shard: shard.update(samples=2), "its table of samples is damaged"),
        (
            lambda shard: shard.update(column_names=["x"]),
            "neither a column 'text' of text nor 'tokens' of ids",
        ),
        (lambda shard: shard.update(column_sizes=[10**6]), "too short for its columns"),
    ],
)
def test_a_hostile_or_damaged_index_is_refused(
    streaming: None, tmp_path: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    (tmp_path / "x.mds").write_text("outside")
    name = write_mds(tmp_path / "d", {"text": "str"}, [{"text": one} for one in TEXTS])
    change_index(tmp_path / "d", change)
    with pytest.raises(UserError, match=reason):
        documents(FileSource([name], eos_id=EOS))


def test_a_damaged_compressed_shard_is_refused(streaming: None, tmp_path: Path) -> None:
    name = write_mds(tmp_path / "d", {"text": "str"}, [{"text": one} for one in TEXTS], compression="zstd")
    shard = tmp_path / "d" / "shard.00000.mds.zstd"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(UserError, match="shard .*shard.00000.mds.zstd.*cannot be decompressed"):
        documents(FileSource([name]))


def test_an_index_over_folders_with_their_own_reads_each_shard_once(streaming: None, tmp_path: Path) -> None:
    from streaming.base.util import merge_index

    for part in "ab":
        write_mds(tmp_path / part, {"text": "str"}, [{"text": part}])
    merge_index(str(tmp_path))
    assert documents(FileSource([str(tmp_path)])) == ["a", "b"]
    for part in "ab":
        (tmp_path / part / "index.json").unlink()
    assert documents(FileSource([str(tmp_path)])) == ["a", "b"]


# --- stores ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A bucket ``data`` of an S3 server on this machine, through s3fs as the environment configures it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "none")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        fs.mkdir("data")
        yield fs
    server.stop()


@pytest.mark.parametrize("kind", ["jsonl.zst", "parquet", "txt", "stream.arrow"])
def test_an_object_store_gives_what_the_disk_gives(
    s3: Any, tmp_path: Path, kind: str, small_chunks: None
) -> None:
    local = write(tmp_path / "d", kind, TEXTS)
    s3.put(str(tmp_path / "d"), f"data/{kind}", recursive=True)
    s3.pipe(f"data/{kind}/.hidden", b"no")
    here = FileSource([local])
    for name in (f"s3://data/{kind}", f"s3://data/{kind}/*", f"s3://data/{kind}/**"):
        there = FileSource([name])
        assert documents(there) == TEXTS, name
        assert files_fingerprint(there.files()) == files_fingerprint(here.files())
        assert all(file.name.startswith(f"s3://data/{kind}/") for file in there.files())
    assert documents(there, Place(1, 0)) == documents(here, Place(1, 0))


def test_pairs_and_shards_in_memory(streaming: None, tmp_path: Path) -> None:
    write_megatron(tmp_path / "pair", IDS)
    write_mds(tmp_path / "mds", {"text": "str"}, [{"text": one} for one in TEXTS], compression="zstd")
    fs = fsspec.filesystem("memory")
    fs.put(f"{tmp_path}/", "/sources/", recursive=True)
    for name in ("pair", "pair.idx", "pair.*"):
        assert ids(FileSource([f"memory://sources/{name}"], eos_id=EOS)) == IDS, name
    assert documents(FileSource(["memory://sources/mds"])) == TEXTS


def test_a_chained_url_is_fsspec_s_to_open(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("in/a.txt", "one")
        archive.writestr("in/b.txt", "two")
    source = FileSource([f"zip://in/*.txt::file://{tmp_path}/x.zip"])
    assert documents(source) == ["one", "two"]
    assert source.files()[0].name == f"zip://in/a.txt::file://{tmp_path}/x.zip"


def test_a_store_that_cannot_be_read_is_one_line_with_the_url(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("s3://no-such-bucket/x.jsonl", "s3://data/nothing", "memory://nothing/*"):
        with pytest.raises(UserError, match=f"{name.replace('*', '[*]')} matches no file"):
            FileSource([name]).files()
    for name, reason in (("nonsense://a/b", "Protocol not known"), ("http://127.0.0.1:9/x.txt", "")):
        with pytest.raises(UserError, match=f"cannot read {name}: .*{reason}") as caught:
            FileSource([name]).files()
        assert "\n" not in str(caught.value)


def test_missing_credentials_are_one_line_with_the_url(
    s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="cannot read s3://data/x.jsonl: .*[Cc]redentials"):
        FileSource(["s3://data/x.jsonl"]).files()
    s3fs.S3FileSystem.clear_instance_cache()
