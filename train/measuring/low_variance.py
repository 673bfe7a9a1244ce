"""How much of what a reader of weights sees first lies where the data hardly goes."""

from __future__ import annotations

import copy

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from bilinear_tc.modeling_bilinear_tc import BilinearTC

EIGENVECTORS = 5
DIRECTIONS = 16
TAIL = 0.03  # of the variance


def low_variance_share(transcoder: BilinearTC, covariance: Tensor, directions: Tensor) -> float:
    """The share of the top eigenvectors' squared norm in the input directions that carry the last 3% of the variance.

    The eigenvectors are the five of largest |λ| of the quadratic form (raw units) of each output direction; the mean
    is over them and over the directions. The input directions are the covariance's eigenvectors, least variance
    first, as long as they carry no more than 3% of it together.

    Args:
        covariance: [n_inputs, n_inputs] of the inputs, raw units.
        directions: [directions, n_outputs].
    """
    variances, vectors = torch.linalg.eigh(covariance)
    tail = vectors[:, variances.cumsum(0) <= TAIL * variances.sum()]
    alone = copy.copy(transcoder)  # the float64 weights that it reads are forgotten with it
    tops = alone.spectrum(directions.to(covariance.device), EIGENVECTORS, metric="euclidean").eigenvectors.to(tail)
    return (tail.T @ tops).square().sum(-2).mean().item()


def logit_directions(head: nn.Linear) -> Tensor:
    """The rows of the output embedding [vocabulary, width] of random tokens, the same at every call."""
    chosen = torch.randperm(head.out_features, generator=torch.Generator().manual_seed(0))[:DIRECTIONS]
    with align_module_device(head):
        return head.weight[chosen.to(head.weight.device)].float()
