"""The baseline: the best affine map from each MLP's input to its output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.activations import Activations
from bilinear_tc.train.fitting.least_squares import LeastSquares
from bilinear_tc.train.text.batches import TokenBatch

RIDGE = 1e-6


def solve_affine(
    transcoders: Sequence[BilinearTC], batches: Iterable[TokenBatch], activations: Activations, micro_batch_size: int
) -> tuple[Tensor, Tensor]:
    """The best affine map of each layer on the batches: weights [layers, n_outputs, n_inputs] and biases.

    Args:
        transcoders: the layers' models, whose statistics keep the sums' digits; they change no solution.
        batches: the text to solve on.
        activations: buffers for one batch.
        micro_batch_size: sequences that the base runs on at once.
    """
    equations = LeastSquares(
        torch.stack([t.input_mean for t in transcoders]), torch.stack([t.output_mean for t in transcoders])
    )
    for batch in batches:
        activations.fill(batch, micro_batch_size)
        for layer in range(len(transcoders)):
            equations.add(layer, activations.x[layer].float(), activations.y[layer].float())
    with activations.shard.alone():
        equations.sum_over_processes()
    weights, biases = zip(*(equations.solve(layer, ridge=RIDGE) for layer in range(len(transcoders))), strict=True)
    return torch.stack(weights).float(), torch.stack(biases).float()
