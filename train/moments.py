"""Streaming mean, variance and covariance, and the fraction of variance unexplained (FVU) that rests on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilinear_tc.train.errors import NotFiniteError
from bilinear_tc.train.processes import process_count, sum_over_processes


@dataclass
class Moments:
    """Count, mean and summed squared deviation of each feature, in float64, of any leading shape.

    Attributes:
        count: [..., 1], the rows seen, or the sum of their weights.
        mean: [..., features].
        deviation: [..., features], Σ (x − mean)².
    """

    count: Tensor
    mean: Tensor
    deviation: Tensor

    @classmethod
    def zeros(cls, *shape: int, device: torch.device | str | None = None) -> Moments:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(zeros(*shape[:-1], 1), zeros(*shape), zeros(*shape))

    @classmethod
    def of(cls, x: Tensor, weights: Tensor | None = None) -> Moments:
        """Moments over the rows of x: [..., rows, features], each counted as its weight says: [..., rows]."""
        x = x.float()
        weights = x.new_ones(x.shape[:-1]) if weights is None else weights.float()
        count = weights.sum(-1, keepdim=True)
        weights = weights.unsqueeze(-1)
        # two plain sums: torch.var_mean over a leading axis takes twenty times as long on the CPU
        mean = (x * weights).sum(-2) / count.clamp(min=1)
        deviation = (x - mean.unsqueeze(-2)).square().mul(weights).sum(-2)
        return cls(count.double(), mean.double(), deviation.double())

    @staticmethod
    def stack(moments: list[Moments]) -> Moments:
        """Moments of several tensors over the same rows as one, along a new first axis."""
        return Moments(*(torch.stack(parts) for parts in zip(*(vars(m).values() for m in moments), strict=True)))

    def merge(self, other: Moments) -> Moments:
        """Moments of both samples together (Chan, Golub and LeVeque 1979, pairwise update)."""
        count = self.count + other.count
        total, delta = count.clamp(min=1), other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / total),
            self.deviation + other.deviation + delta.square() * (self.count * other.count / total),
        )

    def over_processes(self) -> Moments:
        """Moments over the samples of all processes."""
        if process_count() == 1:
            return self
        count = sum_over_processes(self.count)
        mean = sum_over_processes(self.mean * self.count) / count.clamp(min=1)
        return Moments(count, mean, sum_over_processes(self.deviation + self.count * (self.mean - mean).square()))

    @property
    def std(self) -> Tensor:
        """Standard deviation (of the population), float64; 1 for a feature that does not vary."""
        std = (self.deviation / self.count.clamp(min=1)).sqrt()
        # rounding of float32 data leaves a constant feature a deviation of about 1e-7 of its size
        return torch.where(std > 1e-6 * self.mean.abs() + 1e-12, std, torch.ones_like(std))

    def to(self, device: torch.device | str) -> Moments:
        return Moments(*(part.to(device) for part in (self.count, self.mean, self.deviation)))


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

    def correlation(self, layer: int) -> Tensor:
        """[n_inputs, n_inputs] of the rows added; 0 for a feature that does not vary."""
        covariance = self.covariance(layer)
        variance = covariance.diagonal()
        # as in `LeastSquares.solve`: what float32 products leave of a constant
        varies = variance > 1e-5 * self.products[layer].diagonal() / self.counts[layer]
        scale = torch.where(varies, 1 / variance.where(varies, 1).sqrt(), 0)
        return scale[:, None] * covariance * scale


def check_finite(
    inputs: Moments,
    outputs: Moments,
    layers: Sequence[int],
    when: str,
    gather: Callable[[Tensor], Tensor] = lambda of_own_layers: of_own_layers,
) -> None:
    """Raises NotFiniteError, naming the first layer and when, if the moments show a NaN or an infinity; on all
    processes, if `gather` makes numbers of all layers [layers] from those of the layers that the moments are of."""
    finite = torch.stack([moments.deviation.isfinite().all(-1) for moments in (inputs, outputs)], -1).float()
    for what, of_layers in zip(
        ("input", "output"), gather(finite).T.tolist(), strict=True
    ):  # the device is awaited once
        if not all(of_layers):
            raise NotFiniteError(
                f"the MLP {what} of layer {layers[of_layers.index(0)]} holds a NaN or an infinity at {when}: expected "
                "finite activations; check the base's weights and its dtype (--dtype float32 is the safest)"
            )


def fvu(squared_error: Tensor, outputs: Moments) -> Tensor:
    """FVU on z-scored outputs: Σ‖z − ẑ‖² / Σ‖z − mean(z)‖², in which each feature weighs the same.

    z-scoring by the sample's own standard deviation makes it the mean over features of each feature's FVU.
    A feature that does not vary in the sample has no FVU and is left out.

    Args:
        squared_error: [..., features], Σ over the rows of (y − ŷ)², raw units.
        outputs: moments of y over the same rows.

    Returns:
        [...] float64.
    """
    varies = outputs.deviation > 0
    ratio = torch.where(varies, squared_error.double() / outputs.deviation.where(varies, 1), 0)
    return ratio.sum(-1) / varies.sum(-1)


def fvu_raw(squared_error: Tensor, outputs: Moments) -> Tensor:
    """FVU on raw outputs: Σ‖y − ŷ‖² / Σ‖y − mean(y)‖². Arguments as for `fvu`; returns [...] float64."""
    return squared_error.double().sum(-1) / outputs.deviation.sum(-1)
