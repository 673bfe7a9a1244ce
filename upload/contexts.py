"""What features do on text: the contexts in which each is highest and lowest, and how its values spread; streaming."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilinear_tc.train.moments import Moments

COUNT = 5  # contexts of each sign
BEFORE, AFTER = 20, 8  # tokens shown beside the one that a context is about
SAMPLE = 65_536  # tokens whose values quantiles are of, at most


@dataclass(frozen=True)
class Context:
    """A piece of a sequence around the token at `peak`, where a feature is highest (or lowest) in that sequence."""

    tokens: list[int]
    values: list[float]
    peak: int

    @property
    def value(self) -> float:
        return self.values[self.peak]


class Contexts:
    """Where each feature is highest and lowest: at most one context a sequence and sign, the earliest of equal ones.

    Args:
        features: how many.
        count, before, after: contexts of each sign, and their tokens beside the peak.
    """

    def __init__(self, features: int, count: int = COUNT, before: int = BEFORE, after: int = AFTER) -> None:
        self.count, self.offsets = count, torch.arange(-before, after + 1)
        width = len(self.offsets)
        # of each sign: the peaks' values times it [features, contexts], tokens (−1: none) and values [.., .., width]
        empty = torch.empty(features, 0), torch.empty(features, 0, width).long(), torch.empty(features, 0, width)
        self.sides: dict[int, tuple[Tensor, ...]] = {1: empty, -1: empty}
        self.before = before

    def add(self, input_ids: Tensor, values: Tensor, text: Tensor, peaks: Tensor) -> None:
        """Adds a batch, on the CPU.

        Args:
            input_ids: [sequences, tokens].
            values: [sequences, tokens, features].
            text: [sequences, tokens] bool; what may be shown.
            peaks: [sequences, tokens] bool; what a context may be about.
        """
        rows = torch.arange(len(input_ids))[:, None]
        for sign, best in self.sides.items():
            top, at = (sign * values).masked_fill(~peaks[..., None], -torch.inf).max(1)  # the first of equal ones
            places = at.T[..., None] + self.offsets  # [features, sequences, width]
            there = (places >= 0) & (places < input_ids.shape[1])
            places = places.clamp(0, input_ids.shape[1] - 1)
            there &= text[rows, places]
            found = top.T, input_ids[rows, places].where(there, -1), values.permute(2, 0, 1).gather(2, places)
            merged = [torch.cat(pair, 1) for pair in zip(best, found, strict=True)]
            order = merged[0].argsort(dim=1, descending=True, stable=True)[:, : self.count]
            wide = order[..., None].expand(-1, -1, len(self.offsets))
            self.sides[sign] = tuple(part.gather(1, order if part.ndim == 2 else wide) for part in merged)

    def of(self, feature: int, sign: int) -> list[Context]:
        """A feature's contexts, the one that goes furthest first: highest values (sign 1) or lowest ones (−1)."""
        contexts = []
        for peak, tokens, values in zip(*(part[feature] for part in self.sides[sign]), strict=True):
            there = tokens >= 0
            if peak > -torch.inf:
                place = int(there[: self.before].sum())
                contexts.append(Context(tokens[there].tolist(), values[there].tolist(), place))
        return contexts


class Spread:
    """How features' values spread over tokens.

    Args:
        features: how many.
        tokens: how many will come; of every few one is kept for the quantiles, so that the memory is bounded.

    Attributes:
        moments: of each feature, all tokens counted.
        low, high, positive: each feature's extremes, and how many of its values are above 0.
    """

    def __init__(self, features: int, tokens: int) -> None:
        self.moments, self.seen, self._step = Moments.zeros(features), 0, -(-tokens // SAMPLE)
        self.low, self.high = torch.full((2, features), torch.inf) * torch.tensor([[1.0], [-1.0]])
        self.positive = torch.zeros(features)
        self._kept: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Adds tokens' values [tokens, features]."""
        if not len(values):
            return
        self.moments = self.moments.merge(Moments.of(values))
        self.low, self.high = self.low.minimum(values.amin(0)), self.high.maximum(values.amax(0))
        self.positive += (values > 0).sum(0)
        self._kept.append(values[-self.seen % self._step :: self._step].clone())
        self.seen += len(values)

    def sample(self, feature: int) -> Tensor:
        return torch.cat([values[:, feature] for values in self._kept])
