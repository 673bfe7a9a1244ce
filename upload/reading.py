"""Reads layers of a set: what is asked for, from the weights, and what it does on held-out text, in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.massive import norms
from bilinear_tc.train.measuring.evaluation import LayerScores
from bilinear_tc.train.measuring.held_out import check_held_out
from bilinear_tc.train.moments import Moments
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.run import Run
from bilinear_tc.train.text.batches import TokenBatch
from bilinear_tc.train.text.source import open_held_out, settled_bos
from bilinear_tc.upload.contexts import Contexts, Spread
from bilinear_tc.upload.directions import Asked, Feature, Reading, read
from bilinear_tc.upload.vocabulary import Vocabulary

SEQUENCES = 16  # that the base runs on at once
WRITERS = 4  # units that are named of those that write into an eigenvector


class Writer(NamedTuple):
    """An earlier unit that writes into what a feature reads.

    Attributes:
        sign: whether the feature rises (1) or falls with the unit's product.
        share: of the variance that all earlier units, if they were independent, would give the feature.
    """

    layer: int
    unit: int
    sign: int
    share: float


@dataclass(eq=False)
class LayerReading:
    """What was read of one layer.

    Attributes:
        writers: of each eigenvector, by its anchor, the earlier units that write most into it, directly.
        contexts, spread: of all features, in the order of `features`.
        true, error: moments of u·y and of u·ŷ − u·y for the readings of directions, at the tokens counted.
        massive_norm: tokens whose output is larger are not counted (nor is what only begins a sequence); None: unknown.
        tokens: how many have been read.
    """

    transcoder: BilinearTC
    readings: list[Reading]
    writers: dict[str, list[Writer]]
    contexts: Contexts
    spread: Spread
    massive_norm: float | None
    tokens: int = 0
    true: Moments | None = None
    error: Moments | None = None

    @property
    def layer(self) -> int:
        layer = self.transcoder.config.layer_index
        assert layer is not None
        return layer

    @property
    def features(self) -> list[Feature]:
        return [feature for reading in self.readings for feature in reading.features]

    @torch.no_grad()
    def add(self, batch: TokenBatch, x: Tensor, y: Tensor, bos: Tensor) -> None:
        """Adds a batch, with what enters and leaves the true MLP there [sequences, tokens, width]."""
        x, y = x.float(), y.float()
        units, own = self.transcoder.units(x), self.transcoder(x)
        values = torch.cat([reading.values(x, units, own) for reading in self.readings], -1).cpu()
        ids = batch.input_ids.cpu()
        text = torch.ones_like(ids, dtype=torch.bool) if batch.mask is None else batch.mask.cpu()
        counted = text & ~torch.isin(ids, bos)
        if self.massive_norm is not None:
            counted &= (norms(y) <= self.massive_norm).cpu()
        self.contexts.add(ids, values, text, counted)
        self.spread.add(values[counted])
        self.tokens += int(text.sum())
        directions = [reading.direction for reading in self.readings if reading.direction is not None]
        if directions:
            u, rows = torch.stack(directions, 1), counted.to(y.device)
            true, error = (Moments.of(part[rows] @ u).to("cpu") for part in (y, own - y))
            self.true = true if self.true is None else self.true.merge(true)
            self.error = error if self.error is None else self.error.merge(error)

    def fvu(self) -> Iterator[float | None]:
        """Of each reading, the fraction of the true MLP's variance of u·y that is left unexplained; None of a unit."""
        left = []
        if self.true is not None and self.error is not None:
            squares = self.error.deviation + self.error.count * self.error.mean.square()
            left = (squares / self.true.deviation.clamp(min=1e-30)).tolist()
        found = iter(left)
        for reading in self.readings:
            yield None if reading.direction is None else next(found)


@dataclass(frozen=True, eq=False)
class SetReading:
    """What was read of a set's layers, on how much text, and the base's tokens."""

    layers: list[LayerReading]
    vocabulary: Vocabulary


def read_set(run: Run, asked: Sequence[str], held_out: Recipe, device: torch.device) -> SetReading:
    """Reads layers of a set, all in one pass of the base.

    Args:
        run: the set.
        asked: directions, as `Asked.parse` takes them, for each layer.
        held_out: names the layers (default: all of the set), the base, and the text with its `eval_tokens`.
        device: where to compute.

    Raises:
        UserError: something asked for does not exist, or the base or the text cannot be had.
    """
    wanted = [Asked.parse(text) for text in asked]
    layers = held_out.layer_indices() or run.layers
    if missing := [str(layer) for layer in layers if layer not in run.layers]:
        there = ", ".join(map(str, run.layers))
        raise UserError(f"{run.where} has no layer {', '.join(missing)}: name one that it has ({there}) with --layer")
    check_held_out(held_out, run.recipe)
    scores = run.evaluation.layers if run.evaluation is not None else {}
    needed = [layer for layer in run.layers if layer <= max(layers)]
    base = Base.of_recipe(held_out, device, needed)
    transcoders = {layer: run.load(layer).float().to(device) for layer in needed}
    widths = {(tc.config.n_inputs, tc.config.n_outputs) for tc in transcoders.values()}
    if widths != {(base.n_inputs, base.n_outputs)}:
        raise UserError(
            f"{run.where} is of another base: the MLPs of {held_out.base} map width {base.n_inputs} to "
            f"{base.n_outputs}, which its transcoders do not; name theirs with --base"
        )
    vocabulary = Vocabulary(base)
    start = settled_bos(held_out, base.tokenizer)
    bos = torch.tensor([] if start == "none" else [int(token) for token in start.split(",")], dtype=torch.long)
    count = -(-held_out.eval_tokens // (SEQUENCES * held_out.seq_len))
    with open_held_out(held_out, base.tokenizer, device, SEQUENCES, base.vocabulary) as text:
        batches = islice(text, count)
        first = next(batches)
        stds = unit_stds(base, transcoders, first)
        read_layers = {
            layer: begin(layer, wanted, base, vocabulary, transcoders, stds, scores.get(layer), held_out.eval_tokens)
            for layer in layers
        }

        def visit(layer: int, x: Tensor, y: Tensor) -> None:
            if layer in read_layers:
                read_layers[layer].add(batch, x, y, bos)

        for batch in chain([first], batches):
            base.run(batch.input_ids, visit)
    return SetReading([*read_layers.values()], vocabulary)


@torch.no_grad()
def unit_stds(base: Base, transcoders: Mapping[int, BilinearTC], batch: TokenBatch) -> dict[int, Tensor]:
    """How far each layer's units' products move over a batch's tokens [n_hidden]."""
    stds: dict[int, Tensor] = {}
    text = ... if batch.mask is None else batch.mask

    def visit(layer: int, x: Tensor, _: Tensor) -> None:
        stds[layer] = transcoders[layer].units(x[text].float()).flatten(0, -2).std(0)

    base.run(batch.input_ids, visit)
    return stds


def begin(
    layer: int,
    asked: Sequence[Asked],
    base: Base,
    vocabulary: Vocabulary,
    transcoders: Mapping[int, BilinearTC],
    stds: Mapping[int, Tensor],
    scores: LayerScores | None,
    tokens: int,
) -> LayerReading:
    """What the weights say of a layer, before any text has been read."""
    tc = transcoders[layer]
    strength = stds[layer] * (tc.writers() / tc.output_std).norm(dim=1)
    readings = read(tc, asked, base, vocabulary, strength)
    features = sum(len(reading.features) for reading in readings)
    writers = {
        feature.anchor: writers_into(tc, vector, transcoders, stds)
        for reading in readings
        for feature, vector in zip(reading.features[1:], reading.spectrum.eigenvectors.T, strict=False)
    }
    massive_norm = None if scores is None else scores.massive_norm
    return LayerReading(tc, readings, writers, Contexts(features), Spread(features, tokens), massive_norm)


def writers_into(
    tc: BilinearTC, vector: Tensor, transcoders: Mapping[int, BilinearTC], stds: Mapping[int, Tensor]
) -> list[Writer]:
    """The earlier units that move v·x most, through the residual stream and the norm, which divides all alike.

    What goes through attention and other MLPs is not in it.
    """
    reads = vector
    if tc.config.input_norm is not None:
        reads = reads * tc.norm_weight
        reads = reads - reads.mean() if tc.config.input_norm == "layernorm" else reads
    earlier = [layer for layer in transcoders if layer < tc.config.layer_index]
    if not earlier:
        return []
    effects = [(transcoders[layer].writers() @ reads) * stds[layer] for layer in earlier]
    total = torch.cat(effects).square().sum().clamp(min=1e-30)
    each = [
        Writer(layer, unit, 1 if value > 0 else -1, float(value**2 / total))
        for layer, effect in zip(earlier, effects, strict=True)
        for unit in effect.abs().argsort(descending=True, stable=True)[:WRITERS].tolist()
        for value in [effect[unit]]
    ]
    return sorted(each, key=lambda writer: -writer.share)[:WRITERS]
