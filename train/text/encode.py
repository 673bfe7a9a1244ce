"""Text → token ids, in this process or in worker processes that import nothing but a tokenizer.

The workers are plain subprocesses fed through pipes instead of a `ProcessPoolExecutor`: a forked worker is unsafe once
CUDA or threads are in use, and a spawned one first imports the parent's main script, here torch and transformers.
A worker ends when its standard input does, hence with its parent, however that dies.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    starts: bool = True  # a document begins here: the tokenizer's special tokens are added
    ends: bool = True  # a document ends here: an end of text is added


class EncodeError(RuntimeError):
    """The tokenizer has failed, or a worker process has ended before its time."""


class Encoder:
    """Token ids of pieces of text.

    Args:
        tokenizer: what `tokenizer(text)["input_ids"]` gives is what `encode` gives.
        truncate: None: the end of text is added after each document. A number: documents are truncated to this many
            tokens and nothing is added.

    Raises:
        ValueError: if the tokenizer has no end of text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, truncate: int | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the base's tokenizer must have an end-of-text token (eos_token), but it has none")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the fit needs the other cores
        self.eos: int = tokenizer.eos_token_id
        self.truncate = truncate
        self._tokenizer = copy.deepcopy(getattr(tokenizer, "backend_tokenizer", tokenizer))
        if isinstance(self._tokenizer, tokenizers.Tokenizer):
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()

    def encode(self, pieces: list[Piece]) -> list[np.ndarray]:
        """One int32 array a piece.

        Raises:
            EncodeError: if the tokenizer fails.
        """
        try:
            if self.truncate is not None:
                return [self._truncated(piece.text, self.truncate) for piece in pieces]
            return [self._ids(*piece) for piece in pieces]
        except Exception as error:
            raise EncodeError(f"the tokenizer failed on a document: {type(error).__name__}: {error}") from error

    def _ids(self, text: str, starts: bool, ends: bool) -> np.ndarray:
        if isinstance(self._tokenizer, tokenizers.Tokenizer):
            ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=starts)[0].ids
        else:
            ids = self._tokenizer(text, add_special_tokens=starts, verbose=False)["input_ids"]
        return np.array([*ids, self.eos] if ends else ids, dtype=np.int32)

    def _truncated(self, text: str, length: int) -> np.ndarray:
        """The first tokens of a document, read no further than they need.

        What follows a cut changes no token but the last few before it, hence the margin.
        """
        margin = 32
        characters = 6 * (length + margin)
        while characters < len(text):
            ids = self._ids(text[:characters], True, False)
            if len(ids) >= length + margin:
                return ids[:length]
            characters *= 2
        return self._ids(text, True, False)[:length]


class EncoderPool:
    """Encodes lists of pieces in worker processes, or in this one if there are none.

    Args:
        encoder: copied into each worker.
        workers: how many processes to start.
    """

    def __init__(self, encoder: Encoder, workers: int) -> None:
        self._encoder = encoder
        self._workers = [_start_worker() for _ in range(workers)]
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        # As many threads as workers: each waits for one of them, so that none is ever idle for want of a reader.
        self._threads = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="encode")
        for worker in self._workers:
            with contextlib.suppress(BrokenPipeError):  # told when its first result is asked for
                pickle.dump(encoder, worker.stdin)
            self._idle.put(worker)

    def encode(self, chunks: Iterable[tuple[list[Piece], T]]) -> Iterator[tuple[list[np.ndarray], T]]:
        """The token ids of each chunk's pieces, beside whatever came with them, in the order given.

        Raises:
            EncodeError: if the tokenizer fails or a worker process has ended, killed or for want of memory.
        """
        if not self._workers:
            yield from ((self._encoder.encode(pieces), label) for pieces, label in chunks)
            return
        for result, label in self._ahead(chunks):
            yield result.result(), label

    def close(self) -> None:
        """Ends the workers, whatever they are at."""
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            with contextlib.suppress(BrokenPipeError):
                worker.communicate()

    def _ahead(self, chunks: Iterable[tuple[list[Piece], T]]) -> Iterator[tuple[Future[list[np.ndarray]], T]]:
        """The results to come, with two chunks a worker under way."""
        waiting: deque[tuple[Future[list[np.ndarray]], T]] = deque()
        try:
            for pieces, label in chunks:
                waiting.append((self._threads.submit(self._ask, pieces), label))
                if len(waiting) > 2 * len(self._workers):
                    yield waiting.popleft()
        except Exception:
            yield from waiting  # what was read before reading failed is as good as without workers
            raise
        yield from waiting

    def _ask(self, pieces: list[Piece]) -> list[np.ndarray]:
        worker = self._idle.get()
        try:
            pickle.dump(pieces, worker.stdin)
            worker.stdin.flush()
            reply = pickle.load(worker.stdout)
        except (OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise EncodeError(
                f"a tokenising worker process ended unexpectedly (exit status {_exit_status(worker)};"
                " -9 often means that memory ran out); resume from the last checkpoint,"
                " with fewer tokenizer_workers if it happens again"
            ) from error
        finally:
            self._idle.put(worker)
        if isinstance(reply, EncodeError):
            raise reply
        return reply


def _start_worker() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C is for the parent, which may still want a checkpoint
    )


def _exit_status(worker: subprocess.Popen) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return worker.wait(timeout=5)
    return None


def serve() -> None:
    """A worker's life: reads an encoder, then lists of pieces, and answers each with its token ids or the error."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not get among the replies
    with contextlib.suppress(EOFError, pickle.UnpicklingError, BrokenPipeError):  # the parent has gone
        encoder = pickle.load(requests)
        while True:
            pieces = pickle.load(requests)
            try:
                reply = encoder.encode(pieces)
            except EncodeError as error:
                reply = error
            pickle.dump(reply, replies)
            replies.flush()
    os._exit(0)  # past the destructors, which would try to flush into the closed pipe
