"""One setting changed at a time: what each is worth, on text not fitted on, at equal tokens.

    python train/studies/tune.py --harden 5

fits a few layers briefly with the recipe as it is and with each of `CHANGES`, and prints a Markdown table. The text
that a change is scored on is the part of the fit's own stream that follows what the fit reads: the held-out split,
which the published figures are measured on, has no part in choosing the settings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import command_line
from bilinear_tc.train.processes import start_accelerator
from bilinear_tc.train.recipe import Recipe, named_recipe, option, parse_settings
from bilinear_tc.train.studies.compare import activations_of, harden, run_recipe
from bilinear_tc.train.text.batches import TokenBatch
from bilinear_tc.train.text.source import calibration_batches, open_batches

CHANGES: list[dict[str, Any]] = [
    {},
    {"lr": 0.02},
    {"lr": 0.08},
    {"lr_schedule": "constant"},
    {"lr_schedule": "wsd"},
    {"momentum": 0.95},
    {"newton_schulz": "classic"},
    {"weight_decay": 0.0},
    {"weight_decay": 0.1},
    {"bias_lr": 3e-3},
    {"normalization": "batch"},
    {"batch_size": 16, "max_steps": 400, "lr": 0.03},
    {"optimizer": "normuon", "lr": 0.02},
    {"optimizer": "adamw", "lr": 3e-3},
    {"init": "random"},
    {"hidden_multiplier": 8.0},
]


@dataclass
class TuningSettings:
    """What to try the changes on."""

    recipe: str = option("quickstart", "The recipe to change.")
    steps: int = option(200, "Optimiser steps of each fit.")
    layers: str = option("1,2,4", "Layers to fit.")
    harden: float = option(1.0, "Factor on the MLPs' pre-activations.")
    eval_tokens: int = option(131072, "Tokens that a change is scored on.")


def following_text(recipe: Recipe, base: Base, device: torch.device) -> Activations:
    """MLP inputs and outputs of the `eval_tokens` that the text goes on with where the recipe's fit ends."""
    count = -(-recipe.eval_tokens // (recipe.batch_size * recipe.seq_len))
    with open_batches(recipe, base.tokenizer, device) as text:
        calibration_batches(recipe, text)
        batches = list(islice(text, recipe.max_steps, recipe.max_steps + count))
    following = TokenBatch(torch.cat([batch.input_ids for batch in batches]))
    return activations_of(following, recipe, base)


def main() -> None:
    settings = parse_settings(TuningSettings)
    device = start_accelerator().device
    own = vars(settings)
    recipe = replace(
        named_recipe(settings.recipe), max_steps=settings.steps, **{k: own[k] for k in ("layers", "eval_tokens")}
    )
    base = Base.of_recipe(recipe, device)
    harden(base, settings.harden)
    following = following_text(recipe, base, device)
    print(f"| change | mean FVU | to the recipe | layers {settings.layers} |\n| --- | --- | --- | --- |")
    kept = 0.0
    for change in CHANGES:
        name = ", ".join(f"{key} {value}" for key, value in change.items())
        curve = run_recipe(replace(recipe, **change), base, following, name or "recipe")
        kept = kept or curve.mean
        by_layer = ", ".join(f"{value:.4f}" for value in curve.fvu[-1])
        print(f"| {name or 'none'} | {curve.mean:.4f} | {curve.mean / kept - 1:+.1%} | {by_layer} |", flush=True)


if __name__ == "__main__":
    command_line(main)
