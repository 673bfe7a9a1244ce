"""Layers shared out over the processes: each owns some, whole, and all rows of those layers travel to it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bilinear_tc.train.base import Base
from bilinear_tc.train.processes import alone, gather_over_processes, on_all, process_count, process_index
from bilinear_tc.train.text.batches import TokenBatch

T = TypeVar("T")


class Shard:
    """Which of the layers under fit are this process's own: neighbors, as many as another's or one more or less.

    Its methods, but for `alone`, are for all processes together; if nothing is shared out, they give back what they
    are given.

    Args:
        layers: how many there are.
        shared_out: whether the processes own different ones; else each holds all layers and its share of the rows.

    Attributes:
        bounds: the first layer of each process, and the end of the last.
        own: this process's layers among all.
    """

    def __init__(self, layers: int, shared_out: bool = False) -> None:
        processes, index = (process_count(), process_index()) if shared_out else (1, 0)
        self.bounds = [process * layers // processes for process in range(processes + 1)]
        self.own = range(*self.bounds[index : index + 2])
        self.shared_out = processes > 1
        self._group: dist.ProcessGroup | None = None

    def alone(self) -> AbstractContextManager[None]:
        """While the context lasts, what is summed over processes is this one's own: it has all rows of its layers."""
        return alone() if self.shared_out else nullcontext()

    def sequences(self, batch_size: int) -> int:
        """The most sequences of a batch whose rows this process holds: its share or, of its own layers, all."""
        return batch_size if self.shared_out else -(-batch_size // process_count())

    def of(self, base: Base) -> Base:
        """The base as that of this process's layers alone."""
        own = copy.copy(base)
        own.layers = [base.layers[index] for index in self.own]
        return own

    def gather(self, own: Tensor) -> Tensor:
        """Of all layers [layers, ...] what each process has of its own [own layers, ...]."""
        if not self.shared_out:
            return own
        everything = own.new_zeros(self.bounds[-1], *own.shape[1:])
        everything[self.own.start : self.own.stop] = own
        dist.all_reduce(everything)
        return everything

    def join(self, own: list[T]) -> list[T]:
        """The same as `gather` of a small object a layer."""
        return [of_layer for of_process in on_all(lambda: own) for of_layer in of_process] if self.shared_out else own

    def whole(self, batch: TokenBatch) -> TokenBatch:
        """The batch of which each process has a share."""
        if not self.shared_out:
            return batch
        return batch.map(lambda tensor: gather_over_processes(tensor.long()).to(tensor.dtype))  # no sums of bools

    def counts(self, own: list[int]) -> list[list[int]]:
        """The rows of each process's parts [processes][parts], given those of this one's; 0 where it has no more."""
        self._group = self._group or dist.new_group(backend="gloo")  # between CPUs: no device is waited for
        told = [own] * (len(self.bounds) - 1)
        dist.all_gather_object(told, own, self._group)
        parts = max(map(len, told))
        return [counts + [0] * (parts - len(counts)) for counts in told]

    def exchange(self, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Sends this process's rows of every layer to the layer's owner.

        Args:
            rows: [layers, rows, features].
            counts: how many rows each process has.

        Returns:
            Each process's rows of this one's layers [own layers, rows, features].
        """
        row = rows.shape[2] * rows.element_size()
        sent = rows.flatten().view(torch.uint8)  # whatever the type, of which a transport may not know every one
        sizes = [len(self.own) * count * row for count in counts]
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(
            received, sent, sizes, [(end - start) * rows.shape[1] * row for start, end in pairwise(self.bounds)]
        )
        shapes = ((len(self.own), count, rows.shape[2]) for count in counts)
        return [of.view(rows.dtype).view(shape) for of, shape in zip(received.split(sizes), shapes, strict=True)]
