"""What an ingest has to do: which domains are there already, and which may not be touched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opmix_dist.data.catalogue import find_domains, read_domain
from opmix_dist.data.prepare_config import TRAIN_TOKENIZER, PrepareConfig
from opmix_dist.data.source import SourceFile
from opmix_dist.data.sources import files_fingerprint
from opmix_dist.data.staging import Settings, Staging
from opmix_dist.data.survey import Survey
from opmix_dist.data.workers import FileFault
from opmix_dist.data.writing import DomainWriter
from opmix_dist.errors import UserError

ONE_PER_FOLDER = ("tokenizer", "vocab_size", "sequence_length")


@dataclass
class Job:
    """A domain to make."""

    name: str
    chat: bool
    settings: Settings
    files: Sequence[SourceFile]
    staging: Staging
    survey: Survey
    writer: DomainWriter | None = None

    @contextmanager
    def naming_files(self) -> Iterator[None]:
        """Give what a worker finds wrong the name of its file."""
        try:
            yield
        except FileFault as fault:
            raise UserError(f"{self.files[fault.file].name}{fault.reason}") from None


@dataclass(frozen=True)
class Plan:
    """The domains of a command, by what is to be done."""

    settings: Mapping[str, Settings]
    """Of all, in order."""
    todo: Sequence[str]
    kept: Sequence[str]
    """Finished ones, and those that the command does not name."""


def all_settings(
    config: PrepareConfig,
    files: Mapping[str, Sequence[SourceFile]],
    grams: str | None,
    chat_template: str | None,
) -> Iterator[tuple[str, Settings]]:
    """All that decides each domain's content, in the words of PrepareConfig; a rerun compares it.

    Args:
        config: the command's.
        files: of each domain's source.
        grams: fingerprint of the evaluation texts.
        chat_template: the template's text.
    """
    shared = _shared_settings(config, grams)
    template = hashlib.sha256(chat_template.encode()).hexdigest() if chat_template is not None else None
    earlier = ""  # a chained digest: what an earlier domain holds is dropped from the later ones
    for name, paths in config.sources(None).items():
        chat = name in config.chats
        listing = files_fingerprint(files[name])
        yield (
            name,
            {
                **shared,
                "messages_field": config.messages_field if chat else None,
                "builtin_max_bytes": config.builtin_max_bytes if config.is_builtin(name) else None,
                "chat_template": template if chat else None,
                "sources": list(paths.names),
                "files": listing,
                "earlier_domains": earlier,
            },
        )
        earlier = hashlib.sha256(f"{earlier} {name} {listing}".encode()).hexdigest()


def _shared_settings(config: PrepareConfig, grams: str | None) -> Settings:
    exact = config.eval_documents is not None
    return {
        "tokenizer": config.tokenizer,
        "vocab_size": config.vocab_size if config.tokenizer == TRAIN_TOKENIZER else None,
        "sequence_length": config.sequence_length,
        "eval_fraction": None if exact else config.eval_fraction,
        "max_eval_documents": config.max_eval_documents,
        "eval_documents": config.eval_documents,
        "decontaminate_ngram": None if grams is None else config.decontaminate_ngram,
        "decontaminate": grams,
        "text_field": config.text_field,
        "token_dtype": config.token_dtype,
        "compression": config.compression,
        "shard_bytes": config.shard_bytes,
        "seed": config.seed,
    }


def make_plan(root: Path, settings: Mapping[str, Settings], *, overwrite: bool) -> Plan:
    """Compare what is wanted with what is in ``root``.

    Raises:
        UserError: a finished domain was made with other settings and may not be overwritten, cannot share a
            folder with what is wanted, or something else has a domain's name.
    """
    finished = find_domains(root) if root.exists() else []
    todo: list[str] = []
    for name, wanted in settings.items():
        if name not in finished:
            if (root / name).exists():
                raise UserError(f"{root / name} is in the way and not from `opmix prepare`: move it")
            todo.append(name)
        elif differing := _difference(root, name, wanted, wanted):
            if not overwrite:
                changed = "from other files, or these have changed"
                how = changed if differing == "files" else f"with another `{differing}`"
                raise UserError(
                    f"domain {name} in {root} was prepared {how}: pass --overwrite to replace it, or another "
                    f"--out"
                )
            todo.append(name)
    chats = [wanted for wanted in settings.values() if wanted["messages_field"] is not None]
    for name in sorted(set(finished) - set(settings)):
        _require_one_folder(root, name, next(iter(settings.values())), ONE_PER_FOLDER)
        if chats and read_domain(root, name).packing == "best_fit":
            _require_one_folder(root, name, chats[0], ("chat_template",))
    return Plan(settings, todo, [name for name in finished if name not in todo])


def _require_one_folder(root: Path, name: str, wanted: Settings, keys: Iterable[str]) -> None:
    """UserError when the finished domain ``name`` cannot be beside one with the ``wanted`` settings."""
    if differing := _difference(root, name, wanted, keys):
        raise UserError(f"{root} holds domain {name} with another `{differing}`: pass another --out")


def _difference(root: Path, name: str, wanted: Settings, keys: Iterable[str]) -> str | None:
    """The first of ``keys`` on which the recorded settings are not the wanted ones."""
    recorded = read_domain(root, name).settings
    return next((key for key in keys if key not in recorded or recorded[key] != wanted[key]), None)
