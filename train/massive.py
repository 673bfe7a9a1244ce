"""Massive rows: the few tokens, attention sinks mostly, whose MLP outputs dwarf the others'. The others are *ordinary*.

In SmolLM2-135M's layer 11 they are up to 920 times the median, at 0.9% of the tokens (massive activations: Sun et al.
2024, arXiv:2402.17762). Such rows own every sum that they are part of, so the fit's statistics are of ordinary rows,
and in its loss a massive row's error counts as if the row were of `COUNTS_AS` times the median norm.

At 20 times, the start of layer 11 loses 0.8% of its massive rows' squared norm; at 10 times 5%, for 3% less of the
ordinary rows' variance unexplained (train/recipes/README.md has the curve).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_tc.train.processes import gather_over_processes

TIMES = 10
COUNTS_AS = 20
RULE = (
    f"A token is massive if the norm of its MLP output is more than {TIMES} times the median norm in the first batch."
)


def massive(y: Tensor, median: Tensor) -> Tensor:
    """Which rows of y [..., rows, features] are massive [..., rows], given the median norm [...] of a row."""
    return norms(y) > limit(median)


def row_weights(y: Tensor, median: Tensor) -> Tensor:
    """What each row of y [..., rows, features] counts in a loss [..., rows]: 1, or (`COUNTS_AS` · median / norm)² if it
    is larger than that."""
    return (limit(median) * (COUNTS_AS / TIMES) / norms(y)).square().clamp(max=1)


def limit(median: Tensor) -> Tensor:
    """The norm [..., 1] above which a row is massive; none is in a layer whose typical output [...] is nothing."""
    return (TIMES * median).where(median > 0, torch.inf).unsqueeze(-1)


def median_norm(y: Tensor) -> Tensor:
    """Median norm [layers] of the rows y [layers, rows, features] of all processes, which must ask together."""
    return gather_over_processes(norms(y).T).median(0).values


def norms(y: Tensor) -> Tensor:
    """The norm [..., rows] of each row, float32."""
    return torch.linalg.vector_norm(y, dim=-1, dtype=torch.float32)
