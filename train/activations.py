"""One batch's MLP inputs and outputs of all layers, on the device, with their moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, zip_longest

import torch
from torch import Tensor

from bilinear_tc.train.base import Base
from bilinear_tc.train.massive import massive, row_weights
from bilinear_tc.train.moments import Moments
from bilinear_tc.train.processes import counts_over_processes
from bilinear_tc.train.shard import Shard
from bilinear_tc.train.text.batches import TokenBatch


class Activations:
    """This process's rows of a batch: `x` [layers, rows, n_inputs] and `y` [layers, rows, n_outputs].

    They are its share of the rows of all layers or, if layers are shared out, all rows of its own layers. The buffers
    are allocated once, for the largest batch, and refilled; padded positions never enter them.
    """

    def __init__(
        self,
        base: Base,
        max_rows: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        compile: bool = False,
        shard: Shard | None = None,
    ) -> None:
        self.base, self.shard = base, shard or Shard(len(base.layers))
        self.rows = 0
        shape = (len(self.shard.own), max_rows)
        self._x = torch.empty(*shape, base.n_inputs, device=device, dtype=dtype)
        self._y = torch.empty(*shape, base.n_outputs, device=device, dtype=dtype)
        self._weights = torch.ones(shape, device=device)
        self._ordinary = torch.ones(shape, device=device, dtype=torch.bool)
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
        """Runs the base over this process's share of a batch, `micro_batch_size` sequences at a time, and keeps what
        its MLPs saw and said."""
        device = self._x.device
        passes = []  # token ids, which rows are kept (None: all), and how many
        masks = None if batch.mask is None else batch.mask.split(micro_batch_size)
        for number, ids in enumerate(batch.input_ids.split(micro_batch_size) if len(batch) else ()):
            kept = None if masks is None else masks[number].flatten().nonzero().squeeze(1).to(device, non_blocking=True)
            passes.append((ids, kept, ids.numel() if kept is None else len(kept)))
        if self.shard.shared_out:
            self._exchange(passes)
        else:
            self.rows = 0
            for input_ids, kept, count in passes:
                span = slice(self.rows, self.rows + count)
                self._run(input_ids, kept, self._x[:, span], self._y[:, span])
                self.rows += count
        self.weights.fill_(1)
        self.ordinary.fill_(True)

    def _run(self, input_ids: Tensor, kept: Tensor | None, xs: Tensor, ys: Tensor) -> None:
        """Runs the base over some sequences; all rows, or those `kept`, go to xs and ys [layers, rows, features]."""

        def keep(layer: int, x: Tensor, y: Tensor) -> None:
            index = self.base.layers.index(layer)
            for buffer, values in ((xs, x.flatten(0, 1)), (ys, y.flatten(0, 1))):
                buffer[index] = values if kept is None else values[kept]

        self.base.run(input_ids.to(xs.device, non_blocking=True), keep)

    def _exchange(self, passes: Sequence[tuple[Tensor, Tensor | None, int]]) -> None:
        """Runs the base over this process's sequences and hands every layer's rows to its owner, pass by pass; they lie
        there in the order of the whole batch."""
        counts = self.shard.counts([count for _, _, count in passes])
        *places, self.rows = accumulate(map(sum, counts), initial=0)
        widths = self._x.shape[2], self._y.shape[2]
        for own, of_processes in zip_longest(passes, zip(*counts, strict=True)):
            both = self._x.new_empty(len(self.base.layers), own[2] if own else 0, sum(widths))
            if own:
                self._run(*own[:2], *both.split(widths, -1))
            for process, rows in enumerate(self.shard.exchange(both, of_processes)):
                span = slice(places[process], places[process] + rows.shape[1])
                self._x[:, span], self._y[:, span] = rows.split(widths, -1)
                places[process] = span.stop

    def weigh(self, median_norm: Tensor) -> None:
        """Sets the rows' weights, and which are ordinary, by the median norms [layers] of the MLPs' outputs."""
        self._weights[:, : self.rows] = row_weights(self.y, median_norm)
        self._ordinary[:, : self.rows] = ~massive(self.y, median_norm)

    def count(self) -> int:
        """Rows of all processes."""
        return sum(counts_over_processes(self.rows, self._x.device))

    def moments(self) -> tuple[Moments, Moments]:
        """Moments [layers, features] of this process's inputs and outputs, over the ordinary rows."""
        ordinary = self.ordinary.float()
        x, y = (
            Moments.stack([self._moments_of(*of_layer) for of_layer in zip(buffer, ordinary, strict=True)])
            for buffer in (self.x, self.y)
        )
        return x, y
