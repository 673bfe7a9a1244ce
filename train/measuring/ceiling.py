"""How near to an MLP's derivative transcoders of a form and width come: what those fitted to nothing else reach."""

from __future__ import annotations

import dataclasses

from bilinear_tc.train.base import Base
from bilinear_tc.train.fitting.steps import fitted
from bilinear_tc.train.measuring.evaluation import Evaluation
from bilinear_tc.train.measuring.held_out import measure_held_out
from bilinear_tc.train.recipe import Recipe

ALONE = 1e4  # a weight of the derivative at which nothing else counts


def with_ceiling(evaluation: Evaluation, recipe: Recipe, base: Base, held_out: Recipe, batch_size: int) -> Evaluation:
    """An evaluation with each layer's `jacobian_ceiling`, for which the set's recipe is run once more, with the weight
    of the derivative `ALONE`. UserError if a layer's MLP has no derivative to fit."""
    alone = dataclasses.replace(recipe, jvp=ALONE)
    reached = measure_held_out(
        fitted(alone, base, "the derivative alone"), alone, base, held_out=held_out, batch_size=batch_size
    )
    layers = {
        layer: dataclasses.replace(scores, jacobian_ceiling=reached.layers[layer].jacobian_cosine)
        for layer, scores in evaluation.layers.items()
    }
    return dataclasses.replace(evaluation, layers=layers)
