"""What the base loses with its MLPs replaced: cross-entropy and divergence over predicted tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.measuring.evaluation import LossScores
from bilinear_tc.train.processes import sum_over_processes
from bilinear_tc.train.text.batches import TokenBatch

NOTHING_TO_PREDICT = (
    "the base's loss cannot be measured, since no token of the held-out text follows another in its sequence: expected "
    "sequences (seq_len) and documents of at least 2 tokens"
)


class LossSums:
    """Cross-entropy and divergence from the base, summed over predicted tokens, of one way to run the base."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # cross-entropy, KL, tokens

    def add(self, log_probs: Tensor, base_log_probs: Tensor, targets: Tensor) -> None:
        """Adds predictions: log-probabilities [tokens, vocabulary], targets [tokens]."""
        self.sums[0] -= log_probs.gather(1, targets[:, None]).sum(dtype=torch.float64)
        self.sums[1] += (base_log_probs.exp() * (base_log_probs - log_probs)).sum(dtype=torch.float64)
        self.sums[2] += len(targets)

    def means(self) -> tuple[float, float]:
        """Cross-entropy and KL(base ‖ this) in nats a token, over all processes.

        UserError if no token follows another, so that none was predicted.
        """
        ce, kl, tokens = sum_over_processes(self.sums).tolist()
        if not tokens:
            raise UserError(NOTHING_TO_PREDICT)
        return ce / tokens, kl / tokens


class Replacement:
    """The losses of the base, of each layer replaced alone, and of all of them replaced at once.

    Each group of layers is replaced by its transcoders and, beside it, by the MLPs' mean outputs: two forward passes.

    Args:
        base: the base, with all its layers.
        transcoders: the layers' models, on the base's device.
    """

    def __init__(self, base: Base, transcoders: Sequence[BilinearTC]) -> None:
        self.base, self.device = base, base.model.device
        self.groups = [*([transcoder] for transcoder in transcoders), list(transcoders)]
        self.own = LossSums(self.device)
        self.replaced, self.ablated = ([LossSums(self.device) for _ in self.groups] for _ in range(2))

    @torch.no_grad()
    def add(self, batch: TokenBatch) -> None:
        if not len(batch):
            return
        input_ids = batch.input_ids.to(self.device)
        mask = torch.ones_like(input_ids, dtype=torch.bool) if batch.mask is None else batch.mask.to(self.device)
        predicted = (mask[:, :-1] & mask[:, 1:]).flatten()
        targets = input_ids[:, 1:].flatten()[predicted]

        def log_probs() -> Tensor:
            logits = self.base.model(input_ids=input_ids, use_cache=False).logits[:, :-1]
            return logits.flatten(0, 1)[predicted].float().log_softmax(-1)

        true = log_probs()
        self.own.add(true, true, targets)
        for group, replaced, ablated in zip(self.groups, self.replaced, self.ablated, strict=True):
            with transcoders_attached(self.base, group):
                replaced.add(log_probs(), true, targets)
            with mean_output(self.base, group):
                ablated.add(log_probs(), true, targets)

    def scores(self) -> tuple[float, list[LossScores], LossScores]:
        """The base's own cross-entropy, the scores of each layer, and those of all layers at once.

        UserError if no token was predicted.
        """
        ce, _ = self.own.means()
        *layers, together = [
            loss_scores(ce, *replaced.means(), ablated.means()[0])
            for replaced, ablated in zip(self.replaced, self.ablated, strict=True)
        ]
        return ce, layers, together


def loss_scores(ce: float, replaced_ce: float, kl: float, ablated_ce: float) -> LossScores:
    """The scores from three cross-entropies in nats a token: the base's own, with its MLPs replaced, and with their
    mean outputs in place of them."""
    recovered = None if ablated_ce == ce else 1 - (replaced_ce - ce) / (ablated_ce - ce)
    return LossScores(ce_increase=replaced_ce - ce, kl=kl, loss_recovered=recovered)


@contextmanager
def mean_output(base: Base, transcoders: Sequence[BilinearTC]) -> Iterator[None]:
    """While the context lasts, these layers' MLPs say their mean output whatever comes in."""
    with ExitStack() as stack:
        for transcoder in transcoders:

            def say_mean(
                _entered: list[Tensor], true: Callable[[], Tensor], mean: Tensor = transcoder.output_mean
            ) -> Tensor:
                output = true()
                return mean.to(output).expand_as(output).clone()  # some decoders (Falcon) add to it in place

            stack.enter_context(base.site(transcoder.config.layer_index).replaced(say_mean))
        yield


@contextmanager
def transcoders_attached(base: Base, transcoders: Sequence[BilinearTC]) -> Iterator[None]:
    """While the context lasts, these transcoders stand in for their MLPs."""
    with ExitStack() as stack:
        for transcoder in transcoders:
            stack.enter_context(transcoder.attached(base.model))
        yield
