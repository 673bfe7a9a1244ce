"""Learning-rate schedules, as pure functions of the step."""

from __future__ import annotations

SCHEDULES = ("constant", "linear", "wsd")

WSD_WARMUP = 0.01  # fraction of all steps
WSD_DECAY = 0.2


def schedule(name: str, step: int, max_steps: int, *, warmup: int | None = None) -> float:
    """The factor on the learning rate for one optimiser step.

    - `constant`: 1.
    - `linear`: 1 − step / max_steps, which would reach 0 at step `max_steps`, one after the last.
    - `wsd` (warmup-stable-decay, Hu et al. 2024, arXiv:2404.06395): 1, then down in a straight line over the last
      fifth of the steps, towards the same 0.

    Args:
        name: one of `SCHEDULES`.
        step: steps already made, so 0 for the first one.
        max_steps: steps in the whole fit.
        warmup: steps over which the factor is ramped up as (step + 1) / warmup, whatever the schedule;
            None is a hundredth of `max_steps` for `wsd` and no warm-up for the others.

    Raises:
        ValueError: for an unknown name, a negative step or warm-up, or `max_steps` below 1.
    """
    if name not in SCHEDULES:
        raise ValueError(f"The schedule must be one of {', '.join(SCHEDULES)}, not {name!r}.")
    if step < 0 or max_steps < 1 or (warmup is not None and warmup < 0):
        raise ValueError(
            f"A schedule needs step ≥ 0, max_steps ≥ 1 and warmup ≥ 0, not {step}, {max_steps} and {warmup}."
        )
    if warmup is None:
        warmup = int(WSD_WARMUP * max_steps) if name == "wsd" else 0
    ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
    left = max(0.0, 1 - step / max_steps)
    decay = {"constant": 1.0, "linear": left, "wsd": min(1.0, left / WSD_DECAY)}[name]
    return ramp * decay
