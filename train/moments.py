"""Streaming mean and variance per feature, and the fraction of variance unexplained (FVU) that rests on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilinear_tc.train.errors import NotFiniteError
from bilinear_tc.train.processes import process_count, sum_over_processes


@dataclass
class Moments:
    """Count, mean and summed squared deviation of each feature, in float64, of any leading shape.

    Attributes:
        count: number of rows seen.
        mean: [..., features].
        deviation: [..., features], Σ (x − mean)².
    """

    count: int
    mean: Tensor
    deviation: Tensor

    @classmethod
    def zeros(cls, *shape: int, device: torch.device | str | None = None) -> Moments:
        return cls(0, *torch.zeros(2, *shape, dtype=torch.float64, device=device))

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Moments over the rows of x: [..., rows, features]."""
        rows = x.shape[-2]
        if rows == 0:
            return cls.zeros(*x.shape[:-2], x.shape[-1], device=x.device)
        # two plain sums: torch.var_mean over a leading axis takes twenty times as long on the CPU
        x = x.float()
        mean = x.sum(-2) / rows
        deviation = (x - mean.unsqueeze(-2)).square().sum(-2)
        return cls(rows, mean.double(), deviation.double())

    @staticmethod
    def stack(moments: list[Moments]) -> Moments:
        """Moments of several tensors over the same rows as one, along a new first axis."""
        return Moments(
            moments[0].count, torch.stack([m.mean for m in moments]), torch.stack([m.deviation for m in moments])
        )

    def merge(self, other: Moments) -> Moments:
        """Moments of both samples together (Chan, Golub and LeVeque 1979, pairwise update)."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.deviation + other.deviation + delta.square() * (self.count * other.count / count),
        )

    def over_processes(self) -> Moments:
        """Moments over the samples of all processes."""
        if process_count() == 1:
            return self
        count = torch.tensor(float(self.count), dtype=torch.float64, device=self.mean.device)
        total = sum_over_processes(count)
        mean = sum_over_processes(self.mean * count) / total
        deviation = sum_over_processes(self.deviation + count * (self.mean - mean).square())
        return Moments(int(total.item()), mean, deviation)

    @property
    def std(self) -> Tensor:
        """Standard deviation (of the population), float64; 1 for a feature that does not vary."""
        std = (self.deviation / max(self.count, 1)).sqrt()
        # rounding of float32 data leaves a constant feature a deviation of about 1e-7 of its size
        return torch.where(std > 1e-6 * self.mean.abs() + 1e-12, std, torch.ones_like(std))

    def to(self, device: torch.device | str) -> Moments:
        return Moments(self.count, self.mean.to(device), self.deviation.to(device))


def check_finite(inputs: Moments, outputs: Moments, layers: Sequence[int], when: str) -> None:
    """Raises NotFiniteError, naming the first layer and when, if the moments show a NaN or an infinity."""
    for what, moments in (("input", inputs), ("output", outputs)):
        bad = (~moments.deviation.isfinite()).any(-1).tolist()
        if any(bad):
            raise NotFiniteError(
                f"the MLP {what} of layer {layers[bad.index(True)]} holds a NaN or an infinity at {when}: expected "
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
