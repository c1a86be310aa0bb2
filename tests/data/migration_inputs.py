"""What users of other systems have on their disks, small, at the paths that docs/migration.md names.

Written by those systems' own writers, megatron-core's and mosaicml-streaming's, and by numpy and pyarrow.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import ipc, parquet

from opmix_dist.data.mds import import_streaming
from opmix_dist.data.sources.megatron import _import_indexed_dataset
from opmix_dist.data.tokenizer import MIN_VOCAB_SIZE, save_tokenizer, train_tokenizer

EOS = 0
"""Id of ``<|endoftext|>`` in the tokenizer of :func:`write_inputs`."""
SIZES = {"web": (200, 40), "code": (100, 120), "math": (60, 30), "held_out": (20, 40), "chat": (80, 6)}
"""Documents of each domain, and their mean length in words."""
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


def domain_texts(name: str) -> list[str]:
    """The documents of a domain, all different."""
    count, words = SIZES[name]
    rng = np.random.default_rng([sorted(SIZES).index(name), count])
    vocabulary = ["alpha", "bêta", "γάμμα", "delta\n", "epsilon", "zeta", "ητα", "theta"]
    lengths = rng.integers(words // 2, words + words // 2, size=count, endpoint=True)
    return [f"{name} {i}: " + " ".join(rng.choice(vocabulary, length)) for i, length in enumerate(lengths)]


def chats() -> list[dict[str, list[dict[str, str]]]]:
    """Rows of one question and one answer."""
    texts = domain_texts("chat")
    return [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
        for ask, answer in zip(texts[::2], texts[1::2], strict=True)
    ]


def write_inputs(folder: Path) -> None:
    """Write all that the page's commands read below ``folder``."""
    write_tokenizer(folder / "tokenizer")
    write_megatron(folder / "megatron")
    write_olmo(folder / "olmo")
    write_mosaic(folder / "mosaic")
    write_hugging_face(folder / "hf")


def write_tokenizer(folder: Path) -> None:
    """Every byte is a token, and the end of a text is one.

    Sizes follow from the texts alone, not from what a release of the tokenizers library would merge.
    """
    tokenizer = train_tokenizer(["no merges"], MIN_VOCAB_SIZE)
    tokenizer.chat_template = CHAT_TEMPLATE
    save_tokenizer(tokenizer, folder)


def token_ids(folder: Path, texts: Iterable[str]) -> list[list[int]]:
    """Ids of each text by the tokenizer in ``folder``, EOS last."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.token_to_id("<|endoftext|>") == EOS
    return [[*tokenizer.encode(text, add_special_tokens=False).ids, EOS] for text in texts]


def write_megatron(folder: Path) -> None:
    """As ``preprocess_data.py --append-eod`` does, and a file for ``--data-args-path``."""
    folder.mkdir()
    for name in ("web", "code"):
        prefix = folder / f"{name}_text_document"
        builder = _import_indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for ids in token_ids(folder.parent / "tokenizer", domain_texts(name)):
            builder.add_item(torch.tensor(ids))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
    (folder / "blend.txt").write_text("30 megatron/web_text_document\n70 megatron/code_text_document\n")


def write_olmo(folder: Path) -> None:
    """Ids without a header, several files to a source, and beside each the list of its documents."""
    for name, parts in (("web", 2), ("math", 1)):
        (folder / name).mkdir(parents=True)
        documents = token_ids(folder.parent / "tokenizer", domain_texts(name))
        for i in range(parts):
            part = documents[i * len(documents) // parts : (i + 1) * len(documents) // parts]
            np.array([id for ids in part for id in ids], np.uint32).tofile(folder / name / f"part-{i}.npy")
            ends = np.cumsum([len(ids) for ids in part]).tolist()
            lines = "".join(f"{begin},{end}\n" for begin, end in zip([0, *ends], ends, strict=False))
            (folder / name / f"part-{i}.csv.gz").write_bytes(gzip.compress(lines.encode()))


def write_mosaic(folder: Path) -> None:
    """A stream of texts, and one of ids that are cut every 64 tokens as LLM Foundry concatenates them."""
    write_mds(folder / "web" / "train", {"text": "str"}, ({"text": text} for text in domain_texts("web")))
    documents = token_ids(folder.parent / "tokenizer", domain_texts("code"))
    stream = np.array([id for ids in documents for id in ids], np.int32)
    cut = [stream[begin : begin + 64] for begin in range(0, len(stream), 64)]
    write_mds(folder / "code" / "train", {"tokens": "ndarray:int32"}, ({"tokens": ids} for ids in cut))


def write_mds(folder: Path, columns: dict[str, str], rows: Iterable[dict[str, Any]]) -> None:
    """Shards of 32 kB."""
    import_streaming()
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns=columns, compression="zstd", size_limit=1 << 15) as writer:
        for row in rows:
            writer.write(row)


def write_hugging_face(folder: Path) -> None:
    """As ``DatasetDict.save_to_disk`` does, a folder of Parquet files, and chats in JSON lines.

    A document of the test split has got into the train split, too.
    """
    test = domain_texts("held_out")
    save_to_disk(folder / "web", {"train": [*domain_texts("web"), test[0]], "test": test})
    (folder / "code").mkdir()
    texts = domain_texts("code")
    for i in range(2):
        table = pa.table({"path": [f"{i}.py"] * 50, "text": texts[i * 50 : (i + 1) * 50]})
        parquet.write_table(table, folder / "code" / f"train-{i:05}-of-00002.parquet", row_group_size=20)
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats()))


def save_to_disk(folder: Path, splits: dict[str, Sequence[str]]) -> None:
    """Arrow streams, two to a split, and the files that describe them."""
    for split, texts in splits.items():
        (folder / split).mkdir(parents=True)
        table = pa.table({"text": texts, "url": ["https://example.org"] * len(texts)})
        names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
        for part, name in zip(np.array_split(np.arange(len(texts)), 2), names, strict=True):
            with pa.OSFile(str(folder / split / name), "wb") as sink:
                with ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table.take(part), max_chunksize=16)
        state = {"_data_files": [{"filename": name} for name in names], "_split": split}
        (folder / split / "state.json").write_text(json.dumps(state))
        (folder / split / "dataset_info.json").write_text(json.dumps({"description": ""}))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
