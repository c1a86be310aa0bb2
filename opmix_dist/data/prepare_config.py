"""What ``opmix prepare`` is asked for."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from opmix_dist.data.builtin import DEFAULT_MAX_BYTES, builtin_domains
from opmix_dist.data.builtin_chat import RECIPES, BuiltinChatSource
from opmix_dist.data.catalogue import check_domain_name
from opmix_dist.data.samples import SHARD_BYTES, Compression
from opmix_dist.data.source import Source
from opmix_dist.data.sources import FileSource
from opmix_dist.data.sources.tokens import TokenDType
from opmix_dist.data.survey import Holdout
from opmix_dist.data.tokenizer import MIN_VOCAB_SIZE
from opmix_dist.errors import UserError

TRAIN_TOKENIZER = "train"


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare and where to; UserError at construction names the setting that is out of range."""

    out: Path
    """Folder to make or to add domains to."""
    domains: Mapping[str, list[str]] = field(default_factory=dict)
    """Files, folders, globs and URLs of each domain; a document in several domains stays in the first."""
    chat_domains: Collection[str] = ()
    """Those of ``domains`` whose rows are chats."""
    builtin: bool = False
    """Prepare the built-in domains of text in place of ``domains``."""
    builtin_chat: Collection[str] = ()
    """Built-in domains of chats to prepare besides, or alone: ``tools``, ``answers``."""
    builtin_max_bytes: int = DEFAULT_MAX_BYTES
    """Bytes of text in each built-in domain."""
    text_field: str = "text"
    """Field of JSON lines, or column of Parquet files, that holds the text."""
    messages_field: str = "messages"
    """The same for the messages of chats."""
    token_dtype: TokenDType | None = None
    """Type of token ids in files that do not say it."""
    tokenizer: str = TRAIN_TOKENIZER
    """``train``, or a folder or hub id of a Hugging Face tokenizer."""
    vocab_size: int = 4096
    """Tokens of the tokenizer to train; without effect on a loaded one."""
    chat_template: Path | None = None
    """File with the Jinja template of chats; None: the tokenizer's own."""
    sequence_length: int = 256
    """Most tokens of a sample, T."""
    eval_fraction: float = 0.05
    """Share of the documents that are held out."""
    max_eval_documents: int | None = None
    """Bound on a domain's held-out documents; None: no bound."""
    eval_documents: int | None = None
    """A domain's held-out documents, in place of the two above; None: those decide."""
    decontaminate: Collection[str] = ()
    """Files, folders, globs and URLs of evaluation texts: documents that share words with one are dropped."""
    decontaminate_ngram: int = 13
    """Words in a row that two texts may not share."""
    compression: Compression = "none"
    """Of the shards."""
    shard_bytes: int = SHARD_BYTES
    """Size at which a shard is closed, before compression."""
    seed: int = 0
    """Decides which documents are held out, and which files the built-in domains take."""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Tokenising processes; the result does not depend on it."""
    record_seconds: float = 30.0
    """Time between records of what is done; a killed run loses no more. The result does not depend on it."""
    overwrite: bool = False
    """Replace finished domains whose settings differ."""

    def __post_init__(self) -> None:
        if (self.domains and self.builtin) or not (self.domains or self.builtin or self.builtin_chat):
            raise UserError("give either --domain NAME=PATH or --chat-domain NAME=PATH, or --builtin")
        if unknown := set(self.builtin_chat) - set(RECIPES):
            raise UserError(f"--builtin-chat {min(unknown)} is none of {', '.join(RECIPES)}")
        if twice := set(self.builtin_chat) & set(self.domains):
            raise UserError(f"{min(twice)} is a --builtin-chat and a domain of yours: use another name")
        for name in self.domains:
            check_domain_name(name)
        if self.chat_template is not None and not self.chats:
            raise UserError("--chat-template is for chats: give a --chat-domain NAME=PATH too")
        if unknown := set(self.chat_domains) - set(self.domains):
            raise UserError(f"chat_domains names {min(unknown)}, which is none of the domains")
        if self.chat_domains and self.tokenizer == TRAIN_TOKENIZER and self.chat_template is None:
            raise UserError("a tokenizer trained here has no chat template: give --chat-template FILE")
        if not 0.0 < self.eval_fraction < 1.0:
            raise UserError(f"--eval-fraction {self.eval_fraction} must lie between 0 and 1")
        if self.eval_documents is not None and self.max_eval_documents is not None:
            raise UserError("give either --eval-documents or --max-eval-documents")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"--seed {self.seed} must not be negative, and less than 2**63")
        for key, least in _LEAST.items():
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"--{key.replace('_', '-')} {value} must be at least {least}")

    def sources(self, eos_id: int | None) -> Mapping[str, Source]:
        """The source of each domain, in order; those of token ids can be read when ``eos_id`` is given."""
        chats = {
            name: BuiltinChatSource(name, self.builtin_max_bytes, self.seed)
            for name in dict.fromkeys(self.builtin_chat)
        }
        if self.builtin:
            return {**builtin_domains(self.builtin_max_bytes, self.seed), **chats}
        files = {
            name: FileSource(
                tuple(paths),
                text_field=self.text_field,
                messages_field=self.messages_field if name in self.chat_domains else None,
                eos_id=eos_id,
                token_dtype=self.token_dtype,
            )
            for name, paths in self.domains.items()
        }
        return {**files, **chats}

    @property
    def chats(self) -> frozenset[str]:
        """All domains of chats."""
        return frozenset(self.chat_domains) | frozenset(self.builtin_chat)

    def is_builtin(self, name: str) -> bool:
        return self.builtin or name in self.builtin_chat

    @property
    def holdout(self) -> Holdout:
        return Holdout(self.eval_fraction, self.max_eval_documents, self.eval_documents)


_LEAST = {"builtin_max_bytes": 1, "vocab_size": MIN_VOCAB_SIZE, "sequence_length": 2, "max_eval_documents": 1,
          "eval_documents": 1, "decontaminate_ngram": 1, "shard_bytes": 1, "record_seconds": 0,
          "workers": 1}  # fmt: skip
