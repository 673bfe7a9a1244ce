"""How long greedy continuations of held-out prompts stay the base's own with all its MLPs replaced."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import one_line
from bilinear_tc.train.measuring.evaluation import Continuations, finite
from bilinear_tc.train.measuring.replacement import transcoders_attached
from bilinear_tc.train.measuring.standard_error import influence, standard_error
from bilinear_tc.train.processes import gather_over_processes, is_main, process_count, process_index, sum_over_processes
from bilinear_tc.train.text.batches import TokenBatch

logger = logging.getLogger(__name__)

PROMPTS = 64
TOKENS = 64  # of a prompt, and of its continuation
AT_ONCE = 16  # prompts that are continued together, whatever the number of processes


class Continuing:
    """Continues the beginnings of the first held-out sequences, greedily, by the base and with all layers replaced.

    Args:
        base: the base, with all its layers.
        transcoders: the layers' models, on the base's device.
    """

    def __init__(self, base: Base, transcoders: Sequence[BilinearTC]) -> None:
        self.base, self.transcoders = base, transcoders
        config = base.model.config.get_text_config()  # MPT names its positions otherwise
        known = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
        positions = next(filter(None, known), 2 * TOKENS)
        self._length, self._new = min(TOKENS, positions // 2), min(TOKENS, positions - positions // 2)
        self._prompts: list[Tensor] = []

    def add(self, batch: TokenBatch) -> None:
        """Keeps the beginnings of a batch's sequences, of all processes, which must add together, if that is text
        alone; nothing if there are enough."""
        if sum(map(len, self._prompts)) < PROMPTS:
            begun = batch.input_ids[:, : self._length]
            whole = slice(None) if batch.mask is None else batch.mask[:, : self._length].all(1)
            self._prompts.append(gather_over_processes(begun[whole]))

    @torch.no_grad()
    def scores(self) -> Continuations | None:
        """What they have in common, the same on any number of processes; None, with a warning, if there are none."""
        prompts = torch.cat(self._prompts)[:PROMPTS].to(self.base.device)  # [prompts, tokens]
        problem = "" if len(prompts) else "no held-out sequence begins with text enough for a prompt"
        if not getattr(self.base.model, "can_generate", bool)():
            problem = f"{type(self.base.model).__name__} cannot generate"
        said = prompts.new_zeros(len(prompts), 2, self._new)  # by the base, and with its MLPs replaced
        starts = range(process_index() * AT_ONCE, 0 if problem else len(prompts), process_count() * AT_ONCE)
        try:
            for rows in (slice(start, start + AT_ONCE) for start in starts):
                said[rows, 0] = self._continued(prompts[rows])
                with transcoders_attached(self.base, self.transcoders):
                    said[rows, 1] = self._continued(prompts[rows])
        except Exception as error:  # whatever a base's own way to generate makes of it
            problem = one_line(error)
        said, failed = sum_over_processes(said), sum_over_processes(torch.tensor(float(bool(problem))).to(said.device))
        if failed:
            if is_main():
                logger.warning(f"greedy continuations were not compared: {problem or 'another process failed'}")
            return None
        return self._compared(prompts, *said.unbind(1))

    def _continued(self, prompts: Tensor) -> Tensor:
        with greedy(self.base, self._new):
            continued = self.base.model.generate(prompts, attention_mask=torch.ones_like(prompts))
        return continued[:, prompts.shape[1] :]

    def _compared(self, prompts: Tensor, own: Tensor, replaced: Tensor) -> Continuations:
        same = (own == replaced).long().cumprod(1).sum(1)  # tokens before the first that differs
        mean, error = same.double().mean(), standard_error(influence(same.double(), torch.ones_like(same).double()))
        typical = same.argsort(stable=True)[(len(same) - 1) // 2]
        optional: dict[str, Any] = finite({"same_mean_se": error.item()})
        if self.base.tokenizer is not None:
            texts = {"prompt": prompts, "base": own, "replaced": replaced}
            optional |= {name: self.base.tokenizer.decode(ids[typical].tolist()) for name, ids in texts.items()}
        return Continuations(
            prompts=len(prompts),
            prompt_tokens=prompts.shape[1],
            tokens=self._new,
            same_median=float(median(same.tolist())),
            same_mean=mean.item(),
            **optional,
        )


@contextmanager
def greedy(base: Base, tokens: int) -> Iterator[None]:
    """While the context lasts, the base generates so many of its most likely tokens, whatever its own settings say."""
    own = base.model.generation_config
    base.model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=tokens)
    try:
        yield
    finally:
        base.model.generation_config = own
