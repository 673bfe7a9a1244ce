"""A recipe's text as batches of tokens, read by the main process and shared out over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from bilinear_tc.train.errors import one_line
from bilinear_tc.train.processes import is_main, process_count, process_index
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.text.batches import TokenBatch, TokenBatches
from bilinear_tc.train.text.documents import Documents, TextError
from bilinear_tc.train.text.encode import Encoder


class SharedBatches(Iterator[TokenBatch], AbstractContextManager):
    """The main process's batches on every process: each iterates, and gets its own share of every batch's sequences.

    Shares are contiguous, in the order of the processes, and differ by one sequence at most; one may be empty. If the
    text ends or fails, it does so on all processes at once.

    Batches travel over a gloo group of their own, between CPUs: they are small, and no device has to be waited for.
    TextError while iterating, on the other processes if the main process's batches fail in any way (there what was
    raised is raised).

    Args:
        batches: on the main process; None on the others.
        device: where this process's shares are put.
    """

    def __init__(self, batches: TokenBatches | None, device: torch.device) -> None:
        if (batches is None) == is_main():
            raise ValueError("batches must be given on the main process, and be None on the others")
        self._batches = batches
        self._device = device
        self._group = dist.new_group(backend="gloo") if process_count() > 1 else None

    def __next__(self) -> TokenBatch:
        # What every process gets: a batch, the sentence of a failure, or None at the end of the text.
        message: list[TokenBatch | str | None] = [None]
        failure: Exception | None = None
        if self._batches is not None:
            try:
                message = [next(self._batches, None)]
            except Exception as error:
                message, failure = [one_line(error)], error
        if self._group is not None:
            dist.broadcast_object_list(message, src=0, group=self._group)
        (batch,) = message
        if batch is None:
            raise StopIteration
        if isinstance(batch, str):
            raise failure or TextError(batch)
        start, end = (rank * len(batch) // process_count() for rank in (process_index(), process_index() + 1))
        return batch.map(lambda tensor: tensor[start:end]).to(self._device)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the main process's threads."""
        if self._batches is not None:
            self._batches.close()

    @property
    def skipped(self) -> int:
        """Rows left out so far, on the main process."""
        return 0 if self._batches is None else self._batches.skipped

    def state_dict(self) -> dict:
        """The position of the main process's batches; empty on the others."""
        return {} if self._batches is None else self._batches.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Go on from a position, on the main process; nothing to do on the others, which may pass an empty one."""
        if self._batches is not None:
            self._batches.load_state_dict(state)


def check_text(recipe: Recipe, held_out: Recipe | None = None) -> None:
    """Raises TextError if the text to fit on, or that held out, cannot be had, or they share a file: before the base
    is loaded. The second is the recipe's own or, of a set that has been fitted, that of `held_out`."""
    fitted, measured = _documents(recipe, recipe.split), held_out or recipe
    if measured.eval_split is None:
        return
    if held_out is None and recipe.eval_split == recipe.split:
        raise TextError(
            f"the fit is on the split {recipe.split!r}, and so is eval_split: name a held-out one, or none to measure "
            "nothing"
        )
    another = "name another --split" if held_out else "name another --eval_split, or none to measure nothing"
    try:
        documents = _documents(measured, measured.eval_split)
    except TextError as error:
        raise TextError(f"no held-out text: {error}; {another}") from error
    if shared := sorted(set(fitted.files) & set(documents.files)):
        raise TextError(f"eval_split {measured.eval_split!r} holds {shared[0]}, which the fit is on: {another}")


def settled_bos(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a recipe's sequences start with, "none" or token ids, where it may say `auto`."""
    return recipe.bos if recipe.bos != "auto" else ",".join(map(str, Encoder(tokenizer).bos)) or "none"


def open_batches(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: torch.device, vocabulary: int | None = None
) -> SharedBatches:
    """The text that a recipe fits on, endless, in its order."""
    order = {"batch_size": recipe.batch_size, "shuffle_buffer": recipe.shuffle_buffer}
    return _open(recipe, tokenizer, device, recipe.split, vocabulary, order)


def open_held_out(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    batch_size: int,
    vocabulary: int | None = None,
) -> SharedBatches:
    """The text that a recipe holds out, once through; the recipe must name an `eval_split`."""
    assert recipe.eval_split is not None
    return _open(recipe, tokenizer, device, recipe.eval_split, vocabulary, {"batch_size": batch_size, "epochs": 1})


def calibration_batches(recipe: Recipe, batches: SharedBatches) -> list[TokenBatch]:
    """The calibration sample: the first `init_tokens` of the text, in whole batches."""
    return list(islice(batches, -(-recipe.init_tokens // (recipe.batch_size * recipe.seq_len))))


def _open(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    split: str,
    vocabulary: int | None,
    order: dict[str, Any],
) -> SharedBatches:
    if not is_main():
        return SharedBatches(None, device)
    bos = settled_bos(recipe, tokenizer)
    order |= {"seq_len": recipe.seq_len, "pack": recipe.pack, "seed": recipe.seed, "vocabulary": vocabulary}
    order["bos"] = [] if bos == "none" else [int(token) for token in bos.split(",")]
    machine: dict[str, Any] = {"workers": recipe.tokenizer_workers, "pin_memory": device.type == "cuda"}
    return SharedBatches(TokenBatches(_documents(recipe, split), tokenizer, **order, **machine), device)


def _documents(recipe: Recipe, split: str) -> Documents:
    """A split of the recipe's dataset, or a file of its own that is named in place of one."""
    file = Path(split)
    rows: dict[str, Any] = {"text_column": recipe.text_column, "skip_bad_rows": recipe.skip_bad_rows}
    if file.is_file() and (file.is_absolute() or not Path(recipe.dataset, split).exists()):
        return Documents(split, **rows)
    return Documents(recipe.dataset, config=recipe.dataset_config, split=split, **rows)
