"""The base: any frozen Hugging Face decoder, where its MLPs are, and what flows in and out of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from bilinear_tc.modeling_bilinear_tc import Site, site_names, tensors_in
from bilinear_tc.train.errors import UserError, one_line
from bilinear_tc.train.recipe import Recipe

REPOSITORY_ROOT = Path(__file__).resolve().parent.parent
# transformers 4.56 renamed the argument, and 5 warns of the old name
DTYPE_ARGUMENT = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
MLP_NAMES = re.compile(r"(mlp|ffn|feed_forward|feedforward|ff)", re.IGNORECASE)
MLP_CLASSES = re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE)
PAIRS = [("fc1", "fc2"), ("intermediate.dense", "output.dense")]  # MLPs that are no module: OPT's and BART's, BERT's


def base_location(name: str) -> str:
    """Where `from_pretrained` finds the base: a folder as given, one that ships with this package, or a Hub id."""
    if Path(name).is_dir():
        return name
    shipped = REPOSITORY_ROOT / name
    return str(shipped) if shipped.is_dir() else name


@contextmanager
def one_sentence(name: str) -> Iterator[None]:
    """Turns what `from_pretrained` raises for a base that is missing or damaged into a UserError of one sentence."""
    try:
        yield
    except Exception as error:  # whatever a damaged file or a missing package makes transformers raise
        raise UserError(
            f"the base {name!r} cannot be loaded: expected a Hugging Face model (config, weights, tokenizer) in a "
            f"local folder or on the Hub, got: {one_line(error)}"
        ) from error


def cached_commit(location: str, revision: str | None) -> str | None:
    """The commit at which a model lies in the Hub's cache, None for a folder; transformers itself no longer tells."""
    if Path(location).is_dir():
        return None
    config = try_to_load_from_cache(location, "config.json", revision=revision)  # …/snapshots/COMMIT/config.json
    return Path(config).parent.name if isinstance(config, str) else None


class Call(NamedTuple):
    """A module that ran: the tensors that it was given, and what it returned."""

    module: nn.Module
    tensors: list[Tensor]
    output: Any


class Base:
    """A frozen decoder in evaluation mode, and the MLPs of the layers that were asked for.

    Attributes:
        model: the causal language model, LM head included.
        tokenizer: its tokenizer.
        layers: the layer indices asked for, ascending.
        n_inputs, n_outputs: width of the MLPs' inputs and outputs.
        widest_map: the widest side of any of their linear maps.
        commit: the commit of the Hub repository that `load` took it from; None if it was a folder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layers: Sequence[int] | None = None,
        mlp_path: str | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.commit: str | None = None
        self.tokenizer = tokenizer
        found = find_mlps(model) if mlp_path is None else named_mlps(model, mlp_path)
        calls = self._look()
        ran = {call.module for call in calls}
        runs = {name: sum(model.get_submodule(enter) in ran for enter, _ in found[name].values()) for name in found}
        self._blocks_name = max(found, key=lambda name: runs[name])  # a vision tower never runs on text
        self._ends = {layer: self._own_ends(ends, calls) for layer, ends in found[self._blocks_name].items()}
        self.num_layers = sum(1 for _ in model.get_submodule(self._blocks_name).children())
        self.layers = check_layers(layers, self.num_layers, self._ends)
        self.n_inputs, self.n_outputs = self._check_mlps(calls)
        self._parts = {layer: self._parts_of(layer, calls) for layer in self._ends}
        widths = (width for module in linear_maps(self.parts(self.layers[0])) for width in map_widths(module))
        self.widest_map = max([self.n_inputs, self.n_outputs, *widths])

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        layers: Sequence[int] | None = None,
        seq_len: int | None = None,
        mlp_path: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Base:
        """Loads a base by Hub id or folder.

        UserError if the folder or repository holds no model, a layer does not exist, or the sequences are longer than
        its positions.

        Args:
            name, revision: where it is.
            layers: the layers to look into; default: all.
            seq_len: tokens of the longest sequence that it will be given, if that is to be checked.
            mlp_path: where its MLPs are, as in the recipe; default: looked for.
            device, dtype: where its weights go, and as what.
        """
        location = base_location(name)
        if Path(location, "adapter_config.json").is_file():
            raise UserError(
                f"the base {name!r} is a PEFT adapter: expected a whole model; merge it first (merge_and_unload) and "
                "save that"
            )
        with one_sentence(name):
            config = AutoConfig.from_pretrained(location, revision=revision)
        text_config = config.get_text_config()  # checked before gigabytes are read
        check_layers(layers, getattr(text_config, "decoder_layers", text_config.num_hidden_layers))
        positions = getattr(text_config, "max_position_embeddings", None)
        if seq_len is not None and positions is not None and seq_len > positions:
            raise UserError(
                f"the base takes sequences of up to {positions} tokens, but seq_len is {seq_len}; lower it with "
                "--seq_len"
            )
        with one_sentence(name):
            model = AutoModelForCausalLM.from_pretrained(location, revision=revision, **{DTYPE_ARGUMENT: dtype})
            tokenizer = AutoTokenizer.from_pretrained(location, revision=revision)
        base = cls(model.to(device), tokenizer, layers, mlp_path)  # type: ignore[arg-type] # transformers hides the types of `to`
        base.commit = cached_commit(location, revision)
        return base

    @classmethod
    def of_recipe(cls, recipe: Recipe, device: torch.device, layers: Sequence[int] | None = None) -> Base:
        """The base that a recipe names, in the type that it computes in; `layers` default to the recipe's."""
        return cls.load(
            recipe.base,
            revision=recipe.base_revision,
            layers=layers or recipe.layer_indices(),
            seq_len=recipe.seq_len,
            mlp_path=recipe.mlp_path,
            device=device,
            dtype=recipe.compute_dtype(device),
        )

    def mlp_path(self, layer: int) -> str:
        """The MLP's path from the causal language model, as `Site` reads it: `gpt_neox.layers.3.mlp`, or a pair."""
        enter, leave = self._ends[layer]
        parents = enter.split(".")
        while not leave.startswith(".".join([*parents, ""])) and parents:
            parents.pop()  # to what the two have in common
        return enter if enter == leave else f"{enter}:{leave.removeprefix('.'.join([*parents, '']))}"

    def site(self, layer: int) -> Site:
        return Site(*map(self.model.get_submodule, self._ends[layer]))

    def mlp(self, layer: int) -> nn.Module:
        """The MLP's module; of an MLP that is no module, the one that its output leaves."""
        return self.site(layer).leave

    def parts(self, layer: int) -> list[nn.Module]:
        """The MLP's modules without children, in the order in which they run."""
        return [self.model.get_submodule(name) for name in self._parts[layer]]

    def stop_after_last_layer(self) -> None:
        """Drops what no asked-for MLP depends on: the blocks after the last layer asked for.

        The language model as such is spent afterwards: only `activations` may be called.
        """
        parent_name, _, name = self._blocks_name.rpartition(".")
        blocks = self.model.get_submodule(self._blocks_name)
        setattr(self.model.get_submodule(parent_name), name, blocks[: self.layers[-1] + 1])

    def compile(self) -> None:
        """Compiles the parts of each layer (attention, MLP, norms of no single kernel): their elementwise work fuses.

        One compilation of a part serves all layers. The decoder around them stays as it is: traced as a whole it would
        take minutes, spell out the causal mask (which costs the fast attention kernels), and hold on to the hooks.
        """
        ends = {end for layer in self.layers for end in self.site(layer)}
        for block in self.model.get_submodule(self._blocks_name).children():
            for part in block.children():
                if not type(part).__module__.startswith("torch.") and ends.isdisjoint({*part.modules()} - {part}):
                    part.forward = torch.compile(part.forward, dynamic=False)

    def activations(self, input_ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """MLP input [sequences, tokens, n_inputs] and output [.., n_outputs] of each layer asked for, as by `run`."""
        captured: dict[int, tuple[Tensor, Tensor]] = {}
        # copies, since some decoders (Falcon) add to an MLP's output in place
        self.run(input_ids, lambda layer, x, y: captured.update({layer: (x.clone(), y.clone())}))
        return captured

    @torch.no_grad()
    def run(self, input_ids: Tensor, visit: Callable[[int, Tensor, Tensor], None]) -> None:
        """One forward pass without the LM head, which tells what flows through the MLPs of the layers asked for.

        Padding on the right needs no attention mask: causal attention lets no earlier position see it.

        Args:
            input_ids: [sequences, tokens] token ids on the base's device.
            visit: called with layer, MLP input [sequences, tokens, n_inputs] and output [.., n_outputs] as soon as the
                MLP has run, so that the activations of two layers need not exist at once.
        """
        seen = set()

        def visiting(layer: int) -> Callable[[list[Tensor], Callable[[], Tensor]], Tensor]:
            def visited(entered: list[Tensor], true: Callable[[], Tensor]) -> Tensor:
                seen.add(layer)
                y = true()
                visit(layer, *(t.reshape(*input_ids.shape, -1) for t in (entered[0], y)))  # OPT flattens it
                return y

            return visited

        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(self.site(layer).replaced(visiting(layer)))
            self.model.base_model(input_ids=input_ids, use_cache=False)
        self._check_all_seen(seen)

    def _check_all_seen(self, seen: Collection[int]) -> None:
        for layer in self.layers:
            if layer not in seen:
                raise UserError(
                    f"the forward pass never came to {self.mlp_path(layer)}: expected a decoder that runs each of its "
                    f"{self.num_layers} layers on text; leave this layer out with --layers"
                )

    @torch.no_grad()
    def _look(self) -> list[Call]:
        """Every call of a module in a forward pass over four tokens, in the order in which they ended."""
        calls: list[Call] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            kept = output.clone() if isinstance(output, Tensor) else output  # some decoders (Falcon) add to it in place
            calls.append(Call(module, tensors_in(args, kwargs), kept))

        handles = [module.register_forward_hook(note, with_kwargs=True) for module in self.model.base_model.modules()]
        input_ids = torch.arange(4, device=self.model.device) % self.model.config.get_text_config().vocab_size
        try:
            self.model.base_model(input_ids=input_ids[None], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def _own_ends(self, ends: tuple[str, str], calls: list[Call]) -> tuple[str, str]:
        """The ends of what an MLP says alone: its first and last map if it adds a tensor that it is given to that, such
        as the residual stream (BLOOM, MPT)."""
        mlp = self.model.get_submodule(ends[0])
        names = {module: name for name, module in mlp.named_modules(prefix=ends[0])}
        maps = [call for call in calls if call.module in names and is_linear(call.module)]
        for whole in (call for call in calls if call.module is mlp and ends[0] == ends[1]):
            for last in maps:
                if not is_sum([last.output], whole.output) and any(
                    is_sum([tensor, last.output], whole.output) for tensor in whole.tensors
                ):
                    return names[maps[0].module], names[last.module]
        return ends

    def _parts_of(self, layer: int, calls: list[Call]) -> list[str]:
        """Names of the modules without children that run between an MLP's ends."""
        first, last = ({*end.modules()} for end in self.site(layer))
        leaves = [call.module for call in calls if not any(call.module.children())]
        starts = [index for index, module in enumerate(leaves) if module in first]
        stops = [index for index, module in enumerate(leaves) if module in last]
        names = {module: name for name, module in self.model.named_modules()}
        return [names[module] for module in leaves[starts[0] : stops[-1] + 1]] if starts and stops else []

    def _check_mlps(self, calls: list[Call]) -> tuple[int, int]:
        """Width of the MLPs' inputs and outputs.

        Raises:
            UserError: if a layer's MLP is not run exactly once a pass, is anything but a map of one tensor to one, or
                maps other widths than the first.
        """
        self._check_all_seen(
            {layer for layer in self.layers for call in calls if call.module is self.site(layer).leave}
        )
        widths = {layer: self._widths(layer, calls) for layer in self.layers}
        first = self.layers[0]
        for layer in self.layers:
            if widths[layer] != widths[first]:
                raise UserError(
                    f"{self.mlp_path(layer)} maps other widths than {self.mlp_path(first)}: expected the same of all "
                    "layers; fit those that are alike with --layers"
                )
        return widths[first]

    def _widths(self, layer: int, calls: list[Call]) -> tuple[int, int]:
        """Width of an MLP's input and output, UserError if it is no map of one tensor to one."""
        (first, *again), (last, *_) = ([call for call in calls if call.module is end] for end in self.site(layer))
        tensors, output = first.tensors, last.output
        if len(tensors) != 1 or not isinstance(output, Tensor) or tensors[0].shape[:-1] != output.shape[:-1] or again:
            came = f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise UserError(
                f"{self.mlp_path(layer)} ({type(last.module).__name__}) cannot be fitted: expected a map of one "
                f"tensor [sequences, tokens, width] to one, run once, got {len(tensors)} tensors in and {came} out, "
                f"{1 + len(again)} times; choose other layers with --layers, another module with --mlp_path, or "
                "another base"
            )
        return tensors[0].shape[-1], output.shape[-1]


def find_mlps(model: nn.Module) -> dict[str, dict[int, tuple[str, str]]]:
    """Of each list of layers in a model that holds MLPs: by layer, the names of the two ends of its MLP."""
    found = {
        name: {layer: own for layer, block in enumerate(blocks) if (own := mlp_in(f"{name}.{layer}", block))}
        for name, blocks in model.named_modules()
        if isinstance(blocks, nn.ModuleList)
    }
    found = {name: mlps for name, mlps in found.items() if mlps}
    if not found:
        raise UserError(
            f"no MLPs found in {type(model).__name__}: expected a ModuleList of layers that each have a child module "
            "named mlp, ffn or feed_forward, or maps named fc1 and fc2; say where they are with --mlp_path"
        )
    return found


def mlp_in(name: str, block: nn.Module) -> tuple[str, str] | None:
    """The names of the ends of a layer's MLP: of a child that is called so, of a pair of maps, or of a child whose
    class is called so."""
    children = dict(block.named_children())
    own = [child for child in children if MLP_NAMES.fullmatch(child)]
    inside = {where for where, _ in block.named_modules()}
    pairs = [pair for pair in PAIRS if inside.issuperset(pair)]
    classes = [child for child, module in children.items() if MLP_CLASSES.search(type(module).__name__)]
    ends = next(iter([*zip(own, own, strict=True), *pairs, *zip(classes, classes, strict=True)]), None)
    return ends and (f"{name}.{ends[0]}", f"{name}.{ends[1]}")


def named_mlps(model: nn.Module, mlp_path: str) -> dict[str, dict[int, tuple[str, str]]]:
    """As `find_mlps`, where a path such as `model.layers.{}.mlp` says; UserError if no layer has a module there."""
    modules = dict(model.named_modules())
    blocks = mlp_path.partition(".{}")[0]
    count = len([*modules[blocks].children()]) if blocks in modules else 0
    paths = {layer: site_names(modules, mlp_path.replace("{}", str(layer))) for layer in range(count)}
    found = {layer: ends for layer, ends in paths.items() if ends}
    if not found or "{}" not in mlp_path:
        raise UserError(
            f"mlp_path {mlp_path!r} names no modules of {type(model).__name__}: expected a path with {{}} for the "
            "layer, such as model.layers.{}.mlp, or two with a colon between, such as model.layers.{}.fc1:fc2"
        )
    return {blocks: found}


def check_layers(layers: Sequence[int] | None, num_layers: int, holding: Collection[int] | None = None) -> list[int]:
    """The layers asked for, ascending (default: all); UserError if one does not exist, or is not among those that hold
    an MLP."""
    asked = sorted(set(layers)) if layers else list(range(num_layers))
    missing = [layer for layer in asked if layer >= num_layers]
    if missing:
        raise UserError(
            f"the base has layers 0 to {num_layers - 1}, but layers {', '.join(map(str, missing))} were asked for; "
            "name existing ones with --layers"
        )
    if holding is not None and (empty := [str(layer) for layer in asked if layer not in holding]):
        raise UserError(
            f"layers {', '.join(empty)} of the base hold no MLP: expected layers that do; name those with "
            f"--layers {','.join(map(str, holding))}"
        )
    return asked


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def linear_maps(parts: Sequence[nn.Module]) -> list[nn.Linear | Conv1D]:
    return [module for module in parts if isinstance(module, (nn.Linear, Conv1D))]


def is_sum(terms: Sequence[Any], output: Any) -> bool:
    """Whether an output is the sum of tensors of its own shape, up to rounding."""
    if not all(
        isinstance(term, Tensor) and isinstance(output, Tensor) and term.shape == output.shape for term in terms
    ):
        return False
    return torch.allclose(torch.stack([*terms]).sum(0), output, rtol=1e-2, atol=1e-4)


def map_widths(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Width of a linear map's input and of its output; GPT-2's keeps its weight transposed."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)
