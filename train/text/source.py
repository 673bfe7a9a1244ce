"""A recipe's text as batches of tokens, read by the main process and shared out over all of them."""

from __future__ import annotations

from itertools import islice

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.text.batches import SharedBatches, TokenBatch, TokenBatches
from bilinear_tc.train.text.documents import Documents, TextError


def check_text(recipe: Recipe) -> None:
    """Raises TextError where the text to fit on, or the text held out, cannot be had: before the base is loaded."""
    _documents(recipe, recipe.split)
    if recipe.eval_split is None:
        return
    if recipe.eval_split == recipe.split:
        raise TextError(
            f"the fit is on the split {recipe.split!r}, and so is eval_split: name a held-out one, or none to measure "
            "nothing"
        )
    try:
        _documents(recipe, recipe.eval_split)
    except TextError as error:
        raise TextError(f"no held-out text: {error}; name another --eval_split, or none to measure nothing") from error


def open_batches(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator) -> SharedBatches:
    """The text that a recipe fits on, endless, in its order."""
    return _open(recipe, tokenizer, accelerator, recipe.split, recipe.batch_size, recipe.shuffle_buffer, None)


def open_held_out(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, batch_size: int
) -> SharedBatches:
    """The text that a recipe holds out, once through."""
    return _open(recipe, tokenizer, accelerator, recipe.eval_split, batch_size, 0, 1)


def _open(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    split: str,
    batch_size: int,
    shuffle_buffer: int,
    epochs: int | None,
) -> SharedBatches:
    batches = None
    if accelerator.is_main_process:
        batches = TokenBatches(
            _documents(recipe, split),
            tokenizer,
            seq_len=recipe.seq_len,
            batch_size=batch_size,
            pack=recipe.pack,
            shuffle_buffer=shuffle_buffer,
            seed=recipe.seed,
            workers=recipe.tokenizer_workers,
            pin_memory=accelerator.device.type == "cuda",
            epochs=epochs,
        )
    return SharedBatches(batches, accelerator)


def _documents(recipe: Recipe, split: str) -> Documents:
    return Documents(recipe.dataset, config=recipe.dataset_config, split=split, text_column=recipe.text_column)


def calibration_batches(recipe: Recipe, batches: SharedBatches) -> list[TokenBatch]:
    """The calibration sample: the first `init_tokens` of the text, in whole batches."""
    return list(islice(batches, -(-recipe.init_tokens // (recipe.batch_size * recipe.seq_len))))
