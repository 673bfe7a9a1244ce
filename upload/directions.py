"""What a reader asks of a layer, `logit: A - B`, `unit:17` or `top`, read as quadratic forms of the layer's input."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilinear_tc.modeling_bilinear_tc import BilinearTC, Spectrum
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError, one_line
from bilinear_tc.upload.vocabulary import Vocabulary

TOP = 8  # the units that `top` is short for
BARS = 12  # eigenvalues that are read of a direction
EIGENVECTORS = 2  # and those of them whose contexts are looked for
QUOTED = r'\s*"(?:[^"\\]|\\.)*"\s*'
LOGIT = re.compile(rf"({QUOTED}|.+?)(?: -({QUOTED}|.+))?", re.DOTALL)


@dataclass(frozen=True)
class Asked:
    """What was asked for: the logit of a token, or of one less another's; a unit; or the strongest units."""

    tokens: tuple[str, ...] = ()
    unit: int | None = None
    top: int = 0

    @classmethod
    def parse(cls, text: str) -> Asked:
        """Reads a direction. UserError if it is none.

        A token is what stands there, its space too: "logit: None - self" is of " None" and " self". In double quotes it
        is read as JSON, as a token that holds " -" or a line break needs.
        """
        kind, _, rest = text.partition(":")
        if text == "top" or (kind == "top" and re.fullmatch(r"[1-9]\d{0,3}", rest)):
            return cls(top=int(rest or TOP))
        if kind == "unit" and re.fullmatch(r"\d{1,9}", rest):
            return cls(unit=int(rest))
        if kind == "logit" and rest.strip() and (match := LOGIT.fullmatch(rest)):
            return cls(tokens=tuple(unquoted(token) for token in match.groups() if token is not None))
        raise UserError(f'direction must read like "logit: A - B", "logit: A", unit:17, top or top:20, got {text!r}')


def unquoted(token: str) -> str:
    try:
        return json.loads(token) if re.fullmatch(QUOTED, token) else token
    except ValueError as error:
        raise UserError(f"a token in quotes must be a JSON text, got {token.strip()}: {one_line(error)}") from error


@dataclass(frozen=True, eq=False)
class Feature:
    """Something that has a value at every token.

    Attributes:
        name: for a reader.
        anchor: its place on the layer's page.
        index: its number in the layer: a unit's own, or one beyond the last unit's.
        raises: the output direction [n_outputs] that it writes along as its value rises; of an eigenvector, whose
            square counts, as its value moves away from 0.
    """

    name: str
    anchor: str
    index: int
    raises: Tensor


@dataclass(frozen=True, eq=False)
class Reading:
    """A direction of the output, or a hidden unit: its value u·y, read as a quadratic form of the input.

    Attributes:
        features: itself, then the first eigenvectors of its form, whose values are v·δ.
        direction: u [n_outputs]; None of a unit, whose number is `unit`.
        spectrum: about the mean, in the metric of the covariance. Of each eigenvector the largest entry is positive.
        linear_share: the linear part's share of the value's variance, as `Spectrum.share` counts it.
    """

    features: list[Feature]
    direction: Tensor | None
    unit: int | None
    spectrum: Spectrum
    linear_share: float

    def values(self, x: Tensor, units: Tensor, y: Tensor) -> Tensor:
        """Each feature's value [..., features] at inputs x, and at the units and outputs that they lead to."""
        own = units[..., self.unit] if self.direction is None else y @ self.direction
        vectors = self.spectrum.eigenvectors[:, : len(self.features) - 1]
        return torch.cat([own.unsqueeze(-1), (x - self.spectrum.about) @ vectors], -1)


def read(tc: BilinearTC, asked: Iterable[Asked], base: Base, vocabulary: Vocabulary, strength: Tensor) -> list[Reading]:
    """A layer's readings in the order asked for, each once. UserError if the layer or the base has no such thing.

    Args:
        strength: [n_hidden], by which the strongest units are told.
    """
    order, n_hidden = strength.argsort(descending=True, stable=True).tolist(), tc.config.n_hidden
    found: dict[tuple[str, ...] | int, Reading] = {}
    for one in asked:
        for unit in order[: one.top] if one.unit is None else [one.unit]:
            if unit >= n_hidden:
                raise UserError(
                    f"layer {tc.config.layer_index} has units 0 to {n_hidden - 1}, but unit:{unit} was asked for"
                )
            if unit not in found:
                found[unit] = read_unit(tc, unit, n_hidden + (1 + EIGENVECTORS) * len(found))
        if one.tokens and one.tokens not in found:
            ids = [vocabulary.token(text) for text in one.tokens]
            try:
                u = tc.logit_direction(base.model, *ids)
            except ValueError as error:
                raise UserError(f"the logit of {one.tokens[0]!r} cannot be read: {one_line(error)}") from error
            name = "logit " + " − ".join(f"“{text}”" for text in one.tokens)
            itself = Feature(name, "-".join(map(str, ["logit", *ids])), n_hidden + (1 + EIGENVECTORS) * len(found), u)
            found[one.tokens] = read_form(tc, u, itself, itself.index + 1, direction=u)
    return list(found.values())


def read_unit(tc: BilinearTC, unit: int, beyond: int) -> Reading:
    itself = Feature(f"unit {unit}", f"unit-{unit}", unit, tc.writers()[unit])
    return read_form(alone(tc, unit), tc.input_mean.new_ones(1), itself, beyond, unit=unit)


def read_form(
    tc: BilinearTC, u: Tensor, itself: Feature, beyond: int, *, direction: Tensor | None = None, unit: int | None = None
) -> Reading:
    """The form of u·y; the eigenvectors' numbers go on from `beyond`."""
    k = min(tc.config.n_inputs, BARS if unit is None else 2)  # a product of two maps has two eigenvalues
    spectrum = tc.spectrum(u, k=k)
    vectors, first = spectrum.eigenvectors, spectrum.eigenvalues[0]
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    slope = spectrum.linear @ tc.input_covariance() @ spectrum.linear
    # share[0] is 2 λ² / Var, which tells Var; without a quadratic part all is linear
    linear_share = (slope * spectrum.share[0] / (2 * first.square())).item() if first != 0 else 1.0
    eigenvectors = [
        Feature(f"eigenvector {i + 1}", f"{itself.anchor}-v{i + 1}", beyond + i, value.sign() * itself.raises)
        for i, value in enumerate(spectrum.eigenvalues[:EIGENVECTORS])
    ]
    spectrum = dataclasses.replace(spectrum, eigenvectors=vectors * signs)
    return Reading([itself, *eigenvectors], direction, unit, spectrum, linear_share)


@torch.no_grad()
def alone(tc: BilinearTC, unit: int) -> BilinearTC:
    """The transcoder whose one output is a unit's product."""
    config = copy.deepcopy(tc.config)
    config.n_hidden, config.n_outputs, config.bias = 1, 1, True
    one = BilinearTC(config).to(tc.input_mean.device)  # type: ignore[arg-type] # transformers hides the types
    for name, statistic in one.named_buffers():
        if not name.startswith("output"):
            statistic.copy_(getattr(tc, name))
    for name in filter(None, config.factors):
        old, new = getattr(tc, name), getattr(one, name)
        new.weight.copy_(old.weight[unit : unit + 1])
        if new.bias is not None:
            new.bias.copy_(0 if old.bias is None else old.bias[unit])
    last = getattr(one, config.last_map)
    last.weight.fill_(1)
    last.bias.fill_(0)
    return one.eval()
