"""Text → token ids, in threads: a fast tokenizer is written in Rust, and releases the interpreter while it works.

Worker processes would gain nothing and start slowly. In million tokens per second of processor time, with two of each
on two cores (12 million characters of English in documents of 5,000; medians of 10 or more; the cores were shared with
other jobs, so these figures differ by chance by a tenth):

    tokenizer (vocabulary)   these threads   worker processes   the tokenizer's own threads   one thread
    quickstart (2,048)       1.11            1.15               1.14                          1.15
    SmolLM2 (49,152)         0.62            0.54               0.68                          0.55

The interpreter is held for under 0.1 µs a token. The tokenizer's own threads cannot be limited for one tokenizer alone.
"""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from typing import NamedTuple, TypeVar

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

from bilinear_tc.train.errors import UserError, one_line
from bilinear_tc.train.text.documents import TextError

T = TypeVar("T")


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    starts: bool = True  # a document begins here: the tokenizer's special tokens are added
    ends: bool = True  # a document ends here: an end of text is added


class Encoder:
    """Token ids of pieces of text. UserError if the tokenizer has no end of text.

    Attributes:
        eos: the end of text.
        bos: what the tokenizer puts before a text by default: one id, or none, or several (GLM).

    Args:
        tokenizer: what `tokenizer(text)["input_ids"]` gives is what `encode` gives.
        truncate: None: the end of text is added after each document. A number: documents are truncated to this many
            tokens and nothing is added.
        threads: how many chunks are tokenized at once while the next are read. 0, and a tokenizer written in Python:
            one, for which reading waits.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, truncate: int | None = None, threads: int = 0) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("the base's tokenizer must have an end-of-text token (eos_token), but it has none")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the fit needs the other cores
        self.eos: int = tokenizer.eos_token_id
        self._truncate = truncate
        self._tokenizer = copy.deepcopy(getattr(tokenizer, "backend_tokenizer", tokenizer))
        self._threads = 0
        if isinstance(self._tokenizer, tokenizers.Tokenizer):
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._threads = threads
        self._adds_eos = False
        self._adds_eos = all(list(self._ids(text, True, False)[-1:]) == [self.eos] for text in ("", "a"))
        beginnings = zip(*(self._ids(text, True, False).tolist() for text in ("", "a")), strict=False)
        self.bos: list[int] = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], beginnings)]

    def encode(self, chunks: Iterable[tuple[list[Piece], T]]) -> Generator[tuple[list[np.ndarray], T], None, None]:
        """For each chunk in turn one int32 array a piece, beside whatever came with the chunk.

        TextError if the tokenizer fails.
        """
        pool = ThreadPoolExecutor(max(self._threads, 1), thread_name_prefix="encode")
        try:
            for ids, label in self._ahead(chunks, pool):
                yield ids.result(), label
        finally:
            pool.shutdown(cancel_futures=True)

    def _ahead(self, chunks: Iterable[tuple[list[Piece], T]], pool: ThreadPoolExecutor) -> Iterator[tuple[Future, T]]:
        """The results to come, with two chunks a thread under way."""
        waiting: deque[tuple[Future, T]] = deque()
        try:
            for pieces, label in chunks:
                waiting.append((pool.submit(self._encoded, pieces), label))
                if len(waiting) > 2 * self._threads:
                    yield waiting.popleft()
        except Exception:
            yield from waiting  # the text read before the failure is as good as any
            raise
        yield from waiting

    def _encoded(self, pieces: list[Piece]) -> list[np.ndarray]:
        try:
            if self._truncate is not None:
                return [self._truncated(piece.text, self._truncate) for piece in pieces]
            return [self._ids(*piece) for piece in pieces]
        except Exception as error:
            raise TextError(f"the tokenizer failed on a document: {one_line(error)}") from error

    def _ids(self, text: str, starts: bool, ends: bool) -> np.ndarray:
        if isinstance(self._tokenizer, tokenizers.Tokenizer):
            ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=starts)[0].ids
        else:
            ids = self._tokenizer(text, add_special_tokens=starts, verbose=False)["input_ids"]
        if self._adds_eos and starts:  # one at each document's end is enough, and at a piece's end it is none
            ids = ids[:-1]
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
