"""How near a transcoder's derivative comes to its MLP's: what is left of it when the output alone is fitted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PROBES = 2  # a token
STEP = 1e-2  # of a difference, in tangents


def jacobian_scores(
    mlp: Callable[[Tensor], Tensor], transcoder: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, output_std: Tensor
) -> tuple[float, float]:
    """Cosine and relative error of two maps' changes along tangents, all tokens' pooled.

    With a = J_mlp v and b = J_transcoder v in units of the outputs' std, Σ a·b / √(Σ‖a‖² Σ‖b‖²) and
    √(Σ‖a − b‖² / Σ‖a‖²). Over isotropic v, these are the Frobenius cosine and error of the Jacobians themselves, all
    tokens' as one matrix.

    Args:
        x: inputs [rows, n_inputs].
        v: tangents, in raw units as x.
        output_std: [n_outputs].
    """
    a, b = (jvp(f, x, v).double() / output_std for f in (mlp, transcoder))
    cosine = (a * b).sum() / (a.norm() * b.norm())
    return cosine.item(), ((a - b).norm() / a.norm()).item()


def jvp(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """The change of f [rows, n_outputs] along v; from two points nearby if f (experts' grouped products, BLOOM's own
    GELU) cannot be differentiated forward."""
    try:
        return torch.func.jvp(f, (x,), (v,))[1]
    except RuntimeError:  # NotImplementedError is one
        return (f(x + STEP * v) - f(x - STEP * v)) / (2 * STEP)


def isotropic_probes(x: Tensor, input_std: Tensor) -> tuple[Tensor, Tensor]:
    """The inputs x [tokens, n_inputs], `PROBES` times, and Gaussian tangents of the inputs' std [n_inputs] each."""
    x = x.repeat(PROBES, 1)
    probes = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return x, probes.to(x) * input_std.to(x)
