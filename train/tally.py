"""Work on tensors without values (torch's meta device): what it would compute and hold, without doing it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

META = torch.device("meta")


class Tally(TorchDispatchMode):
    """Bytes of the tensors that are made while it is on: `now`, and at most (`peak`). Tensors have no values: asked
    for one, they say yes (as the masks that decoders look at would); compared, they differ."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        if func in (torch.ops.aten.equal.default, torch.ops.aten.allclose.default):
            return False
        if func is torch.ops.aten._grouped_mm.default:  # of experts: in bfloat16 alone, and its operations not counted
            func, args, kwargs = torch.ops.aten.mm.default, (args[0], args[1][0]), {}  # each row meets one of them
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        return result

    def _free(self, storage: int) -> None:
        self.now -= self._alive.pop(storage)


@dataclass
class Cost:
    """What a piece of work takes: operations (a multiply-add is two), bytes at most while it runs, bytes it leaves."""

    flops: float
    peak: int
    left: int

    @classmethod
    @torch.no_grad()
    def of(cls, work: Callable[[], object]) -> Cost:
        counter = FlopCounterMode(display=False)
        with META, counter, Tally() as tally:
            kept = work()
            return cls(counter.get_total_flops(), tally.peak, tally.now if kept is not None else 0)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without values."""
    return torch.empty(shape, dtype=dtype, device=META)
