"""How much of what a reader of weights sees first lies where the data hardly goes."""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.processes import sum_over_processes

EIGENVECTORS = 5
DIRECTIONS = 16
TAIL = 0.03  # of the variance


class Covariances:
    """Covariance of each layer's inputs, float64, streaming.

    Args:
        shift: [layers, n_inputs], near the mean, so that float32 products keep the covariance's digits.
    """

    def __init__(self, shift: Tensor) -> None:
        layers, features = shift.shape
        self.shift = shift.float()
        self.counts = shift.new_zeros(layers, dtype=torch.float64)
        self.sums = shift.new_zeros(layers, features, dtype=torch.float64)
        self.products = shift.new_zeros(layers, features, features, dtype=torch.float64)

    def add(self, layer: int, x: Tensor) -> None:
        """Adds rows [rows, n_inputs], float32."""
        x = x - self.shift[layer]
        self.counts[layer] += len(x)
        self.sums[layer] += x.sum(0)
        self.products[layer] += x.T @ x

    def sum_over_processes(self) -> None:
        for name in ("counts", "sums", "products"):
            setattr(self, name, sum_over_processes(getattr(self, name)))

    def covariance(self, layer: int) -> Tensor:
        """[n_inputs, n_inputs] of the rows added."""
        mean = self.sums[layer] / self.counts[layer]
        return self.products[layer] / self.counts[layer] - torch.outer(mean, mean)


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
    tops = transcoder.spectrum(directions, EIGENVECTORS, metric="euclidean").eigenvectors.to(tail)
    return (tail.T @ tops).square().sum(-2).mean().item()


def logit_directions(head: Tensor) -> Tensor:
    """The rows of the output embedding [vocabulary, width] of random tokens, the same at every call."""
    chosen = torch.randperm(len(head), generator=torch.Generator().manual_seed(0))[:DIRECTIONS]
    return head[chosen.to(head.device)].float()
