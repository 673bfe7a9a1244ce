"""Ridge least squares of all layers at once, from normal equations accumulated over a stream of rows."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from bilinear_tc.train.processes import sum_over_processes

logger = logging.getLogger(__name__)


class LeastSquares:
    """Normal equations of `targets ≈ weight · features + bias`, one problem a layer.

    Features and targets are shifted before the products are taken, so that float32 products summed in float64
    keep the covariance's digits. Any shift near the mean will do: it changes no solution.

    Args:
        feature_shift: [layers, n_features], the same on all processes.
        target_shift: [layers, n_targets], the same on all processes.
    """

    def __init__(self, feature_shift: Tensor, target_shift: Tensor) -> None:
        self.feature_shift, self.target_shift = feature_shift.float(), target_shift.float()
        (layers, n_features), n_targets = feature_shift.shape, target_shift.shape[1]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(layers, *shape, dtype=torch.float64, device=feature_shift.device)

        self.counts = zeros()
        self.feature_sums, self.target_sums = zeros(n_features), zeros(n_targets)
        self.gram, self.cross = zeros(n_features, n_features), zeros(n_features, n_targets)

    def add(self, layer: int, features: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        """Adds rows: features [rows, n_features], targets [rows, n_targets], weights [rows] (default: 1), float32."""
        features, targets = features - self.feature_shift[layer], targets - self.target_shift[layer]
        weights = features.new_ones(len(features)) if weights is None else weights
        weighted = features * weights.unsqueeze(-1)
        self.counts[layer] += weights.sum()
        self.feature_sums[layer] += weighted.sum(0)
        self.target_sums[layer] += (targets * weights.unsqueeze(-1)).sum(0)
        self.gram[layer] += weighted.T @ features
        self.cross[layer] += weighted.T @ targets

    def add_without_bias(self, layer: int, features: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Adds rows of `targets ≈ weight · features`, in which the bias has no part; arguments as for `add`."""
        weighted = features * weights.unsqueeze(-1)
        self.gram[layer] += weighted.T @ features
        self.cross[layer] += weighted.T @ targets

    def sum_over_processes(self) -> None:
        """Adds up the equations of all processes."""
        for name in ("counts", "feature_sums", "target_sums", "gram", "cross"):
            setattr(self, name, sum_over_processes(getattr(self, name)))

    def solve(self, layer: int, *, ridge: float, prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The ridge solution of one layer, with an unpenalized bias.

        Features are scaled to unit variance first, so that `ridge` is relative to each feature's variance and the
        scaled matrix's condition is at most n_features / ridge. A feature that does not vary keeps its prior.

        Args:
            ridge: penalty on the distance to the prior, in units of a feature's variance.
            prior: [n_targets, n_features] weights to shrink to; default: zero.

        Returns:
            weight [n_targets, n_features] and bias [n_targets], float64.
        """
        n = self.counts[layer]
        feature_mean, target_mean = self.feature_sums[layer] / n, self.target_sums[layer] / n
        covariance = self.gram[layer] / n - torch.outer(feature_mean, feature_mean)
        cross = self.cross[layer] / n - torch.outer(feature_mean, target_mean)
        variance = covariance.diagonal()
        # float32 products leave a constant feature a variance of about 1e-7 of its shifted mean square
        varies = (variance > 1e-5 * self.gram[layer].diagonal() / n) & (variance > 1e-14 * variance.max())
        std = variance.clamp(min=0).sqrt()
        if not varies.all():
            logger.warning("%d of %d features do not vary: they keep their start", (~varies).sum(), len(varies))
        inverse_std = torch.where(varies, 1 / std.where(varies, 1), 0)
        prior = torch.zeros_like(cross.T) if prior is None else prior.double()
        scaled = inverse_std[:, None] * covariance * inverse_std
        scaled.diagonal().add_(ridge)
        scaled.diagonal()[~varies] = 1
        residual = inverse_std[:, None] * (cross - covariance @ prior.T)
        factor, failed = torch.linalg.cholesky_ex(scaled)
        while failed:  # the features of a narrow text lack a rank, by more than the ridge makes up for in rounding
            logger.warning(
                "problem %d: its %d features have rank %d or less; the ridge is raised from %.0e to %.0e",
                *(layer, len(scaled), int(failed) - 1, ridge, 10 * ridge),
            )
            scaled.diagonal()[varies] += 9 * ridge
            ridge *= 10
            factor, failed = torch.linalg.cholesky_ex(scaled)
        step = torch.cholesky_solve(residual, factor)
        weight = prior + (inverse_std[:, None] * step).T
        shifted_mean = feature_mean + self.feature_shift[layer]
        return weight, target_mean + self.target_shift[layer] - weight @ shifted_mean
