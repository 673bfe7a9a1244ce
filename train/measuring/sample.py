"""The tokens on which transcoders are compared with their MLPs beyond what these say, and what flows in the base there.

All processes hold the same tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bilinear_tc.train.base import Base
from bilinear_tc.train.fitting.mlp_weights import READ_ROWS, MLPWeights, is_packed
from bilinear_tc.train.massive import massive
from bilinear_tc.train.processes import gather_over_processes
from bilinear_tc.train.shard import Shard
from bilinear_tc.train.text.batches import TokenBatch

READ = 4096  # tokens at the start of the held-out text are read, in whole batches' sequences …
ONE_IN = 4  # … of which every fourth that is ordinary in every layer is taken, at random
AT_ONCE = 1024  # tokens that the base runs on at once


class Sample:
    """Tokens of the first held-out sequences that are ordinary in every layer.

    Attributes:
        inputs, outputs: each layer's MLP inputs [layers, tokens, n_inputs] and outputs [.., n_outputs].
        flow: what flows at these tokens [tokens, width], as `watched` names it.
        norms: by block, the module that makes its MLP's input from the residual stream.
    """

    inputs: Tensor
    outputs: Tensor
    flow: dict[str, Tensor]
    norms: dict[int, nn.Module]

    def __init__(self, base: Base) -> None:
        self.base = base
        self._text: list[tuple[Tensor, Tensor]] = []  # token ids and masks [sequences, tokens]

    def add(self, batch: TokenBatch) -> None:
        """Keeps a batch's sequences, of all processes, which must add together; nothing if there are enough."""
        if sum(int(mask.sum()) for _, mask in self._text) < READ:
            mask = torch.ones_like(batch.input_ids) if batch.mask is None else batch.mask.long()
            self._text.append((gather_over_processes(batch.input_ids), gather_over_processes(mask)))

    @torch.no_grad()
    def take(self, median: Tensor) -> None:
        """Runs the base over the sequences kept, and takes the tokens that median norms [layers] tell are ordinary."""
        generator = torch.Generator().manual_seed(0)
        ids, masks = (torch.cat(part) for part in zip(*self._text, strict=True))
        enough = int((masks.sum(1).cumsum(0) < READ).sum()) + 1
        count = max(1, AT_ONCE // ids.shape[1])
        inputs, outputs, flows = [], [], []
        for part, mask in zip(ids[:enough].split(count), masks[:enough].split(count), strict=True):
            with watched(self.base) as (flow, self.norms):
                captured = self.base.activations(part.to(self.base.device))
            x, y = (torch.stack(list(side)).flatten(1, 2) for side in zip(*captured.values(), strict=True))
            ordinary = (~massive(y, median)).all(0) & mask.to(y.device).flatten().bool()
            rows = ordinary.nonzero().squeeze(1)
            order = torch.randperm(len(rows), generator=generator)[: -(-len(rows) // ONE_IN)]
            chosen = rows[order.to(rows.device)]
            inputs.append(x[:, chosen])
            outputs.append(y[:, chosen])
            flows.append({name: values.flatten(0, 1)[chosen] for name, values in flow.items() if values.ndim == 3})
        self.inputs, self.outputs = torch.cat(inputs, 1), torch.cat(outputs, 1)
        self.flow = {name: torch.cat([flow[name] for flow in flows]) for name in flows[0]}

    def of(self, shard: Shard) -> Sample:
        """The sample as that of this process's layers alone."""
        own = copy.copy(self)
        own.base, rows = shard.of(self.base), slice(shard.own.start, shard.own.stop)
        own.inputs, own.outputs = self.inputs[rows], self.outputs[rows]
        return own


def others(tokens: Tensor) -> Tensor:
    """For each of a sample's tokens [tokens, ...] another one, from elsewhere in the sample."""
    return tokens.roll(-(-len(tokens) // 2), 0)


@contextmanager
def watched(base: Base) -> Iterator[tuple[dict[str, Tensor], dict[int, nn.Module]]]:
    """While the context lasts, a pass of the base leaves what it has computed [sequences, tokens, width].

    Yields:
        By block k `into k`, its input; `mlp k`, what its MLP says; `before k`, what becomes the MLP's input by one
        module, a norm; and these norms. A block without such a module has neither.
    """
    flow: dict[str, Tensor] = {}
    norms: dict[int, nn.Module] = {}
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []  # in this block

    def enter(k: int) -> Callable[..., None]:
        def hook(_block: nn.Module, args: Any, kwargs: Any) -> None:
            calls.clear()
            flow[f"into {k}"] = first_tensor(args, kwargs).clone()

        return hook

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if value is not None]
        if isinstance(output, Tensor) and len(given) == 1 and isinstance(given[0], Tensor):  # as a norm is called
            calls.append((module, first_tensor(args, kwargs), output))

    def before_mlp(k: int) -> Callable[..., None]:
        def hook(_mlp: nn.Module, args: Any, kwargs: Any) -> None:
            x = first_tensor(args, kwargs)
            for module, came, left in calls:
                if (left.data_ptr(), left.numel()) == (x.data_ptr(), x.numel()) and came.data_ptr() != x.data_ptr():
                    flow[f"before {k}"], norms[k] = came.clone(), module

        return hook

    def after_mlp(k: int) -> Callable[..., None]:
        def hook(_mlp: nn.Module, _inputs: Any, output: Tensor) -> None:
            flow[f"mlp {k}"] = output.clone()

        return hook

    handles = []
    for k, block in enumerate(base.blocks.children()):
        handles.append(block.register_forward_pre_hook(enter(k), with_kwargs=True))
        if not base.holds_mlp(k):
            continue
        site = base.site(k)
        inside = {block, *site.enter.modules(), *site.leave.modules()}
        handles += [
            site.enter.register_forward_pre_hook(before_mlp(k), with_kwargs=True),
            site.leave.register_forward_hook(after_mlp(k)),
            *(part.register_forward_hook(note, with_kwargs=True) for part in block.modules() if part not in inside),
        ]
    try:
        yield flow, norms
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(args: Any, kwargs: Any) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def as_map(sample: Sample, index: int) -> Callable[[Tensor], Tensor]:
    """A layer's MLP as the map of rows [rows, n_inputs] to rows [rows, n_outputs], float32, whatever type it computes
    in. UserError if it is no module, or rounds its inputs to 8 bits, which has no derivative, and its weights cannot be
    read.

    Args:
        sample: tokens that have been taken.
        index: counts the base's layers asked for.
    """
    layer = sample.base.layers[index]
    site = sample.base.site(layer)
    if site.enter is site.leave and not any(map(is_packed, sample.base.parts(layer))):
        return lambda x: site.enter(x.to(sample.base.model.dtype)[None])[0].float()
    x, y = (of[index, :READ_ROWS] for of in (sample.inputs, sample.outputs))
    return MLPWeights.read(sample.base, layer, x, y)
