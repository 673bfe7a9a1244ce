"""Muon for stacked matrices: every layer's update in one batched Newton–Schulz, shared out over the processes.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces a gradient's singular values by
values near 1. An odd polynomial p(x) = a·x + b·x³ + c·x⁵ is applied to them a few times through matrix products only:

    X ← a·X + (b·G + c·G²)·X,    G = X·Xᵀ on the small side.

One step in that *plain* form costs two products with the large side. The *Gram* form (Zhang, Amsel, Chen, Dao 2026,
https://dao-lab.ai/blog/2026/gram-newton-schulz) applies several steps to G alone, which stays small, collects the
polynomial that they amount to, and multiplies X by it once. The two are the same polynomial; the plain form is the
Gram form that goes back to X after every step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bilinear_tc.train.processes import process_count, process_index

Polynomial = tuple[float, float, float]

_STEPS = 5
# The minimax polynomials for singular values in [1e-3, 1], each fitted to what the one before leaves over
# (Amsel, Persson, Musco, Gower 2025, "The Polar Express", arXiv:2505.16932, algorithm 1 with the paper's cushioning;
# tests/test_muon.py derives them).
_MINIMAX: list[Polynomial] = [
    (8.287212018145624, -23.59588651909883, 17.300387312530926),
    (4.1070591115422, -2.94784991673791, 0.5448431082926601),
    (3.9486908534822938, -2.9089021159629462, 0.551819139437013),
    (3.318419657370601, -2.488488024314875, 0.5100489401237203),
    (2.300652019954818, -1.6689039845747498, 0.418807311952567),
]
# p(x / 1.01) keeps singular values that rounding has pushed above 1 inside the interval (same paper, section 3.4).
_SAFETY = 1.01

# The polynomial (a, b, c) of each step. "classic" leaves singular values between about 0.7 and 1.2, "polar_express"
# takes those above 1e-3 of the norm closer to 1.
COEFFICIENTS: dict[str, list[Polynomial]] = {
    "classic": [(3.4445, -4.7750, 2.0315)] * _STEPS,
    "polar_express": [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _MINIMAX],
}
VARIANTS = ("muon", "normuon")
_NORMUON_DECAY = 0.95  # of NorMuon's running mean square
_LEAST_NORM = 1e-7  # a Frobenius norm below it is taken as it, so that zero stays zero

# Steps that the Gram form takes before it goes back to X. Rounding leaves G's smallest eigenvalues wrong, even
# negative, by about the type's epsilon, and each step multiplies them by a² ≈ 12: five steps in a row lose two
# digits in float32 and diverge in half precision if a few directions hold most of the norm. X·Xᵀ taken afresh
# forgets the error. Simulated on 64×256 and 256×1024 matrices of nine spectra (Gaussian, power law, condition 1e3 and
# 1e6, low rank, one dominant direction, …), with the classic polynomial, the largest error in spectral norm (the
# exact singular values are near 1):
#     restart after            1 (plain)   3        never
#     float32                  2e-5        3e-5     2e-3
#     float16                  0.05        0.05     11
#     bfloat16                 0.3         0.3      1e5
# Going back after two of five costs the same and does no better. With the Polar Express, whose first step has a² = 67,
# three steps in bfloat16 diverge on some spectra, so bfloat16 keeps the plain form.
_GRAM_STEPS = 3
# Below this ratio of the sides the products that the Gram form adds cost more than those it saves. With n and m the
# small and the large side, the s stretches between two uses of X take 4n²m each (G, and the polynomial times X), and in
# n³: 2 a step (G²), 2 a step but each stretch's first (the product of polynomials) and 4 a step but each stretch's last
# (the next G), in all 4s·n²m + (8·steps − 6s)·n³ operations, two a multiply-add.
_GRAM_ASPECT = 1.5


def newton_schulz_dtype(matrices: Tensor) -> torch.dtype:
    """The type that Newton–Schulz runs in: float16 on CUDA, otherwise the matrices' own, float32 at least.

    float16 rather than bfloat16: after normalization nothing exceeds about 100, so the three further bits of
    significand are worth more than the range, at the same speed.
    """
    if matrices.dtype == torch.float64:
        return torch.float64
    return torch.float16 if matrices.is_cuda else torch.float32


def restart_interval(rows: int, cols: int, dtype: torch.dtype) -> int:
    """Steps between two uses of the full matrix: 1 is the plain form, more the Gram form if it is cheaper."""
    oblong = max(rows, cols) > _GRAM_ASPECT * min(rows, cols)
    return _GRAM_STEPS if oblong and dtype != torch.bfloat16 else 1


def normalize(matrices: Tensor, *, out: Tensor) -> None:
    """Writes each of [layers, rows, cols] over its Frobenius norm to `out`, in `out`'s type.

    The norm bounds the largest singular value. It is taken before the type is narrowed: a gradient's own scale may
    lie below float16's range.
    """
    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp(min=_LEAST_NORM)
    torch.div(matrices, norm, out=out)


def newton_schulz(x: Tensor, coefficients: str, restart: int | None = None) -> Tensor:
    """Each matrix with its singular values brought near 1, its singular vectors kept: U·S·Vᵀ → U·p(…p(S))·Vᵀ.

    Args:
        x: [layers, rows, cols], as `normalize` gives them; not changed.
        coefficients: a name in `COEFFICIENTS`.
        restart: steps between two uses of the full matrix, 1 for the plain form; None is `restart_interval`.
    """
    rows, cols = x.shape[1:]
    schedule, restart = COEFFICIENTS[coefficients], restart or restart_interval(rows, cols, x.dtype)
    for start in range(0, len(schedule), restart):
        gram = torch.bmm(x.mT, x) if rows > cols else torch.bmm(x, x.mT)
        scale, matrix = _gram_polynomial(gram, schedule[start : start + restart])
        # A tall x is multiplied from the right, so the result has the parameter's own layout without a transposition.
        left, right = (x, matrix) if rows > cols else (matrix, x)
        x = torch.baddbmm(x, left, right, beta=scale)
    return x


def _gram_polynomial(gram: Tensor, schedule: list[Polynomial]) -> tuple[float, Tensor]:
    """(q, M) such that (q·I + M)·X is X after the schedule's steps, given gram = X·Xᵀ [layers, n, n].

    The multiple of the identity is kept apart: added to M's diagonal it would cost the small entries beside it their
    last digits in half precision.
    """
    for index, (a, b, c) in enumerate(schedule):
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # X ← (a·I + step)·X
        if index == 0:
            scale, matrix = a, step
        else:  # (a·I + step)·(q·I + M) = a·q·I + (a·M + q·step) + step·M
            matrix = torch.baddbmm(torch.add(a * matrix, step, alpha=scale), step, matrix)
            scale *= a
        if index + 1 < len(schedule):  # G ← (a·I + step)·G·(a·I + step)
            gram = torch.baddbmm(gram, gram, step, beta=a)
            gram = torch.baddbmm(gram, step, gram, beta=a)
    return scale, matrix


class Muon(torch.optim.Optimizer):
    """Muon on stacks of matrices, with `torch.optim.Muon`'s arithmetic for each matrix.

        B ← momentum·B + (1 − momentum)·grad;   U = (1 − momentum)·grad + momentum·B   (Nesterov)
        W ← (1 − lr·weight_decay)·W − lr·√max(1, rows / cols)·newton_schulz(U / ‖U‖)

    All parameters of one shape go through one batched Newton–Schulz. If `torch.distributed` is initialized, every
    process must hold the same parameters and gradients (already reduced); each then orthogonalizes its share of the
    matrices, the results are gathered, and all processes apply the same update. The momentum is kept whole on each
    process: that costs one pass over memory and makes any process's `state_dict` the full one. ValueError for a
    parameter that is not a stack of real matrices, or an unknown name.

    Args:
        params: tensors [layers, rows, cols], or parameter groups of them.
        lr, weight_decay, momentum: as above.
        coefficients: a name in `COEFFICIENTS`.
        variant: "normuon" divides every row (neuron) of the update by the root of its running mean square, and sets
            the update's root mean square to 0.2·lr in place of the root above (Li et al. 2025, arXiv:2510.05491,
            algorithm 1, but with Nesterov's momentum).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        *,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        coefficients: str = "classic",
        variant: str = "muon",
    ) -> None:
        if coefficients not in COEFFICIENTS or variant not in VARIANTS:
            raise ValueError(
                f"Muon's coefficients must be one of {', '.join(COEFFICIENTS)} and its variant one of "
                f"{', '.join(VARIANTS)}, not {coefficients!r} and {variant!r}."
            )
        options = {"weight_decay": weight_decay, "momentum": momentum, "coefficients": coefficients, "variant": variant}
        super().__init__(params, {"lr": lr} | options)
        for param in chain.from_iterable(group["params"] for group in self.param_groups):
            if param.ndim != 3 or not param.is_floating_point():
                raise ValueError(
                    f"Muon takes real tensors [layers, rows, cols], not {list(param.shape)} of {param.dtype}; give "
                    "biases to torch.optim.AdamW."
                )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        # Every shape's products are queued before the first result is awaited, so gathering overlaps with computing.
        started = [(group, params, *self._orthogonalized(group, params)) for group, params in self._batches()]
        for group, params, updates, gathering in started:
            if gathering is not None:
                gathering.wait()
            for param, update in zip(params, updates.split([len(p) for p in params]), strict=True):
                self._apply(group, param, update)

    def _batches(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        """The parameters with a gradient that go through one Newton–Schulz: of one group, matrix shape and type."""
        for group in self.param_groups:
            batches: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    batches[(*param.shape[1:], param.dtype, param.device)].append(param)
            for params in batches.values():
                yield group, params

    def _orthogonalized(self, group: dict[str, Any], params: list[Tensor]) -> tuple[Tensor, dist.Work | None]:
        """The orthogonalized updates of all params [matrices, rows, cols], complete once the work is awaited."""
        processes, rank = process_count(), process_index()
        matrices = sum(map(len, params))
        share = math.ceil(matrices / processes)
        first, last = min(rank * share, matrices), min((rank + 1) * share, matrices)

        unit = params[0].new_empty((last - first, *params[0].shape[1:]), dtype=newton_schulz_dtype(params[0]))
        self._momentum(group["momentum"], params, first, out=unit)
        own = newton_schulz(unit, group["coefficients"])
        if processes == 1:
            return own, None
        # A collective takes equal counts: the last shares are filled up, and the surplus is cut off the end.
        own = torch.cat([own, own.new_zeros(share - len(own), *own.shape[1:])])
        everyone = own.new_empty(processes * share, *own.shape[1:])
        # torch 2.13 gave it a new name, and warns of the old one
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return everyone[:matrices], gather(everyone, own, async_op=True)

    def _momentum(self, momentum: float, params: list[Tensor], first: int, *, out: Tensor) -> None:
        """Advances every param's momentum; writes the normalized updates of the matrices from `first` on to `out`."""
        position = -first  # of a param's first matrix in `out`
        for param in params:
            gradient = param.grad
            assert gradient is not None
            buffer = self._state(param, "momentum", param).lerp_(gradient, 1 - momentum)
            start, stop = max(position, 0), min(position + len(param), len(out))
            if start < stop:
                own = slice(start - position, stop - position)
                normalize(gradient[own].lerp(buffer[own], momentum), out=out[start:stop])
            position += len(param)

    def _state(self, param: Tensor, name: str, like: Tensor) -> Tensor:
        """A param's state of that name, zeros at first."""
        state = self.state[param]
        if name not in state:
            state[name] = torch.zeros_like(like)
        return state[name]

    def _apply(self, group: dict[str, Any], param: Tensor, update: Tensor) -> None:
        if group["variant"] == "normuon":
            update, adjust = _normuon(update, self._state(param, "row_mean_square", param[..., :1])), 1.0
        else:
            rows, cols = param.shape[1:]
            adjust = math.sqrt(max(1, rows / cols))
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update, alpha=-group["lr"] * adjust)


def _normuon(update: Tensor, row_mean_square: Tensor) -> Tensor:
    """NorMuon's update from the orthogonalized one [layers, rows, cols]; advances row_mean_square [layers, rows, 1]."""
    update = update.to(row_mean_square.dtype)
    row_mean_square.lerp_(update.square().mean(-1, keepdim=True), 1 - _NORMUON_DECAY)
    update = update / (row_mean_square.sqrt() + 1e-8)
    norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True).clamp(min=1e-8)
    return update * (0.2 * math.sqrt(update.shape[-2] * update.shape[-1]) / norm)
