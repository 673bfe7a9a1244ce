"""How far a fit has come: steps, tokens, wall time, and the history of each layer's error."""

from __future__ import annotations

import time

import torch
from torch import Tensor


class Progress:
    """What a fit has done so far.

    Attributes:
        steps: optimiser steps made.
        tokens_read: tokens read so far, the calibration sample among them.
    """

    def __init__(self, max_steps: int, layers: int) -> None:
        self.steps = 0
        self.tokens_read = 0
        self._figures = torch.zeros(max_steps, layers, 2, dtype=torch.float64)  # mean squared error and FVU
        self._tokens = torch.zeros(max_steps, dtype=torch.int64)  # read up to and including each step
        self._seconds_before = 0.0
        self._started = time.perf_counter()

    def add(self, mse: Tensor, fvu: Tensor, rows: int) -> None:
        """Notes a step: mean squared error and FVU of each layer [layers], and the tokens of its batch."""
        self.tokens_read += rows
        self._figures[self.steps] = torch.stack([mse, fvu], dim=-1)
        self._tokens[self.steps] = self.tokens_read
        self.steps += 1

    def history(self, layer: int) -> dict[str, list]:
        """The columns of a layer's history.parquet, a value a step; `layer` counts the layers under fit."""
        mse, fvu = self._figures[: self.steps, layer].unbind(-1)
        return {
            "step": list(range(1, self.steps + 1)),
            "tokens": self._tokens[: self.steps].tolist(),
            "mse": mse.tolist(),
            "variance_explained": (1 - fvu).tolist(),
            "fvu": fvu.tolist(),
        }

    def wall_time(self) -> float:
        """Seconds of fitting so far, added up over resumes."""
        return self._seconds_before + time.perf_counter() - self._started

    def state_dict(self) -> dict[str, object]:
        return {
            "steps": self.steps,
            "tokens_read": self.tokens_read,
            "seconds": self.wall_time(),
            "figures": self._figures[: self.steps].clone(),
            "tokens": self._tokens[: self.steps].clone(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.steps, self.tokens_read = state["steps"], state["tokens_read"]
        self._figures[: self.steps], self._tokens[: self.steps] = state["figures"], state["tokens"]
        self._seconds_before, self._started = state["seconds"], time.perf_counter()
