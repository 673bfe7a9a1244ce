"""What a set's figures trade for each other: FVU against the derivative, from a fit without it to one of it alone.

    python train/studies/trade.py --recipe quickstart

fits the recipe with each of `CHANGES`, measures on the held-out text, and prints a Markdown table. Layers are as their
steps leave them: none is put back to its start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import command_line
from bilinear_tc.train.fitting.steps import fitted
from bilinear_tc.train.measuring.ceiling import ALONE
from bilinear_tc.train.measuring.evaluation import Evaluation
from bilinear_tc.train.measuring.held_out import measure_held_out
from bilinear_tc.train.processes import start_accelerator
from bilinear_tc.train.recipe import named_recipe, option, parse_settings

CHANGES: dict[str, dict[str, Any]] = {
    "closed form, without the derivative": {"max_steps": 0, "jvp": 0.0},
    "closed form": {"max_steps": 0},
    "published set's: noise, constant rate": {
        **{"init": "random", "jvp": 0.0, "lr": 0.02, "lr_schedule": "constant", "momentum": 0.95},
        **{"newton_schulz": "classic", "normalization": "batch", "shuffle_buffer": 0},
    },
    **{f"`jvp` {weight}": {"jvp": weight} for weight in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)},
    "the derivative alone": {"jvp": ALONE},
}
HEADINGS = ("FVU", "ordinary tokens", "Jacobian cosine", "its lowest", "interchange R²", "its lowest", "CE increase")


@dataclass
class TradeSettings:
    """What to fit and measure."""

    recipe: str = option("quickstart", "The recipe to change, by name or YAML file.")
    only: str | None = option(None, "Rows of the table that hold this text. Default: all.")
    loss_tokens: int = option(16384, "Tokens to measure the loss on with all MLPs replaced.")


def row(name: str, evaluation: Evaluation) -> str:
    """A line of the table."""
    layers = evaluation.layers.values()
    lowest = [min(getattr(scores, of) for scores in layers) for of in ("jacobian_cosine", "interchange_worst")]
    means = [evaluation.mean(of) for of in ("fvu", "fvu_ordinary", "jacobian_cosine", "interchange_mean")]
    rise = getattr(evaluation.all_layers, "ce_increase", float("nan"))
    cells = [f"{means[0]:.4f}", f"{means[1]:.4f}", f"{means[2]:.3f}", f"{lowest[0]:.3f}", f"{means[3]:.3f}"]
    return " | ".join([f"| {name}", *cells, f"{lowest[1]:.3f}", f"{rise:.4f} |"])


def main() -> None:
    settings = parse_settings(TradeSettings)
    device = start_accelerator().device
    recipe = named_recipe(settings.recipe)
    base = Base.of_recipe(recipe, device)
    print(f"| change | {' | '.join(HEADINGS)} |\n|{' --- |' * (len(HEADINGS) + 1)}", flush=True)
    for name, change in CHANGES.items():
        if settings.only is None or settings.only in name:
            changed = replace(recipe, **change)
            transcoders = fitted(changed, base, name)
            evaluation = measure_held_out(
                transcoders, changed, base, batch_size=recipe.batch_size, loss_tokens=settings.loss_tokens
            )
            print(row(name, evaluation), flush=True)


if __name__ == "__main__":
    command_line(main)
