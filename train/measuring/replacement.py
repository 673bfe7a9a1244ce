"""What the base loses with its MLPs replaced: cross-entropy, divergence and agreement over predicted tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.measuring.evaluation import LossScores, finite
from bilinear_tc.train.measuring.reentry import Reentry
from bilinear_tc.train.measuring.standard_error import influence, standard_error
from bilinear_tc.train.processes import gather_over_processes
from bilinear_tc.train.text.batches import TokenBatch

AT_ONCE = 1024  # tokens that the base runs on at once
LOGITS = 2**23  # that exist at once, of the base and of the base with MLPs replaced each
NOTHING_TO_PREDICT = (
    "the base's loss cannot be measured, since no token of the held-out text follows another in its sequence: expected "
    "sequences (seq_len) and documents of at least 2 tokens"
)


class Replacement:
    """The losses of the base, of each layer replaced alone, and of all of them replaced at once.

    Each group of layers is replaced by its transcoders and, beside it, by the MLPs' mean outputs: two forward passes,
    from the group's first block on where the base can be entered there.

    Args:
        base: the base, with all its layers.
        transcoders: the layers' models, on the base's device.
        alone: whether to replace each layer alone too.
    """

    def __init__(self, base: Base, transcoders: Sequence[BilinearTC], *, alone: bool = True) -> None:
        self.base, self.device = base, base.device
        self.groups = [*([transcoder] for transcoder in transcoders if alone), list(transcoders)]
        self.passes = Reentry(base)
        self._exact: bool | None = None  # whether it can be entered at each block; found out on the first few tokens
        # by sequence: summed cross-entropy, KL and agreement of the base, of each group replaced and of each averaged;
        # its tokens
        self._sums = [torch.zeros(0, 1 + 2 * len(self.groups), 3, dtype=torch.float64, device=self.device)]
        self._tokens = [torch.zeros(0, dtype=torch.float64, device=self.device)]

    @torch.no_grad()
    def add(self, batch: TokenBatch) -> None:
        """Adds this process's sequences of a batch."""
        ids = batch.input_ids.to(self.device)
        mask = torch.ones_like(ids, dtype=torch.bool) if batch.mask is None else batch.mask.to(self.device)
        if len(ids) and self._exact is None:
            self._exact = self.passes.is_exact(ids[:1, :64])
        count = max(1, AT_ONCE // ids.shape[1]) if self._exact else 1
        for part, kept in zip(ids.split(count), mask.split(count), strict=True):
            predicted = kept[:, :-1] & kept[:, 1:]
            sums = self._sums[0].new_zeros(len(part), *self._sums[0].shape[1:])
            if predicted.any():
                self._add_part(part, predicted, sums)
            self._sums.append(sums)
            self._tokens.append(predicted.sum(1).double())

    def _add_part(self, ids: Tensor, predicted: Tensor, sums: Tensor) -> None:
        """Adds up some sequences' losses at the tokens predicted [sequences, tokens − 1]."""
        sequences, targets = predicted.nonzero()[:, 0], ids[:, 1:][predicted]
        ways = [
            (group[0].config.layer_index, replaced(self.base, group))
            for replaced in (transcoders_attached, mean_output)
            for group in self.groups
        ]

        def add(way: int, true: Tensor, own: Tensor, rows: slice) -> None:
            """Log-probabilities [rows, vocabulary], the base's and this way's."""
            ce = -own.gather(1, targets[rows, None]).squeeze(1)
            kl = (true.exp() * (true - own)).sum(1)
            same = own.argmax(1) == true.argmax(1)
            sums[:, way].index_add_(0, sequences[rows], torch.stack([ce, kl, same], 1).double())

        if self._exact:
            left = [self.passes.keep(ids)[:, :-1][predicted]]
            for start, context in ways:
                with context:
                    left.append(self.passes.enter(ids, start)[:, :-1][predicted])
            count = max(1, LOGITS // self.base.model.config.get_text_config().vocab_size)
            for rows in (slice(start, start + count) for start in range(0, len(targets), count)):
                true = self.passes.logits(left[0][rows]).log_softmax(-1)
                add(0, true, true, rows)
                for way, own in enumerate(left[1:], 1):
                    add(way, true, self.passes.logits(own[rows]).log_softmax(-1), rows)
        else:
            true = self._log_probs(ids)[predicted]
            add(0, true, true, slice(None))
            for way, (_, context) in enumerate(ways, 1):
                with context:
                    add(way, true, self._log_probs(ids)[predicted], slice(None))

    def _log_probs(self, ids: Tensor) -> Tensor:
        """Of a whole pass, [sequences, tokens − 1, vocabulary]."""
        return self.base.model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)

    def scores(self) -> ReplacementScores:
        """What was lost, over all processes; UserError if no token was predicted."""
        sums, tokens = (gather_over_processes(torch.cat(parts)) for parts in (self._sums, self._tokens))
        total = tokens.sum()
        if not total:
            raise UserError(NOTHING_TO_PREDICT)
        sums[:, 1:, 0] -= sums[:, :1, 0]  # rises of the cross-entropy
        pulls = influence(sums, tokens[:, None, None])
        (base_ce, *_), *means = (sums.sum(0) / total).tolist()
        _, *errors = standard_error(pulls).tolist()
        of_mean = standard_error(pulls[:, 1 : len(self.groups)].mean(1)).tolist()
        ablated = [rise for rise, *_ in means[len(self.groups) :]]
        *layers, together = map(loss_scores, means, errors, ablated)
        return ReplacementScores(base_ce, int(total), layers, together, named_errors(of_mean))


class ReplacementScores(NamedTuple):
    """The base's own cross-entropy and the tokens predicted; each layer's scores, those of all layers at once, and the
    standard errors of the layers' means."""

    base_ce: float
    tokens: int
    layers: list[LossScores]
    together: LossScores
    mean_se: dict[str, float]


def loss_scores(means: Sequence[float], errors: Sequence[float], ablated: float) -> LossScores:
    """The scores from the cross-entropy's rise with MLPs replaced and its KL, in nats a token, the agreement, their
    standard errors, and the rise with the MLPs' mean outputs."""
    rise, kl, top1 = means
    recovered = 1 - rise / ablated if ablated else None
    return LossScores(ce_increase=rise, kl=kl, top1=top1, loss_recovered=recovered, **named_errors(errors))


def named_errors(errors: Sequence[float]) -> dict[str, float]:
    return finite(dict(zip(("ce_increase_se", "kl_se", "top1_se"), errors, strict=True)))


@contextmanager
def mean_output(base: Base, transcoders: Sequence[BilinearTC]) -> Iterator[None]:
    """While the context lasts, these layers' MLPs say their mean output whatever comes in."""
    with ExitStack() as stack:
        for transcoder in transcoders:

            def say_mean(
                _entered: list[Tensor],
                true: Callable[[], Tensor],
                _before: Callable[[], Tensor],
                mean: Tensor = transcoder.output_mean,
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
