"""Standard errors of ratios of sums (means a token, FVUs) over the sequences of a text.

Tokens of one sequence are no independent draws; sequences nearly are.
"""

from __future__ import annotations

from torch import Tensor


def influence(numerators: Tensor, denominators: Tensor) -> Tensor:
    """What each sequence adds to the error of Σ numerators / Σ denominators, to first order (the delta method).

    Args:
        numerators, denominators: [sequences, ...], each sequence's share of the two sums.
    """
    total = denominators.sum(0)
    return (numerators - numerators.sum(0) / total * denominators) / total


def standard_error(influences: Tensor) -> Tensor:
    """Standard error [...] from the influences [sequences, ...] on a ratio or a mean of ratios; NaN of one alone."""
    count = len(influences)
    return (influences.square().sum(0) * (count / (count - 1) if count > 1 else float("nan"))).sqrt()
