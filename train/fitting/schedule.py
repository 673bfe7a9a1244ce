"""Learning-rate schedules, as pure functions of the step."""

from __future__ import annotations

from collections.abc import Callable

WSD_WARMUP = 0.01  # fraction of all steps
WSD_DECAY = 0.2


def schedule(name: str, step: int, max_steps: int) -> float:
    """The factor on the learning rate for one optimizer step.

    ValueError for an unknown name, a negative step, or `max_steps` below 1.

    Args:
        name: one of `SCHEDULES`.
        step: steps already made, so 0 for the first one.
        max_steps: steps in the whole fit.
    """
    if name not in SCHEDULES:
        raise ValueError(f"The schedule must be one of {', '.join(SCHEDULES)}, not {name!r}.")
    if step < 0 or max_steps < 1:
        raise ValueError(f"A schedule needs step ≥ 0 and max_steps ≥ 1, not {step} and {max_steps}.")
    return SCHEDULES[name](step, max_steps)


def _constant(_step: int, _max_steps: int) -> float:
    return 1.0


def _linear(step: int, max_steps: int) -> float:
    """Down in a straight line, which would reach 0 at step `max_steps`, one after the last."""
    return max(0.0, 1 - step / max_steps)


def _wsd(step: int, max_steps: int) -> float:
    """Warmup-stable-decay (Hu et al. 2024, arXiv:2404.06395): up over the first hundredth of the steps, then 1, then
    down in a straight line over the last fifth, towards the same 0 as `_linear`.
    """
    warmup = int(WSD_WARMUP * max_steps)
    ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return ramp * min(1.0, _linear(step, max_steps) / WSD_DECAY)


# The names are those of the recipe's `lr_schedule`.
SCHEDULES: dict[str, Callable[[int, int], float]] = {"constant": _constant, "linear": _linear, "wsd": _wsd}
