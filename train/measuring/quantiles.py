"""Quantiles of a stream of positive numbers, to half a percent, from a histogram in logarithmic bins."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bilinear_tc.train.processes import sum_over_processes

WIDTH = 0.01  # of a bin, in the natural logarithm
LOWEST, HIGHEST = 1e-12, 1e12  # what lies beyond counts as these


class LogHistogram:
    """Counts of positive numbers, a histogram a layer."""

    def __init__(self, layers: int, device: torch.device) -> None:
        bins = math.ceil(math.log(HIGHEST / LOWEST) / WIDTH)
        self.counts = torch.zeros(layers, bins, dtype=torch.float64, device=device)

    def add(self, layer: int, values: Tensor) -> None:
        bins = (values.clamp(LOWEST, HIGHEST).log() - math.log(LOWEST)).div(WIDTH).long()
        most = self.counts.shape[1]
        self.counts[layer] += torch.bincount(bins.clamp(max=most - 1), minlength=most)

    def quantiles(self, fractions: Sequence[float]) -> Tensor:
        """[layers, fractions], over all processes: the least number that at least that fraction does not exceed."""
        cumulative = sum_over_processes(self.counts).cumsum(1)
        wanted = cumulative[:, -1:] * torch.tensor(fractions, dtype=torch.float64, device=cumulative.device)
        bins = torch.searchsorted(cumulative, wanted - 1e-9)
        return LOWEST * ((bins.double() + 0.5) * WIDTH).exp()
