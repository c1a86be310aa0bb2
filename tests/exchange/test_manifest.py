"""Sizes and checksums of a folder's files, appending that fails, and YAML whose aliases multiply."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import xxhash
from pydantic import ValidationError

from opmix_dist.errors import UserError
from opmix_dist.exchange import files
from opmix_dist.exchange.manifest import CheckpointMarker, HashingStream, damage, hash_file
from opmix_dist.safe_yaml import load_yaml
from opmix_dist.settings import read_yaml


def test_what_passes_the_stream_is_what_lies_in_the_file(tmp_path: Path) -> None:
    stream = HashingStream(open(tmp_path / "x", "wb"))  # noqa: SIM115  (it is closed through the stream)
    for part in (b"abc", memoryview(bytes(100_000)), b""):
        stream.write(part)
    stream.close()
    content = b"abc" + bytes(100_000)
    assert (tmp_path / "x").read_bytes() == content
    assert stream.digest == hash_file(tmp_path / "x")
    assert stream.digest.xxh3_128 == xxhash.xxh3_128(content).hexdigest()
    assert stream.tell() == stream.digest.size == 100_003


def test_damage_names_file_and_reason(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abcd")
    manifest = {"a": hash_file(tmp_path / "a")}
    assert damage(tmp_path, manifest, checksums=True) is None
    (tmp_path / "a").write_bytes(b"abce")
    assert damage(tmp_path, manifest, checksums=False) is None
    assert damage(tmp_path, manifest, checksums=True) == "a holds other bytes than were written"
    (tmp_path / "a").write_bytes(b"abc")
    assert damage(tmp_path, manifest, checksums=False) == "a has 3 bytes and not the 4 that were written"
    (tmp_path / "a").unlink()
    assert damage(tmp_path, manifest, checksums=False) == "a is missing"


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../../b", "", ".", "a//b", "x" * 2000])
def test_a_manifest_names_files_of_its_folder_only(name: str) -> None:
    digest = {"size": 0, "xxh3_128": "0" * 32}
    CheckpointMarker.model_validate({"step": 0, "files": {"deep/er": digest}})
    with pytest.raises(ValidationError, match="files"):
        CheckpointMarker.model_validate({"step": 0, "files": {name: digest}})


def test_lines_are_not_appended_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("unharmed")
    (tmp_path / "train.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match=r"train\.jsonl"):
        files.append_jsonl(tmp_path / "train.jsonl", {"step": 1})
    assert (tmp_path / "mine").read_text() == "unharmed"


def test_a_temporary_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("unharmed")
    (tmp_path / f".value.json.{os.getpid()}.tmp").symlink_to(tmp_path / "mine")
    files.write_json(tmp_path / "value.json", 1)
    assert ((tmp_path / "mine").read_text(), files.read_json(tmp_path / "value.json")) == ("unharmed", 1)


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    """Nine lines that stand for ten to the ninth values; as lists, and merged into mappings."""
    lists = "a0: &a0 [0]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
    )
    merged = "a0: &a0 {k: 0}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10)
    )
    for text in (lists, merged):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml is not valid YAML: it stands for more than"):
            read_yaml(tmp_path / "config.yaml")
    assert load_yaml("base: &b {x: 1}\nother: {<<: *b, y: 2}") == {
        "base": {"x": 1},
        "other": {"x": 1, "y": 2},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "contains itself"),
        ("[" * 5000, "nested too deeply"),
        ("a: " + "1:" * 5000 + "1", "a number has"),
        ("a: 0000-00-00", "year 0"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
    ],
)
def test_what_yaml_may_not_hold(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_yaml(text)
