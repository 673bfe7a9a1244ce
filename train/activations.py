"""One batch's MLP inputs and outputs of all layers, on the device, with their moments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bilinear_tc.train.base import Base
from bilinear_tc.train.massive import massive, row_weights
from bilinear_tc.train.moments import Moments
from bilinear_tc.train.processes import sum_over_processes
from bilinear_tc.train.text.batches import TokenBatch


class Activations:
    """This process's rows of a batch: `x` [layers, rows, n_inputs] and `y` [layers, rows, n_outputs].

    The buffers are allocated once, for the largest batch, and refilled; padded positions never enter them.
    """

    def __init__(
        self, base: Base, max_rows: int, *, device: torch.device, dtype: torch.dtype, compile: bool = False
    ) -> None:
        self.base = base
        self.rows = 0
        self._x = torch.empty(len(base.layers), max_rows, base.n_inputs, device=device, dtype=dtype)
        self._y = torch.empty(len(base.layers), max_rows, base.n_outputs, device=device, dtype=dtype)
        self._weights = torch.ones(len(base.layers), max_rows, device=device)
        self._ordinary = torch.ones(len(base.layers), max_rows, device=device, dtype=torch.bool)
        # fused, the float32 copies that the sums are taken over are never written to memory
        self._moments_of: Callable[[Tensor, Tensor], Moments] = torch.compile(Moments.of) if compile else Moments.of

    @property
    def x(self) -> Tensor:
        return self._x[:, : self.rows]

    @property
    def y(self) -> Tensor:
        return self._y[:, : self.rows]

    @property
    def weights(self) -> Tensor:
        """What each row counts [layers, rows], float32: 1 until `weigh` sets it."""
        return self._weights[:, : self.rows]

    @property
    def ordinary(self) -> Tensor:
        """Which rows [layers, rows] the statistics are of: all until `weigh` finds massive ones."""
        return self._ordinary[:, : self.rows]

    def fill(self, batch: TokenBatch, micro_batch_size: int) -> None:
        """Runs the base over a batch, `micro_batch_size` sequences at a time, and keeps what its MLPs saw and said."""
        device = self._x.device
        self.rows = 0
        for start in range(0, len(batch), micro_batch_size):
            part = slice(start, start + micro_batch_size)
            kept = None
            if batch.mask is not None:
                kept = batch.mask[part].flatten().nonzero().squeeze(1)
            input_ids = batch.input_ids[part].to(device, non_blocking=True)
            first, count = self.rows, input_ids.numel() if kept is None else len(kept)
            kept = None if kept is None else kept.to(device, non_blocking=True)
            self.base.run(input_ids, partial(self._keep, kept=kept, rows=slice(first, first + count)))
            self.rows += count
        self.weights.fill_(1)
        self.ordinary.fill_(True)

    def _keep(self, layer: int, x: Tensor, y: Tensor, *, kept: Tensor | None, rows: slice) -> None:
        """Copies one layer's activations [sequences, tokens, features] to its rows; all, or those at `kept`."""
        index = self.base.layers.index(layer)
        for buffer, values in ((self._x, x.flatten(0, 1)), (self._y, y.flatten(0, 1))):
            buffer[index, rows] = values if kept is None else values[kept]

    def weigh(self, median_norm: Tensor) -> None:
        """Sets the rows' weights, and which are ordinary, by the median norms [layers] of the MLPs' outputs."""
        self._weights[:, : self.rows] = row_weights(self.y, median_norm)
        self._ordinary[:, : self.rows] = ~massive(self.y, median_norm)

    def count(self) -> int:
        """Rows of all processes."""
        return int(sum_over_processes(torch.tensor(float(self.rows), dtype=torch.float64, device=self._x.device)))

    def moments(self) -> tuple[Moments, Moments]:
        """Moments [layers, features] of this process's inputs and outputs, over the ordinary rows."""
        ordinary = self.ordinary.float()
        x, y = (
            Moments.stack([self._moments_of(*of_layer) for of_layer in zip(buffer, ordinary, strict=True)])
            for buffer in (self.x, self.y)
        )
        return x, y
