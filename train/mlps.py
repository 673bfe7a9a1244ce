"""Where a model's MLPs are, each between two modules: the one that its input enters and the one that its output leaves.

Names tell where to look, and a short forward pass tells what is there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bilinear_tc.modeling_bilinear_tc import site_names, tensors_in
from bilinear_tc.train.errors import UserError, one_line

MLP_NAMES = re.compile(r"(mlp|ffn|feed_forward|feedforward|ff)", re.IGNORECASE)
MLP_CLASSES = re.compile(r".*(mlp|ffn|feed_?forward)", re.IGNORECASE)
PAIRS = [("fc1", "fc2"), ("intermediate.dense", "output.dense")]  # MLPs that are no module: OPT's and BART's, BERT's
SHORT = (2, 3)  # sequences and tokens of the short pass

Ends = tuple[str, str]  # the full names of the two modules; mostly the same


class Call(NamedTuple):
    """A module that ran: the tensors that it was given, and what it returned."""

    module: nn.Module
    tensors: list[Tensor]
    output: Any


def entry_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its token ids: where Accelerate has its embedding run, or where this is."""
    embedding: Any = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or embedding.weight.device)


@torch.no_grad()
def short_pass(model: PreTrainedModel) -> list[Call]:
    """Every call of a module in a forward pass over a few tokens, in the order in which they ended. The sequences
    differ at their last token alone.

    UserError if the model does not run on tokens alone.
    """
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        kept = output.clone() if isinstance(output, Tensor) else output  # some decoders (Falcon) add to it in place
        calls.append(Call(module, tensors_in(args, kwargs), kept))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in model.base_model.modules()]
    input_ids = torch.arange(math.prod(SHORT), device=entry_device(model)).view(SHORT)
    input_ids[:, :-1] = input_ids[0, :-1].clone()
    try:
        model.base_model(input_ids=input_ids % model.config.get_text_config().vocab_size, use_cache=False)
    except Exception as error:  # whatever a model's own code raises
        raise UserError(
            f"{type(model).__name__} does not run: expected a decoder that takes token ids alone, got: "
            f"{one_line(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def find_mlps(model: nn.Module) -> dict[str, dict[int, Ends]]:
    """The MLP of each layer that holds one, in each list of layers in a model; UserError if there is none."""
    found = {
        name: {layer: ends for layer, block in enumerate(blocks) if (ends := mlp_in(f"{name}.{layer}", block))}
        for name, blocks in model.named_modules()
        if isinstance(blocks, nn.ModuleList)
    }
    if not any(found.values()):
        raise UserError(
            f"no MLPs found in {type(model).__name__}: expected a ModuleList of layers that each have a child module "
            "named mlp, ffn or feed_forward, or maps named fc1 and fc2; say where they are with --mlp_path"
        )
    return {name: mlps for name, mlps in found.items() if mlps}


def mlp_in(name: str, block: nn.Module) -> Ends | None:
    """A layer's MLP: a child that is called so, else a pair of maps, else a child whose class is called so."""
    inside = dict(block.named_modules())
    named = [(child, child) for child, _ in block.named_children() if MLP_NAMES.fullmatch(child)]
    pairs = [pair for pair in PAIRS if inside.keys() >= {*pair}]
    classes = [(child, child) for child, m in block.named_children() if MLP_CLASSES.fullmatch(type(m).__name__)]
    return next(((f"{name}.{enter}", f"{name}.{leave}") for enter, leave in [*named, *pairs, *classes]), None)


def named_mlps(model: nn.Module, mlp_path: str) -> dict[str, dict[int, Ends]]:
    """As `find_mlps`, where a path such as `model.layers.{}.mlp` says; UserError if no layer has a module there."""
    modules = dict(model.named_modules())
    blocks, *rest = mlp_path.split(".{}")
    layers = range(sum(1 for _ in modules[blocks].children()) if rest and blocks in modules else 0)
    mlps = {layer: ends for layer in layers if (ends := site_names(modules, mlp_path.replace("{}", str(layer))))}
    if not mlps:
        raise UserError(
            f"mlp_path {mlp_path!r} names no modules of {type(model).__name__}: expected a path with {{}} for the "
            "layer, such as model.layers.{}.mlp, or two with a colon between, such as model.layers.{}.fc1:fc2"
        )
    return {blocks: mlps}


def path_of(ends: Ends) -> str:
    """The ends as one path, as `Site` reads it: `model.layers.3.mlp`, or `model.layers.3.fc1:fc2`."""
    enter, leave = ends
    parents = enter.split(".")
    while parents and not leave.startswith(".".join([*parents, ""])):
        parents.pop()
    return enter if enter == leave else f"{enter}:{leave.removeprefix('.'.join([*parents, '']))}"


def without_residual(model: nn.Module, ends: Ends, calls: Sequence[Call]) -> Ends:
    """The ends of what an MLP says alone: the first and the last map of one that adds it to a tensor that it is given,
    such as the residual stream (BLOOM, MPT)."""
    names = {module: name for name, module in model.get_submodule(ends[0]).named_modules(prefix=ends[0])}
    maps = [call for call in calls if call.module in names and is_linear(call.module)]
    for whole in (call for call in calls if ends[0] == ends[1] and names.get(call.module) == ends[0]):
        for last in maps:
            sums = (is_sum([tensor, last.output], whole.output) for tensor in whole.tensors)
            if not is_sum([last.output], whole.output) and any(sums):
                return names[maps[0].module], names[last.module]
    return ends


def is_sum(terms: Sequence[Tensor], output: Any) -> bool:
    """Whether an output is the sum of tensors of its own shape, up to rounding."""
    alike = isinstance(output, Tensor) and all(
        (term.shape, term.device) == (output.shape, output.device) for term in terms
    )
    return alike and torch.allclose(torch.stack([*terms]).sum(0), output, rtol=1e-2, atol=1e-4)


def parts_between(model: nn.Module, ends: Ends, calls: Sequence[Call]) -> list[str]:
    """Names of the modules without children that run in an MLP, in their order; none if it does not run."""
    enter, leave = map(model.get_submodule, ends)
    ran = [call.module for call in calls]
    if enter not in ran or leave not in ran:
        return []
    start, inside = ran.index(enter), {*enter.modules()}
    while start and ran[start - 1] in inside:
        start -= 1
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module in ran[start : ran.index(leave) + 1] if not any(module.children())]


def entered_from(model: nn.Module, ends: Ends, calls: Sequence[Call]) -> list[nn.Module]:
    """The modules without children whose output was an MLP's input, the last that ran first."""
    tensors = next((call.tensors for call in calls if call.module is model.get_submodule(ends[0])), [])
    same = (
        c.module
        for c in reversed(calls)
        if isinstance(c.output, Tensor)
        and len(tensors) == 1
        and (c.output.shape, c.output.device) == (tensors[0].shape, tensors[0].device)
        and torch.equal(c.output, tensors[0])
    )
    return [module for module in same if not any(module.children())]


def map_of(model: nn.Module, ends: Ends, calls: Sequence[Call]) -> tuple[int, int]:
    """Width of an MLP's input and of its output, UserError if it is no map of one tensor to one, is not run once, or
    depends on later tokens, so that padding would change it, and the base knows the next token."""
    enter, leave = map(model.get_submodule, ends)
    entered, left = ([call for call in calls if call.module is end] for end in (enter, leave))
    if not entered or not left:
        raise UserError(
            f"the forward pass never came to {path_of(ends)}: expected a decoder that runs each of its layers on text; "
            "leave this layer out with --layers"
        )
    tensors, output = entered[0].tensors, left[0].output
    one_to_one = len(tensors) == 1 and isinstance(output, Tensor) and tensors[0].shape[:-1] == output.shape[:-1]
    if not one_to_one or output.shape[:-1] not in (SHORT, (math.prod(SHORT),)) or len(entered) > 1:
        came = f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        times = f", {len(entered)} times" if len(entered) > 1 else ""
        raise UserError(
            f"{path_of(ends)} ({type(leave).__name__}) cannot be fitted: expected a map of one tensor [sequences, "
            f"tokens, width] to one, run once a pass, got {len(tensors)} tensors in and {came} out{times}, from "
            f"{SHORT[0]} sequences of {SHORT[1]}; choose other layers with --layers, or another module with --mlp_path"
        )
    first, *others = tensors[0].reshape(*SHORT, -1)[:, :-1].float()
    if not first.is_meta and any((other - first).norm() > 1e-2 * first.norm() for other in others):
        raise UserError(
            f"{path_of(ends)} is told of later tokens: expected a causal decoder, which reads text from left to right; "
            "of encoders such as BERT, those that say is_decoder in their config.json are"
        )
    return tensors[0].shape[-1], output.shape[-1]


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def linear_maps(parts: Sequence[nn.Module]) -> list[nn.Linear | Conv1D]:
    return [part for part in parts if isinstance(part, (nn.Linear, Conv1D))]


def map_widths(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Width of a linear map's input and of its output; GPT-2's keeps its weight transposed."""
    if isinstance(module, nn.Linear):  # whose weight is packed if it is quantized
        return module.in_features, module.out_features
    rows, columns = module.weight.shape
    return rows, columns
