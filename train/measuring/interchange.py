"""How well a transcoder predicts what becomes of its MLP's output when a part of the input comes from another token."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bilinear_tc.train.measuring.sample import Sample, others

Map = Callable[[Tensor], Tensor]


def changes_explained(
    mlp: Map, transcoder: Map, x: Tensor, moved: Mapping[str, Tensor], output_std: Tensor
) -> dict[str, float]:
    """R² of the predicted change, 1 − Σ‖Δ − Δ̂‖² / Σ‖Δ‖² in units of the outputs' std, of each way to move inputs x.

    0 is what a map that predicts no change gets.
    """
    start = mlp(x), transcoder(x)
    explained = {}
    for name, there in moved.items():
        true, predicted = ((f(there) - y).double() / output_std for f, y in zip((mlp, transcoder), start, strict=True))
        explained[name] = (1 - (true - predicted).square().sum() / true.square().sum()).item()
    return explained


def interchanged(sample: Sample, layer: int) -> dict[str, Tensor]:
    """A layer's MLP inputs [tokens, n_inputs] with one component of the residual stream taken from another token.

    Components are differences of the stream, so that they add up to what the layer's norm sees: the embedding (the
    first block's input) and what each earlier attention and MLP adds, this block's attention included where the MLP
    sees it. Empty if no norm is found, or if it does not give the MLP's input back.
    """
    norm, x = sample.norms.get(layer), sample.inputs[sample.base.layers.index(layer)]
    names = [f"{place} {k}" for k in range(layer + 1) for place in ("into", "before")]
    if norm is None or any(name not in sample.flow for name in names):
        return {}
    stream = {name: sample.flow[name].float() for name in names}
    before, dtype = stream[f"before {layer}"], x.dtype
    if any(part.shape != before.shape for part in stream.values()):
        return {}
    if not torch.allclose(norm(before.to(dtype)[None])[0], x, rtol=1e-2, atol=1e-3):
        return {}
    parts = {"embedding": stream["into 0"]}
    for k in range(layer):
        into, after = stream[f"into {k}"], stream[f"into {k + 1}"]
        # in a parallel block the MLP sees what the attention sees
        parallel = torch.equal(into, stream[f"before {k}"])
        mlp = sample.flow[f"mlp {k}"].float() if parallel else after - stream[f"before {k}"]
        parts |= {f"attention {k}": after - into - mlp, f"mlp {k}": mlp}
    own = before - stream[f"into {layer}"]
    if own.any():
        parts[f"attention {layer}"] = own
    return {name: norm((before - c + others(c)).to(dtype)[None])[0] for name, c in parts.items()}
