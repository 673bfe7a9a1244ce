"""How near transcoders come to their MLPs' outputs: squared errors over held-out text, and the FVU that they make."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.activations import Activations
from bilinear_tc.train.moments import Moments, fvu, fvu_raw
from bilinear_tc.train.processes import sum_over_processes


class Reconstruction:
    """Squared errors per feature, float64 over the whole sample: of the transcoders and of the affine maps.

    Args:
        transcoders: the layers' models.
        affine: their best affine maps: weights [layers, n_outputs, n_inputs] and biases [layers, n_outputs].
        device: where the sums are kept.
    """

    def __init__(self, transcoders: Sequence[BilinearTC], affine: tuple[Tensor, Tensor], device: torch.device) -> None:
        self.transcoders, self.affine = transcoders, affine
        shape = (len(transcoders), transcoders[0].config.n_outputs)
        self.transcoder_errors, self.affine_errors = torch.zeros(2, *shape, dtype=torch.float64, device=device)
        self.outputs = Moments.zeros(*shape, device=device)

    @torch.no_grad()
    def add(self, activations: Activations) -> None:
        self.outputs = self.outputs.merge(activations.moments()[1].over_processes())
        for layer, transcoder in enumerate(self.transcoders):
            x, y = activations.x[layer].float(), activations.y[layer].float()
            affine = nn.functional.linear(x, self.affine[0][layer], self.affine[1][layer])
            self.transcoder_errors[layer] += (y - transcoder(x).float()).square().sum(0, dtype=torch.float64)
            self.affine_errors[layer] += (y - affine).square().sum(0, dtype=torch.float64)

    def scores(self) -> list[dict[str, float]]:
        """Each layer's scores by the names of `LayerScores`."""
        errors, affine_errors = sum_over_processes(self.transcoder_errors), sum_over_processes(self.affine_errors)
        unexplained = fvu(errors, self.outputs)
        columns = {
            "fvu": unexplained,
            "fvu_raw": fvu_raw(errors, self.outputs),
            "variance_explained": 1 - unexplained,
            "mse": errors.mean(-1) / self.outputs.count,
            "fvu_linear": fvu(affine_errors, self.outputs),
        }
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]
