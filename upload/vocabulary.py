"""A base's tokens: the text of each, the token of a text, and those whose logits an output direction raises."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bilinear_tc.modeling_bilinear_tc import norm_before
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError


class Vocabulary:
    def __init__(self, base: Base) -> None:
        self._tokenizer, self._texts = base.tokenizer, dict[int, str]()
        embedding: Any = base.model.get_output_embeddings()
        self._unembedding: Tensor | None = None
        if embedding is not None:
            self._norm = norm_before(embedding, base.model)
            self._unembedding = embedding.weight.detach().float()[: len(base.tokenizer)]  # it may have more rows

    def text(self, token: int) -> str:
        """A token's text with its space, which some tokenizers leave out at the beginning."""
        if token not in self._texts:
            decode = self._tokenizer.decode
            once, twice = (str(decode([token] * n, clean_up_tokenization_spaces=False)) for n in (1, 2))
            self._texts[token] = twice[len(once) :] if twice.startswith(once) else once
        return self._texts[token]

    def token(self, text: str) -> int:
        """The token that a text is. UserError if it is several, which it names, or none."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1 and self.text(ids[0]).strip().casefold() == text.strip().casefold():  # not an unknown word's
            return ids[0]
        pieces = f"{len(ids)}, {', '.join(repr(self.text(token)) for token in ids)}" if len(ids) > 1 else "none"
        raise UserError(f"a logit is of one token of the base, but {text!r} is {pieces}: name one")

    def moved(self, direction: Tensor, count: int = 8) -> tuple[list[str], list[str]]:
        """The tokens whose logits rise most, and fall most, as an output moves along a direction [n_outputs], directly.

        There are none if the base has no output embedding of that width.
        """
        if self._unembedding is None or self._unembedding.shape[1] != len(direction):
            return [], []
        u = direction.to(self._unembedding)
        if self._norm is not None:
            u = (u - u.mean() if self._norm.kind == "layernorm" else u) * self._norm.weight.to(u)
        order = (self._unembedding @ u).argsort(descending=True, stable=True).tolist()
        return [self.text(token) for token in order[:count]], [self.text(token) for token in order[: -count - 1 : -1]]
