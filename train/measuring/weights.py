"""What a reader of weights relies on, layer by layer: the derivative, changes of the input, where eigenvectors lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.measuring.interchange import changes_explained, interchanged
from bilinear_tc.train.measuring.jacobian import isotropic_probes, jacobian_scores
from bilinear_tc.train.measuring.low_variance import logit_directions, low_variance_share
from bilinear_tc.train.measuring.sample import Sample, as_map, others
from bilinear_tc.train.processes import is_main, on_all, process_count, process_index


@torch.no_grad()
def weight_scores(
    sample: Sample, transcoders: Sequence[BilinearTC], covariances: Sequence[Tensor], output_stds: Sequence[Tensor]
) -> list[dict[str, Any]]:
    """Each layer's scores by the names of `LayerScores`. Processes share out the layers: the figures are the same to
    the last bit on any number of them.

    Args:
        sample: tokens that have been taken.
        covariances: of each layer's inputs, [n_inputs, n_inputs].
        output_stds: of each layer's outputs, [n_outputs].
    """
    head = sample.base.model.get_output_embeddings()
    mine = range(process_index(), len(transcoders), process_count())
    mlps = [as_map(sample, index) for index in range(len(transcoders))]  # by all processes, since they may sum
    scores: dict[int, dict[str, Any]] = {}
    for index in tqdm(mine, desc="derivatives and interchanges", unit="layer", disable=not is_main()):
        layer, transcoder, std = sample.base.layers[index], transcoders[index], output_stds[index]
        mlp, x = mlps[index], sample.inputs[index]
        maps = (mlp, lambda x, transcoder=transcoder: transcoder(x.float()).float())
        probes = isotropic_probes(x.float(), covariances[index].diagonal().sqrt())
        differences = (x.float(), others(x).float() - x.float())
        cosine, error = jacobian_scores(*maps, *probes, std)
        cosine_data, error_data = jacobian_scores(*maps, *differences, std)
        halfway = {"": (x + others(x)) / 2}
        fits = head is not None and head.in_features == transcoder.config.n_outputs
        scores[index] = {
            "jacobian_cosine": cosine,
            "jacobian_error": error,
            "jacobian_cosine_data": cosine_data,
            "jacobian_error_data": error_data,
            "halfway": changes_explained(*maps, x, halfway, std)[""],
            "interchange": changes_explained(*maps, x, interchanged(sample, layer), std),
            "low_variance_share": low_variance_share(transcoder, covariances[index], logit_directions(head))
            if fits
            else None,
        }
    every = {index: found for share in on_all(lambda: scores) for index, found in share.items()}
    return [every[index] for index in range(len(transcoders))]
