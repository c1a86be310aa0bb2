"""The tokenizer of a data folder: trained here or loaded, and how worker processes come by it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opmix_dist.data.catalogue import tokenizer_fingerprint
from opmix_dist.data.samples import DType
from opmix_dist.data.workers import FileFault
from opmix_dist.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte and END_OF_TEXT


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, so that every text decodes to itself.

    The same documents in the same order give the same tokenizer. ``<|endoftext|>`` is its beginning, end
    and padding token. Little text gives fewer than ``vocab_size`` tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """Load a Hugging Face tokenizer from a folder or a hub id, never running code that comes with it.

    Raises:
        UserError: it cannot be found or read, has no EOS token, or no fast (Rust) form.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises what it stumbles on, AttributeError among others
        reason = " ".join(str(error).split())
        raise UserError(f"cannot load the tokenizer {source}: {reason}") from None
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {source} has no tokenizer.json: save it in the fast format first")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {source} has no EOS token, which ends every document: set eos_token")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save in the Hugging Face format; OSError when a file cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises no narrower one, for a full disk too
        raise OSError(str(error)) from error


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Largest token id plus one: what an embedding needs, also where ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


@dataclass(frozen=True)
class TokenizerFiles:
    """A saved tokenizer, as it is named to worker processes, which load it once each."""

    folder: str
    fingerprint: str
    eos_id: int
    vocab_size: int

    @classmethod
    def of(cls, folder: Path, tokenizer: PreTrainedTokenizerFast) -> TokenizerFiles:
        """``tokenizer`` was saved in ``folder``."""
        eos_id = tokenizer.eos_token_id
        assert isinstance(eos_id, int)  # `load_tokenizer` refuses one without
        return cls(str(folder), tokenizer_fingerprint(folder), eos_id, vocab_size(tokenizer))

    @property
    def dtype(self) -> DType:
        """The smallest that holds the vocabulary."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def backend(self) -> Tokenizer:
        """What encodes text, without transformers, whose import takes seconds."""
        return _load_backend(self)

    def full(self) -> PreTrainedTokenizerFast:
        """With its chat template."""
        return _load_full(self)

    def decode(self, ids: np.ndarray) -> str:
        return self.backend().decode(ids.tolist(), skip_special_tokens=False)


@functools.cache
def _load_backend(files: TokenizerFiles) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(files.folder) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a document that writes <|endoftext|> does not end there
    return tokenizer


@functools.cache
def _load_full(files: TokenizerFiles) -> PreTrainedTokenizerFast:
    return load_tokenizer(files.folder)


def check_ids(ids: np.ndarray, file: int, vocab_size: int) -> None:
    """Raises FileFault when token ids that came from a file are none of the tokenizer's."""
    if len(ids) and (ids.max() >= vocab_size or ids.min() < 0):
        wrong = int(ids.max()) if ids.max() >= vocab_size else int(ids.min())
        raise FileFault(
            file,
            f" holds the token id {wrong}, but the tokenizer has ids below {vocab_size}: pass the "
            f"--tokenizer that made the file, and its --token-dtype",
        )
