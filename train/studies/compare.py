"""The card's recipe, ours and the closed form alone at equal tokens, on one base and one text, in one run.

    python train/studies/compare.py --recipe quickstart --steps 1000

prints held-out FVU of every layer and the tokens that ours needs to reach the card recipe's final FVU, and draws
the curves. `--harden 5` scales the MLPs' pre-activations up and their outputs back down: activations nearer to a
ReLU, as in bigger models.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean

import matplotlib
import torch

from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError, command_line
from bilinear_tc.train.files import write_json, written_whole
from bilinear_tc.train.fitting.fitter import Fitter
from bilinear_tc.train.fitting.steps import fit_steps
from bilinear_tc.train.mlps import linear_maps
from bilinear_tc.train.moments import Moments, fvu
from bilinear_tc.train.processes import start_accelerator
from bilinear_tc.train.recipe import Recipe, named_recipe, option, parse_settings
from bilinear_tc.train.text.batches import TokenBatch
from bilinear_tc.train.text.source import open_held_out

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# What the card's recipe sets differently; text, packing and batch are the same for both.
CARD_SETTINGS = {
    *("init", "normalization", "hidden_multiplier", "optimizer", "momentum", "newton_schulz", "weight_decay"),
    *("lr", "bias_lr", "lr_schedule"),
}
SHORT_FITS = (0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5)


@dataclass
class ComparisonSettings:
    """What to compare on."""

    recipe: str = option("quickstart", "Our recipe: its base, text and settings.")
    steps: int = option(1000, "Optimiser steps of the card's recipe.")
    batch_size: int | None = option(None, "Sequences a step; default: the recipe's.")
    base: str | None = option(None, "Another base.")
    dataset: str | None = option(None, "Another text.")
    harden: float = option(1.0, "Factor on the MLPs' pre-activations.")
    hidden_multiplier: float | None = option(
        None, "Hidden units of ours, in units of its input's width; default: the recipe's."
    )
    eval_tokens: int = option(131072, "Held-out tokens.")
    points: int = option(20, "Points on each curve.")
    output_dir: str = option("runs/comparison", "Where the figures and the JSON go.")


@dataclass
class Curve:
    """Held-out FVU [layers] after some numbers of tokens, those of the calibration sample included."""

    tokens: list[int] = field(default_factory=list)
    fvu: list[list[float]] = field(default_factory=list)

    def add(self, tokens: int, fvu: list[float]) -> None:
        self.tokens.append(tokens)
        self.fvu.append(fvu)

    @property
    def mean(self) -> float:
        """Over the layers, at the end."""
        return fmean(self.fvu[-1])


@torch.no_grad()
def harden(base: Base, factor: float) -> None:
    """Scales the pre-activations of every two-matrix MLP up, and its outputs down, by the same factor."""
    for layer in range(base.num_layers) if factor != 1 else ():
        maps = linear_maps(base.parts(layer))
        if len(maps) != 2:
            raise UserError(f"--harden is for two-matrix MLPs, but {base.mlp_path(layer)} has {len(maps)} linear maps")
        first, last = maps
        first.weight.mul_(factor)
        first.bias.mul_(factor)
        last.weight.div_(factor)


def activations_of(batch: TokenBatch, recipe: Recipe, base: Base) -> Activations:
    """The MLP inputs and outputs of some text, kept for many measurements."""
    device = base.device
    kept = Activations(base, batch.input_ids.numel(), device=device, dtype=recipe.compute_dtype(device))
    kept.fill(batch, recipe.batch_size)
    return kept


@torch.no_grad()
def held_out_fvu(fitter: Fitter, held_out: Activations, rows: int | None = None) -> list[float]:
    """FVU of each of the transcoders as they stand, on the first rows."""
    fitter.stack.set_statistics()
    unexplained = []
    for x, y, transcoder in zip(held_out.x, held_out.y, fitter.stack.transcoders, strict=True):
        x, y = x[:rows].float(), y[:rows].float()
        pairs = zip(x.split(8192), y.split(8192), strict=True)
        errors = sum((b - transcoder(a)).square().sum(0, dtype=torch.float64) for a, b in pairs)
        unexplained.append(fvu(errors, Moments.of(y)).item())
    return unexplained


def run_recipe(recipe: Recipe, base: Base, held_out: Activations, name: str, points: int = 0) -> Curve:
    """Fits a recipe, measuring on held-out text as it goes."""
    curve, every = Curve(), max(1, recipe.max_steps // max(points, 1))
    for steps, (fitter, tokens) in enumerate(fit_steps(recipe, base, name)):
        if steps == recipe.max_steps:
            curve.add(tokens, held_out_fvu(fitter, held_out))
        elif points and steps % every == 0:
            curve.add(tokens, held_out_fvu(fitter, held_out, rows=16384))
    return curve


def shorter(recipe: Recipe, tokens: int) -> Recipe | None:
    """The recipe with as many steps as these tokens pay for, after calibration; None if they pay for none."""
    rows = recipe.batch_size * recipe.seq_len
    init_tokens = min(recipe.init_tokens, tokens // 2 // rows * rows)
    steps = (tokens - init_tokens) // rows
    if init_tokens < rows or steps < 1:
        return None
    return replace(recipe, init_tokens=init_tokens, max_steps=steps)


def draw(curves: dict[str, Curve], path: Path, title: str) -> None:
    """Mean held-out FVU over tokens, log scale."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for (name, curve), style in zip(curves.items(), ("-", "--", "-.", ":"), strict=False):
        mean = [fmean(row) for row in curve.fvu]
        marker = "o" if len(mean) == 1 else None
        axes.plot(curve.tokens, mean, style, marker=marker, label=f"{name}: {curve.mean:.4f}")
    axes.set(yscale="log", xlabel="tokens, calibration included", ylabel="mean held-out FVU", title=title)
    axes.set_ylim(top=1)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=200)
    plt.close(figure)


def compare_recipes(settings: ComparisonSettings, device: torch.device) -> None:
    """Runs the comparison and prints, writes and draws it."""
    ours = named_recipe(settings.recipe)
    changeable = ("base", "dataset", "batch_size", "hidden_multiplier", "eval_tokens")
    ours = replace(ours, **{name: value for name in changeable if (value := getattr(settings, name)) is not None})
    published = asdict(named_recipe("pythia-410m-card"))
    card = replace(ours, max_steps=settings.steps, **{name: published[name] for name in CARD_SETTINGS})
    rows = ours.batch_size * ours.seq_len
    budget = settings.steps * rows
    full = shorter(ours, budget)
    if full is None:
        raise UserError(f"--steps {settings.steps} pay for no step of ours after its calibration: give more")

    base = Base.of_recipe(ours, device)
    harden(base, settings.harden)
    sequences = ours.eval_tokens // ours.seq_len
    with open_held_out(ours, base.tokenizer, device, sequences) as text:
        held_out = activations_of(next(text), ours, base)

    curves = {
        "card's recipe": run_recipe(card, base, held_out, "card's recipe", settings.points),
        "ours": run_recipe(full, base, held_out, "ours", settings.points),
        "closed form alone": run_recipe(replace(full, max_steps=0), base, held_out, "closed form"),
    }
    card_curve, our_curve, closed_curve = curves.values()
    short = Curve()
    for share in SHORT_FITS:
        if recipe := shorter(ours, int(share * budget)):
            curve = run_recipe(recipe, base, held_out, f"ours, {share:.1%} of the tokens")
            short.add(curve.tokens[-1], curve.fvu[-1])
            if short.mean <= card_curve.mean:
                break
    curves["ours, shorter fits"] = short

    print(f"\n{ours.base}, pre-activations × {settings.harden:g}, {settings.steps} steps of {rows:,} rows")
    print(f"hidden units a layer: card {card.n_hidden(base.n_inputs)}, ours {ours.n_hidden(base.n_inputs)}")
    print(f"held-out FVU on {held_out.rows:,} tokens of {ours.dataset} ({ours.eval_split})\n")
    print(f"{'layer':>5}  {'card':>8}  {'ours':>8}  {'ratio':>6}  {'closed form':>11}")
    final = [*zip(card_curve.fvu[-1], our_curve.fvu[-1], closed_curve.fvu[-1], strict=True)]
    means = (card_curve.mean, our_curve.mean, closed_curve.mean)
    for name, (a, b, c) in [*zip(base.layers, final, strict=True), ("mean", means)]:
        print(f"{name:>5}  {a:8.4f}  {b:8.4f}  {b / a:6.2f}  {c:11.4f}")
    outcome = (
        f"the card recipe's final mean FVU is reached with {short.tokens[-1] / budget:.1%} of its tokens "
        f"({short.mean:.4f} after {short.tokens[-1]:,})"
        if short.mean <= card_curve.mean
        else f"no shorter fit reached the card recipe's final mean FVU (best {short.mean:.4f})"
    )
    print(
        f"\nat equal tokens ours is {1 - our_curve.mean / card_curve.mean:.1%} below the card's recipe; "
        f"{sum(b <= a for a, b, _ in final)} of {len(final)} layers at or below it\n{outcome}"
    )
    folder = Path(settings.output_dir)
    with written_whole(folder) as scratch:
        name = f"{Path(ours.base).name}_x{settings.harden:g}"
        if ours.hidden_multiplier != card.hidden_multiplier:
            name += f"_width{ours.hidden_multiplier:g}"
        draw(curves, scratch / f"{name}.png", f"{ours.base}, pre-activations × {settings.harden:g}")
        results = {"settings": asdict(settings), "curves": {k: vars(v) for k, v in curves.items()}}
        write_json(results, scratch / f"{name}.json")
    print(f"wrote {folder / name}.png and .json")


def main() -> None:
    settings = parse_settings(ComparisonSettings)
    compare_recipes(settings, start_accelerator().device)


if __name__ == "__main__":
    command_line(main)
