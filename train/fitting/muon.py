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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Polynomial = tuple[float, float, float]

# The minimax polynomials for singular values in [1e-3, 1], each fitted to what the one before leaves over
# (Amsel, Persson, Musco, Gower 2025, "The Polar Express", arXiv:2505.16932, algorithm 1 with the paper's cushioning;
# tests/test_muon.py derives them). The last one is where the sequence converges.
_MINIMAX: list[Polynomial] = [
    (8.287212018145624, -23.59588651909883, 17.300387312530926),
    (4.1070591115422, -2.94784991673791, 0.5448431082926601),
    (3.9486908534822938, -2.9089021159629462, 0.551819139437013),
    (3.318419657370601, -2.488488024314875, 0.5100489401237203),
    (2.300652019954818, -1.6689039845747498, 0.418807311952567),
    (1.8913014077874, -1.2679958271945908, 0.3768040894852501),
    (1.8750014808276023, -1.250001645348169, 0.375000164521491),
]
# p(x / 1.01) keeps singular values that rounding has pushed above 1 inside the interval (same paper, section 3.4).
_SAFETY = 1.01

COEFFICIENTS: dict[str, list[Polynomial]] = {
    "classic": [(3.4445, -4.7750, 2.0315)],
    "polar_express": [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _MINIMAX] + [(1.875, -1.25, 0.375)],
}
VARIANTS = ("muon", "normuon")

# Steps that the Gram form takes before it goes back to X. Rounding leaves G's smallest eigenvalues wrong, even
# negative, by about the type's epsilon, and each step multiplies them by a² ≈ 12: five steps in a row lose two
# digits in float32 and diverge in half precision where a few directions hold most of the norm. X·Xᵀ taken afresh
# forgets the error. Simulated on 64×256 and 256×1024 matrices of nine spectra (Gaussian, power law, condition 1e3 and
# 1e6, low rank, one dominant direction, …), with the classic polynomial, the largest error in spectral norm, where
# the exact singular values are near 1:
#     restart after            1 (plain)   3        never
#     float32                  2e-5        3e-5     2e-3
#     float16                  0.05        0.05     11
#     bfloat16                 0.3         0.3      1e5
# Going back after two of five costs the same and does no better. With the Polar Express, whose first step has a² = 67,
# three steps in bfloat16 diverge on some spectra, so bfloat16 keeps the plain form.
_GRAM_STEPS = 3
# Below this ratio of the sides the products that the Gram form adds cost more than those it saves (`flops`).
_GRAM_ASPECT = 1.5


def polynomials(coefficients: str | Polynomial | Sequence[Polynomial], steps: int) -> list[Polynomial]:
    """The polynomial (a, b, c) of each of `steps` Newton–Schulz steps.

    Args:
        coefficients: a name in `COEFFICIENTS`, one polynomial for every step, or one a step, the last of them
            repeated where there are more steps.
        steps: at least 1.

    Raises:
        ValueError: for an unknown name, anything but triples, or no step.
    """
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(
                f"Newton–Schulz coefficients must be one of {', '.join(COEFFICIENTS)} or triples (a, b, c), "
                f"not {coefficients!r}."
            )
        coefficients = COEFFICIENTS[coefficients]
    rows = [coefficients] if coefficients and isinstance(coefficients[0], (int, float)) else list(coefficients)
    if steps < 1 or not rows or any(len(row) != 3 for row in rows):
        raise ValueError(f"Newton–Schulz needs at least one step and triples (a, b, c), not {steps} and {rows}.")
    return [tuple(rows[min(step, len(rows) - 1)]) for step in range(steps)]


def newton_schulz_dtype(matrices: Tensor) -> torch.dtype:
    """The type that Newton–Schulz runs in: float16 on CUDA, otherwise the matrices' own, float32 at least.

    float16 rather than bfloat16: after normalisation nothing exceeds about 100, so the three further bits of
    significand are worth more than the range, at the same speed.
    """
    if matrices.dtype == torch.float64:
        return torch.float64
    return torch.float16 if matrices.is_cuda else torch.float32


def restart_interval(rows: int, cols: int, dtype: torch.dtype) -> int:
    """Steps between two uses of the full matrix: 1 is the plain form, more the Gram form where it is cheaper."""
    oblong = max(rows, cols) > _GRAM_ASPECT * min(rows, cols)
    return _GRAM_STEPS if oblong and dtype != torch.bfloat16 else 1


def flops(rows: int, cols: int, *, steps: int = 5, restart: int = 1) -> int:
    """Floating-point operations (two a multiply-add) to orthogonalize one [rows, cols] matrix.

    With n and m the small and the large side and s = ⌈steps / restart⌉ stretches: 4n²m a stretch (G, and the
    polynomial times X), and in n³: 2 a step (G²), 2 a step but each stretch's first (the product of polynomials) and
    4 a step but each stretch's last (the next G), in all 4s·n²m + (8·steps − 6s)·n³.
    """
    small, large = min(rows, cols), max(rows, cols)
    stretches = math.ceil(steps / restart)
    return 4 * stretches * small**2 * large + (8 * steps - 6 * stretches) * small**3


def orthogonalize(
    matrices: Tensor,
    *,
    steps: int = 5,
    coefficients: str | Polynomial | Sequence[Polynomial] = "classic",
    dtype: torch.dtype | None = None,
    eps: float = 1e-7,
    restart: int | None = None,
) -> Tensor:
    """Each matrix with its singular values brought near 1, its singular vectors kept: U·S·Vᵀ → U·p(…p(S/‖S‖))·Vᵀ.

    Args:
        matrices: [..., rows, cols]; not changed.
        steps: Newton–Schulz steps.
        coefficients: a name in `COEFFICIENTS` ("classic" leaves singular values between about 0.7 and 1.2,
            "polar_express" takes those above 1e-3 of the norm closer to 1), one triple, or one a step.
        dtype: of the products and the result; None is `newton_schulz_dtype(matrices)`.
        eps: a Frobenius norm below it is taken as it, so that zero stays zero.
        restart: steps between two uses of the full matrix, 1 for the plain form; None is `restart_interval`.

    Returns:
        [..., rows, cols] in the type computed in.

    Raises:
        ValueError: for fewer than two dimensions, a restart below 1, or coefficients that `polynomials` refuses.
    """
    if matrices.ndim < 2 or (restart is not None and restart < 1):
        raise ValueError(
            f"orthogonalize needs matrices [..., rows, cols] and a restart of 1 or more, not the shape "
            f"{list(matrices.shape)} and {restart}."
        )
    schedule = polynomials(coefficients, steps)
    dtype = dtype or newton_schulz_dtype(matrices)
    batch = matrices.reshape(-1, *matrices.shape[-2:])
    unit = batch.new_empty(batch.shape, dtype=dtype)
    _normalize(batch, eps, out=unit)
    restart = restart or restart_interval(*batch.shape[1:], dtype)
    return _newton_schulz(unit, schedule, restart).reshape(matrices.shape)


def _normalize(matrices: Tensor, eps: float, *, out: Tensor) -> None:
    """Writes each of [layers, rows, cols] over its Frobenius norm to `out`, in `out`'s type.

    The norm bounds the largest singular value. It is taken before the type is narrowed: a gradient's own scale may
    lie below float16's range.
    """
    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp(min=eps)
    torch.div(matrices, norm, out=out)


def _newton_schulz(x: Tensor, schedule: list[Polynomial], restart: int) -> Tensor:
    """The schedule's steps on x [layers, rows, cols], in stretches of `restart` on the small side's Gram matrix."""
    tall = x.shape[1] > x.shape[2]
    for start in range(0, len(schedule), restart):
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        scale, matrix = _gram_polynomial(gram, schedule[start : start + restart])
        # A tall x is multiplied from the right, so the result has the parameter's own layout without a transposition.
        left, right = (x, matrix) if tall else (matrix, x)
        x = torch.baddbmm(x, left, right, beta=scale)
    return x


def _gram_polynomial(gram: Tensor, schedule: list[Polynomial]) -> tuple[float, Tensor]:
    """(q, M) such that (q·I + M)·X is X after the schedule's steps, given gram = X·Xᵀ [layers, n, n].

    The multiple of the identity is kept apart: added to M's diagonal it would cost the small entries beside it their
    last digits in half precision.
    """
    scale, matrix = 1.0, None
    for index, (a, b, c) in enumerate(schedule):
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # X ← (a·I + step)·X
        if matrix is None:
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

        B ← momentum·B + (1 − momentum)·grad;   U = (1 − momentum)·grad + momentum·B   (Nesterov; otherwise B)
        W ← (1 − lr·weight_decay)·W − lr·adjust·orthogonalize(U)

    All parameters of one shape [rows, cols] go through one batched Newton–Schulz. Where `torch.distributed` is
    initialised, every process must hold the same parameters and gradients (already reduced); each then orthogonalizes
    its share of the matrices, the results are gathered, and all processes apply the same update. The momentum is kept
    whole on each process: that costs one pass over memory and makes any process's `state_dict` the full one.

    Args:
        params: tensors [layers, rows, cols], or [rows, cols] for a single matrix; or parameter groups of them.
        lr, weight_decay, momentum, nesterov: as above.
        steps, coefficients, eps, dtype: as in `orthogonalize`.
        adjust_lr: "original" is √max(1, rows / cols), "match_rms_adamw" 0.2·√max(rows, cols)
            (Liu et al. 2025, arXiv:2502.16982).
        variant: "normuon" divides every row (neuron) of the update by the root of its running mean square and sets the
            update's root mean square to 0.2·lr in place of `adjust_lr` (Li et al. 2025, arXiv:2510.05491, algorithm 1,
            which is written for nesterov=False).
        beta2: decay of NorMuon's running mean square.

    Raises:
        ValueError: for a parameter that is not a stack of real matrices, or an option outside its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        *,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = 5,
        coefficients: str | Polynomial | Sequence[Polynomial] = "classic",
        eps: float = 1e-7,
        adjust_lr: str = "original",
        variant: str = "muon",
        beta2: float = 0.95,
        dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "steps": steps,
            "coefficients": coefficients,
            "eps": eps,
            "adjust_lr": adjust_lr,
            "variant": variant,
            "beta2": beta2,
            "dtype": dtype,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as `torch.optim.Optimizer` does, after checking its options and parameters."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what the closure, if any, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Every shape's products are queued before the first result is awaited, so gathering overlaps with computing.
        started = [(group, params, *self._orthogonalized(group, params)) for group, params in self._batches()]
        for group, params, updates, gathering in started:
            if gathering is not None:
                gathering.wait()
            for param, update in zip(params, updates.split([len(_stack(p)) for p in params]), strict=True):
                self._apply(group, param, update.view_as(param))
        return loss

    def _batches(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        """The parameters with a gradient that go through one Newton–Schulz: of one group, matrix shape and type."""
        for group in self.param_groups:
            batches: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    batches[(*param.shape[-2:], param.dtype, param.device)].append(param)
            for params in batches.values():
                yield group, params

    def _orthogonalized(self, group: dict[str, Any], params: list[Tensor]) -> tuple[Tensor, dist.Work | None]:
        """The orthogonalized updates of all params [matrices, rows, cols], complete once the work is awaited."""
        processes, rank = _processes()
        matrices = sum(len(_stack(param)) for param in params)
        share = math.ceil(matrices / processes)
        first, last = min(rank * share, matrices), min((rank + 1) * share, matrices)

        dtype = group["dtype"] or newton_schulz_dtype(params[0])
        rows, cols = params[0].shape[-2:]
        unit = params[0].new_empty((last - first, rows, cols), dtype=dtype)
        self._momentum(group, params, first, last, out=unit)
        schedule = polynomials(group["coefficients"], group["steps"])
        own = _newton_schulz(unit, schedule, restart_interval(rows, cols, dtype))
        if processes == 1:
            return own, None
        # A collective takes equal counts: the last shares are filled up, and the surplus is cut off the end.
        own = torch.cat([own, own.new_zeros(share - len(own), rows, cols)]) if len(own) < share else own
        everyone = own.new_empty(processes * share, rows, cols)
        gathering = dist.all_gather_into_tensor(everyone, own, async_op=True)
        return everyone[:matrices], gathering

    def _momentum(self, group: dict[str, Any], params: list[Tensor], first: int, last: int, *, out: Tensor) -> None:
        """Advances every param's momentum; writes matrices first to last of the normalised updates to `out`."""
        offset = 0
        for param in params:
            gradient = _stack(param.grad)
            state = self.state[param]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(param)
            buffer = _stack(state["momentum"])
            buffer.lerp_(gradient, 1 - group["momentum"])
            start, stop = max(first - offset, 0), min(last - offset, len(gradient))
            if start < stop:
                update = buffer[start:stop]
                if group["nesterov"]:
                    update = gradient[start:stop].lerp(update, group["momentum"])
                position = offset + start - first
                _normalize(update, group["eps"], out=out[position : position + stop - start])
            offset += len(gradient)

    def _apply(self, group: dict[str, Any], param: Tensor, update: Tensor) -> None:
        if group["variant"] == "normuon":
            state = self.state[param]
            if "row_mean_square" not in state:
                state["row_mean_square"] = torch.zeros_like(param[..., :1])
            update = _normuon(update, state["row_mean_square"], group["beta2"])
            adjust = 1.0
        else:
            adjust = _lr_factor(group["adjust_lr"], *param.shape[-2:])
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update, alpha=-group["lr"] * adjust)


def _stack(tensor: Tensor) -> Tensor:
    """[layers, rows, cols], a single matrix being one layer."""
    return tensor if tensor.ndim == 3 else tensor[None]


def _processes() -> tuple[int, int]:
    """How many processes share the work, and which of them this is."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0


def _lr_factor(adjust_lr: str, rows: int, cols: int) -> float:
    return math.sqrt(max(1, rows / cols)) if adjust_lr == "original" else 0.2 * math.sqrt(max(rows, cols))


def _normuon(update: Tensor, row_mean_square: Tensor, beta2: float) -> Tensor:
    """NorMuon's update from the orthogonalized one [..., rows, cols]; advances row_mean_square [..., rows, 1]."""
    update = update.to(row_mean_square.dtype)
    row_mean_square.lerp_(update.square().mean(-1, keepdim=True), 1 - beta2)
    update = update / (row_mean_square.sqrt() + 1e-8)
    norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True).clamp(min=1e-8)
    return update * (0.2 * math.sqrt(update.shape[-2] * update.shape[-1]) / norm)


def _check_group(group: dict[str, Any]) -> None:
    """Raises ValueError where a parameter group's options or parameters are not ones that Muon can use."""
    polynomials(group["coefficients"], group["steps"])
    for option in ("lr", "weight_decay", "eps"):
        if not group[option] >= 0:
            raise ValueError(f"Muon's {option} must be 0 or more, not {group[option]}.")
    for option in ("momentum", "beta2"):
        if not 0 <= group[option] < 1:
            raise ValueError(f"Muon's {option} must be at least 0 and below 1, not {group[option]}.")
    for option, choices in (("adjust_lr", ("original", "match_rms_adamw")), ("variant", VARIANTS)):
        if group[option] not in choices:
            raise ValueError(f"Muon's {option} must be one of {', '.join(choices)}, not {group[option]!r}.")
    for param in group["params"]:
        if param.ndim not in (2, 3) or not param.is_floating_point():
            raise ValueError(
                "Muon takes real tensors [layers, rows, cols] or [rows, cols], not "
                f"{list(param.shape)} of {param.dtype}; give biases to torch.optim.AdamW."
            )
