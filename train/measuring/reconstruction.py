"""How near transcoders come to their MLPs' outputs: squared errors over held-out text, and the FVU that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.activations import Activations
from bilinear_tc.train.measuring.ordinary import Ordinary
from bilinear_tc.train.measuring.standard_error import influence, standard_error
from bilinear_tc.train.moments import Covariances, Moments, fvu, fvu_raw
from bilinear_tc.train.processes import gather_over_processes, sum_over_processes
from bilinear_tc.train.text.batches import TokenBatch


class Reconstruction:
    """Squared errors per feature, float64 over the whole sample: of the transcoders and of the affine maps.

    Args:
        transcoders: the layers' models.
        affine: their best affine maps: weights [layers, n_outputs, n_inputs] and biases [layers, n_outputs].
        device: where the sums are kept.

    Attributes:
        ordinary: the same on ordinary rows alone; there from the first batch on.
        inputs: covariances of the ordinary rows' inputs.
    """

    ordinary: Ordinary

    def __init__(self, transcoders: Sequence[BilinearTC], affine: tuple[Tensor, Tensor], device: torch.device) -> None:
        self.transcoders, self.affine = transcoders, affine
        shape = (len(transcoders), transcoders[0].config.n_outputs)
        self.transcoder_errors, self.affine_errors = torch.zeros(2, *shape, dtype=torch.float64, device=device)
        self.outputs = Moments.zeros(*shape, device=device)
        self.inputs = Covariances(torch.stack([t.input_mean for t in transcoders]).to(device))
        self._first: tuple[Tensor, Tensor] | None = None  # mean and std of the first batch
        self._by_sequence: list[Tensor] = []  # sums of `against_spread` [sequences, layers, all and ordinary, 2]

    @torch.no_grad()
    def add(self, activations: Activations, batch: TokenBatch) -> None:
        """Adds this process's rows of a batch."""
        moments = activations.moments()[1].over_processes()
        self.outputs = self.outputs.merge(moments)
        if self._first is None:
            self._first, self.ordinary = (moments.mean.float(), moments.std.float()), Ordinary(activations.y)
        mask = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask
        sequences, positions = mask.to(activations.y.device).nonzero(as_tuple=True)
        by_sequence = self.inputs.sums.new_zeros(len(batch), len(self.transcoders), 2, 2)
        for layer, transcoder in enumerate(self.transcoders):
            x, y = activations.x[layer].float(), activations.y[layer].float()
            affine = nn.functional.linear(x, self.affine[0][layer], self.affine[1][layer])
            errors = (y - transcoder(x).float()).square()
            self.transcoder_errors[layer] += errors.sum(0, dtype=torch.float64)
            self.affine_errors[layer] += (y - affine).square().sum(0, dtype=torch.float64)
            kept = self.ordinary.add(layer, y, errors, positions)
            self.inputs.add(layer, x[kept])
            first = self.ordinary.first[layer]
            of_all = against_spread(errors, y, self._first[0][layer], self._first[1][layer])
            of_ordinary = against_spread(errors, y, first.mean.float(), first.std.float()) * kept[:, None]
            by_sequence[:, layer].index_add_(0, sequences, torch.stack([of_all, of_ordinary], 1).double())
        self._by_sequence.append(by_sequence)

    @property
    def tokens(self) -> int:
        """Rows of all processes so far."""
        return int(self.outputs.count.max())

    def scores(self) -> tuple[list[dict[str, Any]], Tensor]:
        """Each layer's scores by the names of `LayerScores`, and each sequence's influence on its FVU and its FVU on
        ordinary rows [layers, sequences, 2].

        To be called once: the inputs' sums and the ordinary outputs' moments become those of all processes.
        """
        self.inputs.sum_over_processes()
        errors, affine_errors = sum_over_processes(self.transcoder_errors), sum_over_processes(self.affine_errors)
        unexplained = fvu(errors, self.outputs)
        by_sequence = gather_over_processes(torch.cat(self._by_sequence))
        influences = influence(*by_sequence.unbind(-1))  # [sequences, layers, all and ordinary]
        columns = {
            "fvu": unexplained,
            "fvu_raw": fvu_raw(errors, self.outputs),
            "variance_explained": 1 - unexplained,
            "mse": errors.mean(-1) / self.tokens,
            "fvu_linear": fvu(affine_errors, self.outputs),
            **dict(zip(("fvu_se", "fvu_ordinary_se"), standard_error(influences).unbind(-1), strict=True)),
        }
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        scores = [
            {**dict(zip(columns, row, strict=True)), **ordinary, "worst_channel": worst_channel(of_layer)}
            for row, ordinary, of_layer in zip(rows, self.ordinary.scores(), errors, strict=True)
        ]
        return scores, influences.transpose(0, 1)


def against_spread(errors: Tensor, y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Each row's error and its distance from the mean, squared, in z units: [rows, 2]. Their sums' ratio is the FVU,
    but for the first batch's statistics in place of the whole sample's: near enough for its standard error."""
    return torch.stack([(errors / std.square()).mean(1), ((y - mean) / std).square().mean(1)], 1)


def worst_channel(errors: Tensor) -> dict[str, float] | None:
    """The output channel that carries more than half of the squared errors [n_outputs], if one does."""
    share, index = (errors / errors.sum()).max(0)
    return {"index": index.item(), "share": share.item()} if share > 0.5 else None
