"""The catalogue of prepared domains: what ``opmix prepare`` wrote, checked before anything reads it.

    ROOT/tokenizer/                     save_pretrained of the one tokenizer of all domains
    ROOT/DOMAIN/domain.json             a :class:`DomainInfo`, written last
    ROOT/DOMAIN/sources.jsonl           a :class:`SourceInfo` for each file that was read
    ROOT/DOMAIN/digests.bin             16 bytes of each document that was kept: later domains drop these
    ROOT/DOMAIN/{train,eval}/           MDS shards of samples (``samples.py``) and their index

A domain folder appears under its name only when it is complete, so whatever is found can be read.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from opmix_dist.bounded import read_bounded
from opmix_dist.data.samples import Compression, DType
from opmix_dist.data.store import ShardStore
from opmix_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = get_args(Split)
FORMAT_VERSION: Literal[2] = 2
Packing = Literal["concat", "best_fit"]
"""Documents end to end, cut every T tokens; or whole conversations fitted into samples of at most T."""
TOKENIZER = "tokenizer"
DOMAIN_FILE = "domain.json"
SOURCES_FILE = "sources.jsonl"
DIGESTS_FILE = "digests.bin"
TASKS_FILE = "tasks.jsonl"
"""Of domains that have tasks: how replies to the held-out conversations are scored."""
MAX_DOMAIN_FILE_BYTES = 1 << 20
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
MAX_TOKENIZER_FILE_BYTES = 256 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class SplitInfo(BaseModel):
    """Size of one split; a sample has at most T tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(ge=0)
    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)


class SourceInfo(BaseModel):
    """One line of ``sources.jsonl``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="path or URL")
    bytes: int = Field(ge=0)
    documents: int = Field(ge=0, description="all of the file's, dropped ones too")
    sha256: Sha256 = Field(description="over the digests of these documents, in order")


class DomainInfo(BaseModel):
    """Content of ``domain.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[2]
    name: str
    tokenizer_fingerprint: Sha256
    vocab_size: int = Field(ge=1, le=1 << 32, description="largest token id of the tokenizer, plus one")
    sequence_length: int = Field(ge=1, description="most tokens of a sample, T")
    packing: Packing = "concat"
    dtype: DType
    compression: Compression = "none"
    splits: dict[Split, SplitInfo]
    documents_duplicate: int = Field(ge=0, description="dropped: seen before in this or an earlier domain")
    documents_empty: int = Field(ge=0, description="dropped: white space only, or no token")
    documents_contaminated: int = Field(0, ge=0, description="dropped: share words with --decontaminate")
    documents_unlearnt: int = Field(0, ge=0, description="dropped: chats without a token that is learnt")
    tokens_dropped: int = Field(ge=0, description="tokens cut off chats that are longer than a sample")
    sources: list[str] = Field(description="paths, URLs and globs, as they were given")
    sources_sha256: Sha256 | None = Field(None, description="of sources.jsonl")
    digests_sha256: Sha256 | None = Field(None, description="of digests.bin")
    content_sha256: Sha256 = Field(description="over both splits' indexes, which hold each shard's hash")
    seed: int = Field(ge=0, description="seed of the split in train and eval")
    settings: dict[str, JsonValue] = Field(description="all that decided the content; a rerun compares it")


@dataclass(frozen=True)
class Catalogue:
    """The domains of one root folder, in a fixed order; D below is their number."""

    root: Path
    names: tuple[str, ...]
    domains: dict[str, DomainInfo]
    store: ShardStore | None = None
    """Where the shards come from; None: they lie in ``root``. With a store, ``root`` is its cache."""
    kept: Mapping[str, int] = field(default_factory=dict)
    """Training samples that are used of domains of which not all are; see :meth:`keeping`."""
    kept_seed: int = 0

    @classmethod
    def open(cls, root: str | Path, domains: Sequence[str] | None = None) -> Catalogue:
        """Read and check the domains of ``root``.

        Args:
            root: folder that ``opmix prepare --out`` made.
            domains: names in the order wanted; None takes every domain, sorted.

        Raises:
            UserError: a missing folder, no domain, an unknown, damaged or empty domain, or domains that do
                not share one tokenizer and one sequence length.
        """
        root = Path(root)
        found = find_domains(root)
        names = tuple(found if domains is None else domains)
        if not names:
            raise UserError(f"{root} holds no domain: make some with `opmix prepare --out {root}`")
        for name in names:
            _require_known(name, found, root)
        if len(set(names)) < len(names):
            raise UserError(f"data.domains names a domain twice: {', '.join(names)}")
        infos = {name: read_domain(root, name) for name in names}
        _require_one_format(infos, tokenizer_fingerprint(root / TOKENIZER), root)
        return cls(root, names, infos)

    @property
    def sequence_length(self) -> int:
        """Tokens per sample, T."""
        return self.domains[self.names[0]].sequence_length

    @property
    def vocab_size(self) -> int:
        return self.domains[self.names[0]].vocab_size

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.domains[self.names[0]].tokenizer_fingerprint

    def split_dir(self, name: str, split: Split) -> Path:
        """Folder of one domain's MDS index and shards."""
        return self.root / name / split

    def samples(self, split: Split) -> np.ndarray:
        """Samples per domain that are used, int64 [D]."""
        stored = [self.domains[name].splits[split].samples for name in self.names]
        if split == "train":
            stored = [self.kept.get(name, count) for name, count in zip(self.names, stored, strict=True)]
        return np.array(stored, dtype=np.int64)

    def keeping(self, samples: Mapping[str, int], *, seed: int) -> Catalogue:
        """The same domains with training samples that are a part of all: a replay store.

        Args:
            samples: by domain; those that are not named, and those that have no more, keep all.
            seed: of the choice, which depends on nothing else but the domain's name and shards.

        Raises:
            UserError: a domain that is not there.
        """
        for name in samples:
            if name not in self.names:
                raise UserError(
                    f"data.replay_samples names `{name}`, which is no domain of {self.root}: it has "
                    f"{', '.join(self.names)}"
                )
        kept = {n: count for n, count in samples.items() if count < self.domains[n].splits["train"].samples}
        return replace(self, kept=kept, kept_seed=seed)

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that made the samples."""
        # which imports this module's names
        from opmix_dist.data.tokenizer import load_tokenizer

        return load_tokenizer(str(self.root / TOKENIZER))


def is_domain_name(name: str) -> bool:
    return name != TOKENIZER and _NAME.fullmatch(name) is not None


def check_domain_name(name: str) -> str:
    """Return ``name``; UserError when it cannot be a domain's name, which is also its folder's."""
    if not is_domain_name(name):
        raise UserError(
            f"{name!r} cannot name a domain: use up to 64 of A-Z a-z 0-9 _ . -, beginning with a letter or "
            f"digit, and not `{TOKENIZER}`"
        )
    return name


def find_domains(root: Path) -> list[str]:
    """Names of the complete domains in ``root``, sorted; UserError when it is no folder."""
    if not root.is_dir():
        raise UserError(f"{root} is no folder: make it with `opmix prepare --out {root}`")
    files = root.glob(f"*/{DOMAIN_FILE}")
    return sorted(file.parent.name for file in files if is_domain_name(file.parent.name))


def read_domain(root: Path, name: str) -> DomainInfo:
    """Read one ``domain.json``; UserError names the file when it is damaged or another domain's."""
    path = root / check_domain_name(name) / DOMAIN_FILE
    try:
        info = DomainInfo.model_validate(_read_json(path, MAX_DOMAIN_FILE_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: `{key}`: {first['msg']}; delete its folder and prepare it again") from None
    if info.name != name or set(info.splits) != set(SPLITS):
        raise UserError(f"{path} describes {info.name!r} with splits {sorted(info.splits)}, not {name!r}")
    for split in SPLITS:
        if info.splits[split].samples == 0:
            raise UserError(f"empty domain: {name} has no sample in its {split} split")
    return info


def tokenizer_fingerprint(tokenizer_dir: Path) -> str:
    """sha256 of what maps text to ids in ``tokenizer.json``, hexadecimal.

    Normaliser, pre-tokeniser, model (vocabulary and merges) and added tokens count; truncation, padding,
    decoder and post-processor do not, as ingest uses none of them. Stable across save and load.
    """
    path = tokenizer_dir / "tokenizer.json"
    data = _read_json(path, MAX_TOKENIZER_FILE_BYTES)
    try:
        canonical = {key: data[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
        merges = canonical["model"].get("merges", [])
        # "a b" up to tokenizers 0.19, ["a", "b"] since
        joined = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        canonical["model"] = {**canonical["model"], "merges": joined}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a tokenizer of the `tokenizers` library") from None
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path, max_bytes: int) -> Any:
    try:
        return json.loads(read_bounded(path, max_bytes))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON: prepare it again") from None


def _require_known(name: str, found: Sequence[str], root: Path) -> None:
    if name in found:
        return
    near = difflib.get_close_matches(name, found, n=1, cutoff=0.0)
    hint = f"the nearest is `{near[0]}`" if near else "it holds none"
    raise UserError(f"{root} has no domain {name!r}: {hint}")


def _require_one_format(infos: dict[str, DomainInfo], fingerprint: str, root: Path) -> None:
    length = next(iter(infos.values())).sequence_length
    for name, info in infos.items():
        if info.tokenizer_fingerprint != fingerprint:
            raise UserError(
                f"domain {name} was tokenised with another tokenizer than {root / TOKENIZER}: prepare it "
                f"again with that tokenizer, or leave it out of data.domains"
            )
        if info.sequence_length != length:
            raise UserError(
                f"domain {name} has samples of {info.sequence_length} tokens, others of {length}: prepare "
                f"it again with --sequence-length {length}, or leave it out of data.domains"
            )
