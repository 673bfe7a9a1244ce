"""The derivative's part of a fit: random directions at some rows, and how each MLP's output changes along them."""

from __future__ import annotations

import torch
from torch import Tensor

from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import Base
from bilinear_tc.train.fitting.mlp_weights import READ_ROWS, MLPWeights
from bilinear_tc.train.processes import counts_over_processes, process_index

SHARE = 4  # one row in so many has a direction: a step then costs about a third more


class Tangents:
    """For one row in `SHARE`, an isotropic direction ε in z-scored inputs and the MLP's derivative along it.

    Args:
        base: the decoder whose MLPs' derivatives are taken.
        seed: of the directions. They depend on it, the step and the row's place in the global batch alone, so that
            neither a resumed fit nor another number of processes changes them.
        dtype: of the products.
        before: how many layers under fit come before the base's, whose directions are drawn first.
    """

    def __init__(self, base: Base, seed: int, dtype: torch.dtype, before: int = 0) -> None:
        self.base, self.seed, self.dtype, self.before = base, seed, dtype, before
        self.device = base.device
        self.mlps: list[MLPWeights] = []

    def begin(self, step: int, activations: Activations) -> None:
        """Chooses a batch's rows. UserError, at the first, if an MLP's weights cannot be read (see `MLPWeights`)."""
        rows = activations.rows
        for index, layer in enumerate([] if self.mlps else self.base.layers):
            x, y = (of[index][:READ_ROWS] for of in (activations.x, activations.y))
            self.mlps.append(MLPWeights.read(self.base, layer, x, y).to(self.dtype))
        counts = counts_over_processes(rows, self.device)
        before, everywhere = sum(counts[: process_index()]), sum(counts)
        first = (step - before) % SHARE
        self.rows = slice(first, rows, SHARE)
        self.count = len(range(step % SHARE, everywhere, SHARE))  # over all processes
        self._drawn_before = len(range(step % SHARE, before, SHARE))
        self._generator = torch.Generator(self.device).manual_seed((self.seed * 1_000_003 + step) % 2**63)
        for _ in range(self.before):
            self._everywhere()

    def _everywhere(self) -> Tensor:
        """The next layer's directions at the chosen rows of all processes [count, n_inputs]."""
        return torch.randn(self.count, self.base.n_inputs, generator=self._generator, device=self.device)

    def draw(self, layer: int, x: Tensor, input_std: Tensor, output_std: Tensor) -> tuple[Tensor, Tensor]:
        """Directions ε [rows, n_inputs] for the chosen rows of a layer, and the MLP's derivatives along them.

        To be called for one layer after another.

        Args:
            layer: counts the layers under fit.
            x: raw inputs of the chosen rows [rows, n_inputs].
            input_std, output_std: [features] float32 of the z-scores.

        Returns:
            ε and J ε [rows, n_outputs], both in z-scored units, float32.
        """
        directions = self._everywhere()[self._drawn_before : self._drawn_before + len(x)]
        return directions, self.mlps[layer].derivative(x, directions * input_std).float() / output_std
