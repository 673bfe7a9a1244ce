"""A set measured on held-out text: every measure of this room, over the same batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice

from tqdm import tqdm

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.massive import RULE
from bilinear_tc.train.measuring.affine import solve_affine
from bilinear_tc.train.measuring.continuation import Continuing
from bilinear_tc.train.measuring.evaluation import Evaluation, LayerScores, finite
from bilinear_tc.train.measuring.reconstruction import Reconstruction
from bilinear_tc.train.measuring.replacement import NOTHING_TO_PREDICT, Replacement
from bilinear_tc.train.measuring.sample import Sample
from bilinear_tc.train.measuring.standard_error import standard_error
from bilinear_tc.train.measuring.weights import weight_scores
from bilinear_tc.train.processes import is_main
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.shard import Shard
from bilinear_tc.train.text.batches import TokenBatch
from bilinear_tc.train.text.source import open_batches, open_held_out

MICRO_BATCH_SIZE = 32  # sequences that the base runs on at once


def measure_held_out(
    transcoders: Sequence[BilinearTC],
    recipe: Recipe,
    base: Base,
    *,
    held_out: Recipe | None = None,
    batch_size: int,
    loss_tokens: int = 0,
    shard: Shard | None = None,
) -> Evaluation:
    """Measures a set on its recipe's held-out text, or on the one that `held_out` names.

    UserError if there is no held-out text, or no token to predict in it.

    Args:
        transcoders: the models, on the base's device, in the order of `base.layers`: of this process's layers or, if
            there are `loss_tokens`, of all.
        recipe: what they were fitted with; the affine maps are solved on its calibration sample.
        base: the base, with all its layers if there are `loss_tokens`.
        held_out: a recipe whose held-out text is taken; default: `recipe`'s own.
        batch_size: sequences at once, over all processes.
        loss_tokens: held-out tokens to measure the base's loss on with its MLPs replaced.
        shard: which layers are this process's own; default: all are every process's.
    """
    held_out, losses = held_out or recipe, loss_tokens > 0
    if losses and recipe.seq_len < 2:
        raise UserError(NOTHING_TO_PREDICT)
    check_held_out(held_out, recipe)
    device = base.device
    shard = shard or Shard(len(base.layers))
    rows = shard.sequences(max(recipe.batch_size, batch_size)) * recipe.seq_len
    activations = Activations(base, rows, device=device, dtype=base.model.dtype, shard=shard)
    own = transcoders[shard.own.start : shard.own.stop] if losses else transcoders
    solved_on = -(-recipe.init_tokens // (recipe.batch_size * recipe.seq_len))  # fewer would flatter what is compared
    with open_batches(recipe, base.tokenizer, device, base.vocabulary) as text:
        affine = solve_affine(own, shown(text, solved_on, "affine maps to compare with"), activations, MICRO_BATCH_SIZE)
    reconstruction = Reconstruction(own, affine, device)
    replacement = Replacement(base, transcoders) if losses else None
    count, loss_count = (-(-tokens // (batch_size * recipe.seq_len)) for tokens in (held_out.eval_tokens, loss_tokens))
    with open_held_out(held_out, base.tokenizer, device, batch_size, base.vocabulary) as text:
        batches = shown(text, max(count, loss_count), "held-out text")
        evaluation = measure(batches, activations, reconstruction, replacement, count, loss_count)
    return replace(evaluation, dataset=held_out.dataset, split=held_out.eval_split, base=recipe.base)


def check_held_out(held_out: Recipe, recipe: Recipe) -> None:
    """UserError if a recipe names no held-out text, or names as such what `recipe` was fitted on."""
    if held_out.eval_split is None:
        raise UserError("the recipe names no held-out split (eval_split): name one with --split")
    if (held_out.dataset, held_out.eval_split) == (recipe.dataset, recipe.split):
        raise UserError(
            f"split {held_out.eval_split!r} of {held_out.dataset} is what the set was fitted on: expected held-out "
            "text; name another with --split or --dataset"
        )


def shown(batches: Iterable[TokenBatch], count: int, title: str) -> Iterator[TokenBatch]:
    """The first batches, with a bar on the main process."""
    return iter(tqdm(islice(batches, count), total=count, desc=title, unit="batch", disable=not is_main()))


def measure(
    batches: Iterable[TokenBatch],
    activations: Activations,
    reconstruction: Reconstruction,
    replacement: Replacement | None,
    count: int | None = None,
    loss_count: int | None = None,
) -> Evaluation:
    """Adds up the measures over this process's shares of the held-out batches.

    UserError if the loss is to be measured and there is no token to predict.

    Args:
        batches: the held-out text.
        activations: buffers for one batch.
        reconstruction, replacement: new ones, of the layers that the buffers hold, and of all.
        count, loss_count: how many batches are for the layers' scores, and how many for the losses; default: all.
    """
    sample, shard = Sample(activations.base), activations.shard
    continuing = Continuing(activations.base, replacement.groups[-1] if replacement else [])
    for number, batch in enumerate(batches):
        if count is None or number < count:
            activations.fill(batch, MICRO_BATCH_SIZE)
            whole = shard.whole(batch)
            with shard.alone():
                reconstruction.add(activations, whole)
            sample.add(batch)
        if replacement is not None and (loss_count is None or number < loss_count):
            replacement.add(batch)
            continuing.add(batch)
    sample.take(shard.gather(reconstruction.ordinary.median))
    with shard.alone():
        scores, influences = reconstruction.scores()
        ordinary, transcoders = reconstruction.ordinary, reconstruction.transcoders
        covariances = [reconstruction.inputs.covariance(layer) for layer in range(len(transcoders))]
        stds = [moments.std for moments in ordinary.outputs]
        of_weights = weight_scores(sample.of(shard), transcoders, covariances, stds)
    scores = shard.join([own | others for own, others in zip(scores, of_weights, strict=True)])
    of_means = standard_error(shard.gather(influences).mean(0)).tolist()
    mean_se = finite(dict(zip(("fvu_se", "fvu_ordinary_se"), of_means, strict=True)))
    evaluation = Evaluation(layers={}, tokens=reconstruction.tokens, massive_rule=RULE, mean_se=mean_se)
    if replacement is not None:
        lost = replacement.scores()
        scores = [own | asdict(loss) for own, loss in zip(scores, lost.layers, strict=True)]
        evaluation = replace(
            evaluation,
            all_layers=lost.together,
            continuations=continuing.scores(),
            base_ce=lost.base_ce,
            loss_tokens=lost.tokens,
            mean_se=evaluation.mean_se | lost.mean_se,
        )
    names = shard.join([transcoder.config.layer_index for transcoder in transcoders])
    layers = {name: LayerScores(**finite(own)) for name, own in zip(names, scores, strict=True)}
    return replace(evaluation, layers=layers)
