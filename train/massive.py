"""Massive rows: the few tokens, attention sinks mostly, whose MLP output is far larger than all others.

In SmolLM2-135M's layer 11 it is 920 times the typical one at 0.9% of the tokens (massive activations: Sun et al. 2024,
arXiv:2402.17762). Such rows own every sum that they are part of, so statistics are of the ordinary rows, and in a loss
a massive row counts by its error relative to its size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_tc.train.processes import sum_over_processes

MASSIVE = 10.0  # times the typical norm


def typical_norms(y: Tensor) -> Tensor:
    """The geometric mean of the norms of y's rows, over all processes; rows of zeros are passed over.

    Args:
        y: MLP outputs [layers, rows, n_outputs].

    Returns:
        [layers] float64; 1 for a layer without rows.
    """
    sums = torch.zeros(2, len(y), dtype=torch.float64, device=y.device)
    for layer, rows in enumerate(y):
        norms = rows.float().norm(dim=-1).double()
        sums[:, layer] = torch.stack([norms.where(norms > 0, 1).log().sum(), (norms > 0).sum()])
    logs, counts = sum_over_processes(sums)
    return (logs / counts.clamp(min=1)).exp()


def row_weights(y: Tensor, typical: Tensor) -> Tensor:
    """What each row counts in a loss: 1 if it is ordinary, (typical / norm)² if it is massive.

    Args:
        y: MLP outputs [layers, rows, n_outputs].
        typical: `typical_norms` [layers] of a sample.

    Returns:
        [layers, rows] float32. A weight of 1 marks the ordinary rows.
    """
    weights = torch.ones(y.shape[:2], device=y.device)
    for layer, rows in enumerate(y):
        ratio = rows.float().norm(dim=-1) / typical[layer].float()
        weights[layer] = torch.where(ratio > MASSIVE, ratio.square().reciprocal(), 1)
    return weights
