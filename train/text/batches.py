"""Documents → fixed-length token batches: packed, shuffled, prefetched and resumable at every batch."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from bilinear_tc.train.errors import UserError
from bilinear_tc.train.processes import available_cores
from bilinear_tc.train.text.documents import Documents, TextError
from bilinear_tc.train.text.encode import Encoder, Piece

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Enough text that handing it to a thread costs nothing beside tokenizing it.
CHUNK_CHARACTERS = 1 << 17
# A longer document is tokenized in pieces, so that one giant file neither fills the memory nor a checkpoint.
PIECE_CHARACTERS = 1 << 20
CLOSE_SECONDS = 10.0


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of some sequences.

    Attributes:
        input_ids: [sequences, seq_len] int64.
        mask: [sequences, seq_len] bool, False on padding; None if every position is text.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TokenBatch:
        """The batch with its tensors changed."""
        return TokenBatch(change(self.input_ids), None if self.mask is None else change(self.mask))

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on a device, copied asynchronously from pinned memory."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class _Position:
    """Everything that decides what comes next. The arrays are never written to, so a position costs no copy."""

    documents: dict  # the documents' own position, before the document that is read next …
    offset: int  # … of which this many characters have been read
    epoch: int  # full passes so far
    generator: Mapping[str, Any]  # state of the shuffle's generator
    tokens: np.ndarray  # too few for a sequence yet
    pool: list[np.ndarray] = field(default_factory=list)  # sequences held back by the shuffle
    drawn: list[np.ndarray] = field(default_factory=list)  # sequences not yet in a batch


class TokenBatches(Iterator[TokenBatch], contextlib.AbstractContextManager):
    """An iterator of batches of `batch_size` sequences of `seq_len` tokens, made ahead by a thread.

    Text is read by the thread, tokenized by others and packed: documents follow one another, with an end of text after
    each, and are cut into sequences without padding. The batches depend on the arguments before `workers`, and on
    `bos`, alone. The threads start with the first batch and end with `close`, the text or a failure.

    Args:
        documents: where the text comes from; belongs to this object while it iterates.
        tokenizer: the base's.
        seq_len: tokens a sequence.
        batch_size: sequences a batch.
        pack: False: one sequence a document, truncated or padded with the end of text, and the padding masked out.
        shuffle_buffer: how many sequences are held back; each that follows takes the place of one drawn at random.
            At the end of a pass the rest is drawn too, so that a pass holds each sequence once. 0: no shuffle.
        seed: of the shuffle.
        workers: tokenizing threads, as `Encoder` has them; None: two fewer than there are cores, at most 8.
        prefetch: how many batches are made ahead.
        pin_memory: hand batches out in page-locked memory, for asynchronous copies to a GPU.
        epochs: how many passes over the text to make; None: no end, with one warning at the start of the second.
            Sequences that do not fill a batch go into the next pass; after the last they are a smaller batch.
        vocabulary: rows of the base's embedding, which no token may be beyond.
        bos: the ids that each sequence starts with, put before those that do not do so by themselves, as the beginning
            of a document does if the tokenizer adds them. They count among the `seq_len`.

    Raises:
        ValueError: here, if the tokenizer has no end of text (a UserError) or an argument is out of range.
        TextError: while iterating, if the text is unreadable or too little for one batch, or the tokenizer fails. The
            batches before it are handed out first, and `state_dict` stays at the last of them.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seq_len: int,
        batch_size: int,
        pack: bool = True,
        shuffle_buffer: int = 0,
        seed: int = 0,
        workers: int | None = None,
        prefetch: int = 4,
        pin_memory: bool = False,
        epochs: int | None = None,
        vocabulary: int | None = None,
        bos: Sequence[int] = (),
    ) -> None:
        for least, values in (
            (1, {"seq_len": seq_len, "batch_size": batch_size, "prefetch": prefetch, "epochs": epochs}),
            (0, {"shuffle_buffer": shuffle_buffer, "workers": workers}),
        ):
            for name, value in values.items():
                if value is not None and value < least:
                    raise ValueError(f"{name} must be at least {least}, but is {value}")
        if seq_len <= len(bos):
            raise UserError(
                f"seq_len must be at least {len(bos) + 1}, since each sequence starts with bos, got {seq_len}"
            )
        self.seq_len, self.batch_size, self.pack, self._documents = seq_len, batch_size, pack, documents
        self._bos = np.array(bos, np.int32)
        # Tokenizing must not starve the fit.
        threads = max(0, min(8, available_cores() - 2)) if workers is None else workers
        self._encoder = Encoder(tokenizer, None if pack else seq_len, threads)
        self._shuffle_buffer = shuffle_buffer
        self._prefetch, self._pin_memory, self._epochs, self._vocabulary = prefetch, pin_memory, epochs, vocabulary
        self._producer: _Producer[tuple[TokenBatch, _Position]] | None = None
        self._start = documents.state_dict()
        generator = np.random.default_rng(seed).bit_generator.state
        self._position = _Position(self._start, 0, 0, generator, tokens=np.empty(0, np.int32))

    def __next__(self) -> TokenBatch:
        if self._producer is None:
            self._producer = _Producer(self._batches(self._position), self._prefetch)
        batch, self._position = self._producer.take()
        return batch

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads. Iterating again goes on after the last batch handed out."""
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    @property
    def skipped(self) -> int:
        """Rows left out so far."""
        return self._position.documents.get("skipped", 0)

    def state_dict(self) -> dict:
        """The position after the last batch handed out: plain numbers, strings and int32 tensors."""
        position = self._position
        return {
            "seq_len": self.seq_len,
            "pack": self.pack,
            "bos": self._bos.tolist(),
            **vars(position),
            "tokens": torch.from_numpy(position.tokens.copy()),
            "pool": _join(position.pool),
            "drawn": _join(position.drawn),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a position that `state_dict` gave, with the same batches as if there had been no break.

        UserError if the position is of sequences of another kind; TextError if it is of other text.
        """
        for name, value in (("seq_len", self.seq_len), ("pack", self.pack), ("bos", self._bos.tolist())):
            before = state.get(name, [])  # an earlier version had no `bos`
            if before != value:
                raise UserError(f"the text position was saved with {name} {before}, but {name} is {value} now")
        self.close()
        self._documents.load_state_dict(state["documents"])
        arrays = {"tokens": state["tokens"].numpy(), "pool": _split(state["pool"]), "drawn": _split(state["drawn"])}
        plain = {name: state[name] for name in ("documents", "offset", "epoch", "generator")}
        self._position = _Position(**plain, **arrays)

    def _batches(self, position: _Position) -> Generator[tuple[TokenBatch, _Position], None, None]:
        """Batches from a position on, each with the position after it."""
        shuffle = _Shuffle(self._shuffle_buffer, position.pool, position.generator)
        whole = position.documents == self._start and not position.offset and not position.epoch
        self._documents.load_state_dict(position.documents)
        position = yield from self._full_batches(position)
        while self._epochs is None or position.epoch < self._epochs:
            sequences_in_pass = 0
            with contextlib.closing(self._encoder.encode(self._chunks(position.offset))) as encoded:
                for ids, (documents, offset) in encoded:
                    sequences, tokens = self._cut(position.tokens, ids)
                    sequences_in_pass += len(sequences)
                    drawn = position.drawn + shuffle.exchange(sequences)
                    position = replace(position, tokens=tokens, drawn=drawn, **shuffle.state)
                    position = replace(position, documents=documents, offset=offset)
                    position = yield from self._full_batches(position)
            least = self.batch_size if self._epochs is None else 1
            if whole and sequences_in_pass < least:
                raise TextError(
                    f"the text is too short: it holds {sequences_in_pass} sequences of {self.seq_len} tokens, fewer"
                    f" than one batch of {least}; give more text, or a smaller batch_size or seq_len"
                )
            whole = True
            documents, drawn = self._documents.state_dict(), position.drawn + shuffle.drain()
            position = replace(position, epoch=position.epoch + 1, documents=documents, offset=0)
            position = replace(position, drawn=drawn, **shuffle.state)
            if self._epochs is None and position.epoch == 1:
                logger.warning("the text has been read to its end; it is read again from the beginning")
            position = yield from self._full_batches(position)
        if position.drawn:
            yield self._batch(position.drawn), replace(position, drawn=[])

    def _full_batches(self, position: _Position) -> Generator[tuple[TokenBatch, _Position], None, _Position]:
        """As many batches as are drawn; returns the position after them."""
        while len(position.drawn) >= self.batch_size:
            sequences, left = position.drawn[: self.batch_size], position.drawn[self.batch_size :]
            position = replace(position, drawn=left)
            yield self._batch(sequences), position
        return position

    def _chunks(self, offset: int) -> Iterator[tuple[list[Piece], tuple[dict, int]]]:
        """The rest of a pass in pieces, each chunk with the documents' position and the offset after it."""
        pieces: list[Piece] = []
        characters = 0
        before = self._documents.state_dict()
        try:
            for text in self._documents:
                after = self._documents.state_dict()
                for piece, end in self._pieces(text, offset):
                    pieces.append(piece)
                    characters += len(piece.text)
                    if characters >= CHUNK_CHARACTERS:
                        yield pieces, (after, 0) if piece.ends else (before, end)
                        pieces, characters = [], 0
                before, offset = after, 0
        except Exception:
            yield pieces, (before, offset)  # the text before the failure is as good as any
            raise
        yield pieces, (before, offset)

    def _pieces(self, text: str, start: int) -> Iterator[tuple[Piece, int]]:
        """A document from `start` on, cut after a line break if it is long; each piece with its end."""
        while start < len(text):
            end = len(text)
            if self.pack and end - start > PIECE_CHARACTERS:
                limit = start + PIECE_CHARACTERS
                end = text.rfind("\n", start + PIECE_CHARACTERS // 2, limit) + 1 or limit
            yield Piece(text[start:end], starts=start == 0, ends=end == len(text)), end
            start = end

    def _cut(self, tokens: np.ndarray, ids: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
        """Sequences, and the tokens left over for the next one."""
        if not self.pack:
            return [self._begun(document) for document in ids if len(document)], tokens
        tokens = np.concatenate([tokens, *ids])
        sequences, start = [], 0
        while len(tokens) - start >= self.seq_len:  # with fewer, a cut would depend on how the text comes in
            taken = tokens[start : start + self.seq_len]
            sequences.append(self._begun(taken))
            start += self.seq_len if sequences[-1] is taken else self.seq_len - len(self._bos)
        return sequences, tokens[start:]

    def _begun(self, tokens: np.ndarray) -> np.ndarray:
        """A sequence that starts with `bos`: the tokens themselves, or those that there is room for after it."""
        if np.array_equal(tokens[: len(self._bos)], self._bos):
            return tokens
        return np.concatenate([self._bos, tokens])[: self.seq_len]

    def _batch(self, sequences: list[np.ndarray]) -> TokenBatch:
        if self.pack:
            batch = TokenBatch(torch.from_numpy(np.stack(sequences).astype(np.int64)))
        else:
            input_ids = torch.full((len(sequences), self.seq_len), self._encoder.eos)
            lengths = torch.tensor([len(sequence) for sequence in sequences])
            mask = torch.arange(self.seq_len) < lengths[:, None]
            input_ids[mask] = torch.from_numpy(np.concatenate(sequences)).long()
            batch = TokenBatch(input_ids, mask)
        if self._vocabulary is not None and (last := int(batch.input_ids.max())) >= self._vocabulary:
            raise TextError(
                f"expected the base's own tokenizer, got the token {last} for an embedding of {self._vocabulary} rows"
            )
        return batch.map(torch.Tensor.pin_memory) if self._pin_memory else batch


class _Shuffle:
    """A pool of `size` sequences, each of which leaves it when another draws its place."""

    def __init__(self, size: int, pool: list[np.ndarray], generator: Mapping[str, Any]) -> None:
        self._size = size
        self._pool = list(pool)
        self._generator = np.random.default_rng()
        self._generator.bit_generator.state = generator

    @property
    def state(self) -> dict[str, Any]:
        return {"pool": list(self._pool), "generator": self._generator.bit_generator.state}

    def exchange(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        """Takes sequences in and gives back those that they push out."""
        if not self._size:
            return sequences
        room = max(0, self._size - len(self._pool))
        self._pool += sequences[:room]
        drawn = []
        entering = sequences[room:]
        for sequence, place in zip(entering, self._generator.integers(self._size, size=len(entering)), strict=True):
            drawn.append(self._pool[place])
            self._pool[place] = sequence
        return drawn

    def drain(self) -> list[np.ndarray]:
        """Gives back all that are left."""
        drawn = [self._pool[place] for place in self._generator.permutation(len(self._pool))]
        self._pool = []
        return drawn


class _Producer(Generic[T]):
    """Runs an iterator in a thread, up to `ahead` items ahead of who takes them."""

    def __init__(self, items: Generator[T, None, None], ahead: int) -> None:
        self._items = items
        self._queue: queue.Queue[T | BaseException] = queue.Queue(ahead)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="text", daemon=True)
        self._thread.start()

    def take(self) -> T:
        """The next item; raises what ended the iterator, a StopIteration or its failure, again and again."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)
            raise item
        return item

    def close(self) -> None:
        """Ends the thread; one that waits for the network is left to end with the process."""
        self._closing.set()
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()  # makes room for the item that the thread holds
            self._thread.join(0.01)

    def _run(self) -> None:
        try:
            for item in self._items:
                self._queue.put(item)
                if self._closing.is_set():
                    break
            self._items.close()
            self._queue.put(StopIteration())
        except BaseException as error:
            self._queue.put(error)


def _join(sequences: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """Sequences as int32 tensors: their tokens in one, their lengths in the other."""
    tokens = np.concatenate([np.empty(0, np.int32), *sequences])
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int32)
    return {"tokens": torch.from_numpy(tokens), "lengths": lengths}


def _split(joined: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """The inverse of `_join`."""
    ends = joined["lengths"].cumsum(0).tolist()
    tokens = joined["tokens"].numpy()
    return [tokens[end - length : end] for end, length in zip(ends, joined["lengths"].tolist(), strict=True)]
