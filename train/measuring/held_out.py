"""A set measured on held-out text: every measure of this room, over the same batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

from tqdm import tqdm

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.measuring.affine import solve_affine
from bilinear_tc.train.measuring.evaluation import Evaluation, LayerScores
from bilinear_tc.train.measuring.reconstruction import Reconstruction
from bilinear_tc.train.measuring.replacement import NOTHING_TO_PREDICT, Replacement
from bilinear_tc.train.processes import is_main
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.text.batches import TokenBatch
from bilinear_tc.train.text.source import calibration_batches, open_batches, open_held_out

MICRO_BATCH_SIZE = 32  # sequences that the base runs on at once


def measure_held_out(
    transcoders: Sequence[BilinearTC],
    recipe: Recipe,
    base: Base,
    *,
    held_out: Recipe | None = None,
    batch_size: int,
    losses: bool,
) -> Evaluation:
    """Measures a set on its recipe's held-out text, or on the one that `held_out` names.

    UserError if there is no held-out text, or no token to predict in it.

    Args:
        transcoders: the layers' models, on the base's device, in the order of `base.layers`.
        recipe: what they were fitted with; the affine maps are solved on its calibration sample.
        base: the base, with all its layers if `losses` is set.
        held_out: a recipe whose held-out text is taken; default: `recipe`'s own.
        batch_size: sequences at once, over all processes.
        losses: measure the base's loss with its MLPs replaced too: two forward passes a layer.
    """
    held_out = held_out or recipe
    if losses and recipe.seq_len < 2:
        raise UserError(NOTHING_TO_PREDICT)
    if held_out.eval_split is None:
        raise UserError("the recipe names no held-out split (eval_split): name one with --split")
    if (held_out.dataset, held_out.eval_split) == (recipe.dataset, recipe.split):
        raise UserError(
            f"split {held_out.eval_split!r} of {held_out.dataset} is what the set was fitted on: expected held-out "
            "text; name another with --split or --dataset"
        )
    device = base.model.device
    rows = max(recipe.batch_size, batch_size) * recipe.seq_len
    activations = Activations(base, rows, device=device, dtype=base.model.dtype)
    with open_batches(recipe, base.tokenizer, device) as text:
        sample = calibration_batches(recipe, text)
    reconstruction = Reconstruction(
        transcoders, solve_affine(transcoders, sample, activations, MICRO_BATCH_SIZE), device
    )
    replacement = Replacement(base, transcoders) if losses else None
    count = -(-held_out.eval_tokens // (batch_size * recipe.seq_len))
    with open_held_out(held_out, base.tokenizer, device, batch_size, base.vocabulary) as text:
        batches = (batch for _, batch in zip(range(count), text, strict=False))
        shown = tqdm(batches, total=count, desc="held-out text", unit="batch", disable=not is_main())
        evaluation = measure(shown, activations, reconstruction, replacement)
    return replace(evaluation, dataset=held_out.dataset, split=held_out.eval_split, base=recipe.base)


def measure(
    batches: Iterable[TokenBatch],
    activations: Activations,
    reconstruction: Reconstruction,
    replacement: Replacement | None,
) -> Evaluation:
    """Adds up the measures over this process's shares of the held-out batches.

    UserError if the loss is to be measured and there is no token to predict.
    """
    for batch in batches:
        activations.fill(batch, MICRO_BATCH_SIZE)
        reconstruction.add(activations)
        if replacement is not None:
            replacement.add(batch)
    names = [transcoder.config.layer_index for transcoder in reconstruction.transcoders]
    scores = reconstruction.scores()
    tokens = reconstruction.outputs.count
    if replacement is None:
        layers = {name: LayerScores(**own) for name, own in zip(names, scores, strict=True)}
        return Evaluation(layers=layers, tokens=tokens)
    ce, losses, together = replacement.scores()
    layers = {name: LayerScores(**own, **asdict(loss)) for name, own, loss in zip(names, scores, losses, strict=True)}
    return Evaluation(layers=layers, all_layers=together, tokens=tokens, base_ce=ce)
