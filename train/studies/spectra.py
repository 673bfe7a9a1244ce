"""What reading spectra costs, and what they say of the data, about the mean and the origin and in both metrics.

    python train/studies/spectra.py --transcoders runs/quickstart
    OMP_NUM_THREADS=1 python train/studies/spectra.py --width 1024
    OMP_NUM_THREADS=1 python train/studies/spectra.py --width 3584

The first reads a set's logit directions on its held-out text. The others time a layer of random weights, with inputs
whose principal variances fall as 1/i, and with white ones, the hardest case, whose spectrum has no gaps.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bilinear_tc import modeling_bilinear_tc
from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError, command_line
from bilinear_tc.train.measuring.low_variance import DIRECTIONS
from bilinear_tc.train.recipe import option, parse_settings
from bilinear_tc.train.run import Run
from bilinear_tc.train.text.source import open_held_out

DENSE_UP_TO = 2048  # widths at which all eigenvalues are taken too, to compare with
RANKS = (1, 2, 4, 8, 16, 32)


@dataclass
class SpectraSettings:
    """What to read."""

    transcoders: str | None = option(None, "A run, whose layers are read on its held-out text.")
    width: int | None = option(None, "Or the width of a random layer of four times as many units, to time.")
    k: int = option(8, "Eigenvalues of each of the 16 directions that are timed.")


def random_layer(width: int, *, white: bool) -> BilinearTC:
    torch.manual_seed(0)
    tc = BilinearTC(BilinearTCConfig(width, 4 * width, width, input_correlation=not white)).requires_grad_(False)
    if not white:
        axes = torch.linalg.qr(torch.randn(width, width)).Q
        covariance = axes / torch.arange(1, width + 1) @ axes.T
        scale = covariance.diagonal().rsqrt()
        tc.input_correlation.copy_(scale[:, None] * covariance * scale)
    return tc


def seconds(read: Callable[[], object]) -> float:
    """Processor time of a reading whose weights were not read before."""
    modeling_bilinear_tc._WEIGHTS.clear()
    start = time.process_time()
    read()
    return time.process_time() - start


def time_readings(width: int, k: int, *, white: bool) -> None:
    """Prints what a few eigenvalues of some directions at once cost, and what all of each at a time do."""
    tc, u = random_layer(width, white=white), torch.randn(DIRECTIONS, width)
    some = seconds(partial(tc.spectrum, u, k))
    start = time.process_time()
    found = tc.spectrum(u, k).eigenvalues
    again = time.process_time() - start
    print(
        f"{'white' if white else 'correlated'} inputs, width {width}, {DIRECTIONS} directions, k = {k}: {some:.2f} s, "
        f"{again:.2f} s once the weights are read"
    )
    if width <= DENSE_UP_TO:
        dense = sum(seconds(partial(tc.spectrum, row, metric="euclidean")) for row in u)
        expected = torch.stack([tc.spectrum(row).eigenvalues[:k] for row in u[:2]])
        error = ((found[:2] - expected).abs() / found[:2, :1].abs()).max()
        print(
            f"  all eigenvalues of one direction at a time: {dense:.2f} s, {dense / some:.1f} times as much; largest "
            f"difference {error:.0e} of the first"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  peak memory of the process so far: {peak:.2f} GiB", flush=True)


def r_squared(value: Tensor, rest: Tensor) -> float:
    """Mean over directions of the share of the variance that is not left in `rest`, each [directions, rows]."""
    return (1 - rest.var(-1) / value.var(-1)).mean().item()


def read_layer(tc: BilinearTC, x: Tensor, u: Tensor) -> list[str]:
    """A layer's cells: correlation of the quadratic and the linear part about the origin and the mean, then, by metric
    and rank, R² of the linear part with the first terms."""
    correlations, cells = [], []
    for about in ("origin", "mean"):
        parts = tc.quadratic_form(u, about).parts(x)
        each = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*parts, strict=True)]
        correlations.append(f"{torch.stack(each).mean():.2f}")
    value = u @ tc(x).T
    for metric in ("covariance", "euclidean"):
        spectrum = tc.spectrum(u, metric=metric)
        delta = x - spectrum.about
        linear = spectrum.linear @ delta.T
        terms = (spectrum.eigenvalues.unsqueeze(1) * (delta @ spectrum.eigenvectors).square()).cumsum(-1)
        shares = [r_squared(value, value - linear - terms[..., k - 1]) for k in RANKS]
        cells.append(" ".join(f"{share:.2f}" for share in shares))
    linear_alone = r_squared(value, value - linear)
    return [*correlations, f"{linear_alone:.2f}", *cells]


@torch.no_grad()
def read_set(where: str) -> None:
    """Prints a Markdown table of `read_layer` of every layer, on held-out text and 16 tokens' logit directions."""
    run = Run(where)
    recipe, device = run.recipe, torch.device("cpu")
    base = Base.of_recipe(recipe, device, run.layers)
    activations = Activations(base, recipe.batch_size * recipe.seq_len, device=device, dtype=base.model.dtype)
    with open_held_out(recipe, base.tokenizer, device, recipe.batch_size, base.vocabulary) as text:
        activations.fill(next(iter(text)), recipe.batch_size)
    tokens = torch.randperm(base.vocabulary or 0, generator=torch.Generator().manual_seed(0))[:DIRECTIONS].tolist()
    print(
        f"on {activations.rows} tokens, mean over {DIRECTIONS} logit directions; R² with the first "
        f"{', '.join(map(str, RANKS))} terms\n"
    )
    print(
        "| layer | correlation about the origin | about the mean | R² of the linear part | by covariance | Euclidean |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for index, layer in enumerate(base.layers):
        tc = run.load(layer).double()
        u = torch.stack([tc.logit_direction(base.model, token) for token in tokens])
        print(" | ".join([f"| {layer}", *read_layer(tc, activations.x[index].double(), u)]) + " |", flush=True)


def main() -> None:
    settings = parse_settings(SpectraSettings)
    if (settings.transcoders is None) == (settings.width is None):
        raise UserError("expected one of --transcoders RUN and --width N")
    if settings.transcoders is not None:
        read_set(settings.transcoders)
    if settings.width is not None:
        for white in (False, True):
            time_readings(settings.width, settings.k, white=white)


if __name__ == "__main__":
    command_line(main)
