"""Passes of the base that start at a block, on what the blocks before it have left in the true pass; and its logits of
some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bilinear_tc.train.base import Base


class Reentry:
    """The base, entered at any block.

    The decoder around the blocks runs as ever (masks, positions, the last norm, the head): blocks that are not to run
    give what they are told instead. That is the base itself wherever blocks hand on nothing but their output, which
    `is_exact` finds out.
    """

    def __init__(self, base: Base) -> None:
        self.model = base.model
        self.blocks = list(base.blocks)
        self.left: list[Any] = []  # what each block has left in the true pass

    def keep(self, input_ids: Tensor) -> Tensor:
        """The true pass over input_ids [sequences, tokens]: what the last block leaves, [sequences, tokens, width]."""
        self.left = self._run(input_ids, 0)
        return first(self.left[-1])

    def enter(self, input_ids: Tensor, k: int) -> Tensor:
        """The same pass, as the base now is, from block k on: the blocks before it are as in the true pass."""
        with self._told(k, self.left[k - 1]):
            return first(self._run(input_ids, len(self.blocks) - 1)[-1])

    def logits(self, rows: Tensor) -> Tensor:
        """Logits [rows, vocabulary], float32, of what the last block has left [rows, width]."""
        last = self.left[-1]
        with self._told(len(self.blocks), (rows[:, None], *last[1:]) if isinstance(last, tuple) else rows[:, None]):
            ids = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
            return self.model(input_ids=ids, use_cache=False).logits[:, 0].float()

    def is_exact(self, input_ids: Tensor) -> bool:
        """Whether the logits of input_ids [1, tokens] are the base's own, but for rounding, whichever block is entered.
        What the true pass has left is lost."""
        true = self.model(input_ids=input_ids, use_cache=False).logits[0].float()
        tolerance = torch.finfo(self.model.dtype).eps ** 0.5 * true.norm()
        try:
            self.keep(input_ids)
            for k in range(len(self.blocks)):
                self._run(input_ids.flip(1), 0)  # what blocks may have handed on aside is now another text's
                logits = self.logits(self.enter(input_ids, k)[0])
                if not (logits - true).norm() <= tolerance:
                    return False
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):  # blocks of another kind
            return False
        return True

    def _run(self, input_ids: Tensor, start: int) -> list[Any]:
        """What the blocks from `start` on leave in a pass without the head."""
        left: list[Any] = []
        handles = [b.register_forward_hook(lambda _b, _i, o: left.append(copied(o))) for b in self.blocks[start:]]
        try:
            self.model.base_model(input_ids=input_ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return left

    @contextmanager
    def _told(self, k: int, output: Any) -> Iterator[None]:
        """While the context lasts, the blocks before k give this output."""
        previous = [vars(block).get("forward") for block in self.blocks[:k]]
        for block in self.blocks[:k]:
            block.forward = lambda *_, **__: copied(output)  # which what follows may add to in place
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, previous, strict=False):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def copied(output: Any) -> Any:
    return (output[0].clone(), *output[1:]) if isinstance(output, tuple) else output.clone()
