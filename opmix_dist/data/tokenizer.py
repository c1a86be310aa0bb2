"""The tokenizer of a data folder: trained here or loaded, and run over documents by worker processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from opmix_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte and END_OF_TEXT
TASKS_PER_WORKER = 4  # batches in flight: keeps workers busy and bounds memory


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


class Encoder:
    """Worker processes that tokenise batches of documents; results come back in order.

    Workers are spawned, as a fork of a process that has run threads may hang. Use it as a context manager.
    """

    def __init__(self, tokenizer_dir: Path, eos_id: int, dtype: str, workers: int) -> None:
        self._limit = TASKS_PER_WORKER * workers
        self._pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(str(tokenizer_dir / "tokenizer.json"), eos_id, dtype),
        )

    def encode(self, batches: Iterable[Sequence[str]]) -> Iterator[list[np.ndarray]]:
        """Token ids of each batch's documents, each document [length + 1] with EOS at its end.

        At most ``TASKS_PER_WORKER`` batches per worker are read ahead.

        Raises:
            UserError: a worker process died, most often for want of memory.
        """
        pending: deque[Future[list[np.ndarray]]] = deque()
        try:
            for batch in batches:
                pending.append(self._pool.submit(_encode, batch))
                if len(pending) >= self._limit:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a tokeniser process was killed: give it more memory or fewer --workers"
            ) from None

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(tokenizer_file: str, eos_id: int, dtype: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a document that writes <|endoftext|> does not end there
    _worker.update(tokenizer=tokenizer, eos=np.array([eos_id], dtype=dtype), dtype=dtype)


def _exit_with_parent() -> None:
    """A pool's idle worker never learns that its parent was killed, so it would stay for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: Sequence[str]) -> list[np.ndarray]:
    encodings = _worker["tokenizer"].encode_batch_fast(texts, add_special_tokens=False)
    return [np.append(np.array(one.ids, dtype=_worker["dtype"]), _worker["eos"]) for one in encodings]
