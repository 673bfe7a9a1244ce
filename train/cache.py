"""Writes the MLP inputs and outputs that a fit needs, once: fits of other settings then read them.

    python train/cache.py --recipe quickstart --layers 3 --activations runs/cache
    python train/fit.py --recipe quickstart --layers 3 --activations runs/cache --lr 0.02 --output_dir runs/lr-0.02

Its flags are the fit's. What is there already stays: the same command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError, command_line
from bilinear_tc.train.files import locked
from bilinear_tc.train.fitting.fitter import choose_micro_batch_size
from bilinear_tc.train.measuring.held_out import MICRO_BATCH_SIZE
from bilinear_tc.train.processes import is_main, on_main, process_count, start_accelerator
from bilinear_tc.train.recipe import Recipe, parse_recipe
from bilinear_tc.train.recording import FIT, Recording
from bilinear_tc.train.text.source import check_text, open_batches, open_held_out, settled_bos


def cache(recipe: Recipe) -> None:
    """Writes what is missing of the activations that a recipe's fit reads, on all processes together."""
    if recipe.activations is None:
        raise UserError("no folder to write to: name one with --activations")
    accelerator = start_accelerator()
    device, folder = accelerator.device, Path(recipe.activations)
    with suppress(OSError):  # the lock says why
        folder.mkdir(parents=True, exist_ok=True)
    on_main(lambda: check_text(recipe))
    base = Base.of_recipe(recipe, device)
    base.stop_after_last_layer()
    recipe = dataclasses.replace(recipe, bos=settled_bos(recipe, base.tokenizer))
    recording = Recording(recipe, base)
    accelerator.print(f"{folder}: {recording.bytes_needed / 1e9:.3f} GB for {len(base.layers)} layers")
    share = -(-recipe.batch_size // process_count())
    chosen = recipe.micro_batch_size or choose_micro_batch_size(recipe, base, share, device, base.model.dtype)
    with ExitStack() as held:
        on_main(lambda: held.enter_context(locked(folder)))
        on_main(recording.begin)
        for text, count in recording.needed.items():
            at_once = chosen if text == FIT else MICRO_BATCH_SIZE  # as the fit has it, to the last bit
            where, words = (recipe, base.tokenizer, device), base.vocabulary
            opened = open_batches(*where, words) if text == FIT else open_held_out(*where, recipe.batch_size, words)
            with opened as batches:
                shown = tqdm(islice(batches, count), text, total=count, unit="batch", disable=not is_main())
                for number, batch in enumerate(shown):
                    if not recording.path(text, number).is_file():
                        recording.write(text, number, batch, at_once)
        accelerator.wait_for_everyone()
        on_main(lambda: recording.note(recording.needed))
    accelerator.state.destroy_process_group()


def main() -> None:
    cache(parse_recipe())


if __name__ == "__main__":
    command_line(main)
