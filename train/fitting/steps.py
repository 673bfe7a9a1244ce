"""A fit in memory alone, step by step: for measures and studies that fit as they go."""

from __future__ import annotations

from collections.abc import Iterator

from tqdm import tqdm

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.base import Base
from bilinear_tc.train.fitting.fitter import Fitter
from bilinear_tc.train.processes import is_main
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.text.source import calibration_batches, open_batches


def fit_steps(recipe: Recipe, base: Base, name: str) -> Iterator[tuple[Fitter, int]]:
    """A fit under a bar of this name: the fitter, and the tokens read, at its start and after each of its steps."""
    with open_batches(recipe, base.tokenizer, base.device, base.vocabulary) as text:
        fitter = Fitter(recipe, base, base.device)
        tokens = fitter.start(calibration_batches(recipe, text)) if recipe.init == "mlp" else 0
        yield fitter, tokens
        for step in tqdm(range(recipe.max_steps), desc=name, unit="step", disable=not is_main()):
            tokens += fitter.step(next(text), step)[2]
            yield fitter, tokens


def fitted(recipe: Recipe, base: Base, name: str) -> list[BilinearTC]:
    """The transcoders that a recipe's fit ends with."""
    *_, (fitter, _tokens) = fit_steps(recipe, base, name)
    fitter.stack.set_statistics()
    return fitter.stack.transcoders
