"""How near transcoders come to their MLPs on ordinary tokens, and what they make of massive ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilinear_tc.train.massive import TIMES, massive, median_norm
from bilinear_tc.train.measuring.quantiles import LogHistogram
from bilinear_tc.train.moments import Moments, fvu
from bilinear_tc.train.processes import sum_over_processes

PERCENTS = (1, 10, 50, 90, 99)
MOST_BUCKETS = 32  # of positions 0, 1, 2–3, 4–7, …


class Ordinary:
    """Errors on ordinary rows, a layer at a time, streaming; `massive.RULE` tells them, by the first batch's median.

    Args:
        y: [layers, rows, n_outputs], this process's outputs in the first batch.
    """

    def __init__(self, y: Tensor) -> None:
        layers, _, features = y.shape
        self.median = median_norm(y)
        self.first = [Moments.of(self.of(layer, rows)).over_processes() for layer, rows in enumerate(y)]
        self.outputs = [Moments.zeros(features, device=y.device) for _ in range(layers)]
        self.errors = torch.zeros(layers, MOST_BUCKETS, features, dtype=torch.float64, device=y.device)
        self.counts = torch.zeros(layers, MOST_BUCKETS, dtype=torch.float64, device=y.device)
        self.massive = torch.zeros(layers, 3, dtype=torch.float64, device=y.device)  # rows, Σ‖y − ŷ‖², Σ‖y‖²
        self.own_errors = LogHistogram(layers, y.device)

    def of(self, layer: int, y: Tensor) -> Tensor:
        """The ordinary ones of a layer's outputs [rows, n_outputs]."""
        return y[~massive(y, self.median[layer])]

    def add(self, layer: int, y: Tensor, errors: Tensor, positions: Tensor) -> Tensor:
        """Adds a layer's outputs y and squared errors, float32 [rows, n_outputs] both, at positions [rows].

        Returns:
            Which rows are ordinary.
        """
        left_out = massive(y, self.median[layer])
        sums = (left_out.sum(), errors[left_out].sum(), y[left_out].square().sum())
        self.massive[layer] += torch.stack([value.double() for value in sums])
        kept = ~left_out
        y, errors, buckets = y[kept], errors[kept], bucket(positions[kept])
        self.outputs[layer] = self.outputs[layer].merge(Moments.of(y))
        of_bucket = torch.nn.functional.one_hot(buckets, MOST_BUCKETS).to(errors.dtype)
        self.errors[layer] += of_bucket.T @ errors
        self.counts[layer] += of_bucket.sum(0)
        self.own_errors.add(layer, (errors / self.first[layer].std.square()).mean(1))
        return kept

    def scores(self) -> list[dict[str, Any]]:
        """Each layer's scores by the names of `LayerScores`."""
        errors, counts, left_out = map(sum_over_processes, (self.errors, self.counts, self.massive))
        self.outputs = [moments.over_processes() for moments in self.outputs]
        quantiles = self.own_errors.quantiles([percent / 100 for percent in PERCENTS])
        scores = []
        for layer, outputs in enumerate(self.outputs):
            rows, error, size = left_out[layer].tolist()
            ordinary = outputs.count.item()
            found = [b for b, count in enumerate(counts[layer].tolist()) if count]
            # each bucket's share of the errors, as if all rows had its errors: their mean over rows is the FVU
            by_bucket = [errors[layer, b] * ordinary / counts[layer, b] for b in found]
            scores.append(
                {
                    "fvu_ordinary": float(fvu(errors[layer].sum(0), outputs)),
                    "massive_share": rows / (rows + ordinary),
                    "massive_error": error / size if rows else None,
                    "massive_norm": TIMES * self.median[layer].item(),
                    "error_quantiles": dict(zip(map(str, PERCENTS), quantiles[layer].tolist(), strict=True)),
                    "error_by_position": {
                        bucket_name(b): float(fvu(e, outputs)) for b, e in zip(found, by_bucket, strict=True)
                    },
                }
            )
        return scores


def bucket(positions: Tensor) -> Tensor:
    """The bucket of each position: 0, 1, 2–3, 4–7, 8–15, …"""
    return torch.frexp(positions.double()).exponent.long()


def bucket_name(number: int) -> str:
    first, last = 2**number // 2, 2**number - 1
    return str(first) if first == last else f"{first}–{last}"
