"""The base: any frozen Hugging Face decoder, where its MLPs are, and what flows in and out of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from bilinear_tc.train.errors import UserError, one_line
from bilinear_tc.train.recipe import Recipe

REPOSITORY_ROOT = Path(__file__).resolve().parent.parent
# transformers 4.56 renamed the argument, and 5 warns of the old name
DTYPE_ARGUMENT = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
MLP_NAMES = re.compile(r"(mlp|ffn|feed_forward|feedforward|ff)", re.IGNORECASE)


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
        reason = one_line(error, most=800)  # with the remedy, such as where to ask for access
        flag = "; the flag for that is --trust_remote_code" if "trust_remote_code" in reason else ""
        raise UserError(
            f"the base {name!r} cannot be loaded: expected a Hugging Face model (config, weights, tokenizer) in a "
            f"local folder or on the Hub, got: {reason}{flag}"
        ) from error


def cached_commit(location: str, revision: str | None) -> str | None:
    """The commit at which a model lies in the Hub's cache, None for a folder; transformers itself no longer tells."""
    if Path(location).is_dir():
        return None
    config = try_to_load_from_cache(location, "config.json", revision=revision)  # …/snapshots/COMMIT/config.json
    return Path(config).parent.name if isinstance(config, str) else None


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
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: Sequence[int] | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.commit: str | None = None
        self.tokenizer = tokenizer
        blocks_name, blocks = find_blocks(model.base_model)
        mlp_name = next(name for name, _ in blocks[0].named_children() if MLP_NAMES.fullmatch(name))
        self.layers = check_layers(layers, len(blocks))
        prefix = f"{model.base_model_prefix}.{blocks_name}" if model.base_model is not model else blocks_name
        self._mlp_paths = {layer: f"{prefix}.{layer}.{mlp_name}" for layer in range(len(blocks))}
        self._blocks_name = blocks_name
        self.num_layers = len(blocks)
        self._adds_residual = False
        self.n_inputs, self.n_outputs = self._look_at_mlps()
        widths = [width for module in linear_maps(self.mlp(self.layers[0])).values() for width in map_widths(module)]
        self.widest_map = max([self.n_inputs, self.n_outputs, *widths])

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        layers: Sequence[int] | None = None,
        seq_len: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Base:
        """Loads a base by Hub id or folder.

        UserError if the folder or repository holds no model, a layer does not exist, or the sequences are longer than
        its positions.

        Args:
            name, revision: where it is.
            trust_remote_code: let code that lies beside it run.
            layers: the layers to look into; default: all.
            seq_len: tokens of the longest sequence that it will be given, if that is to be checked.
            device, dtype: where its weights go, and as what.
        """
        location = base_location(name)
        if Path(location, "adapter_config.json").is_file():
            raise UserError(
                f"the base {name!r} is a PEFT adapter: expected a whole model; merge it first (merge_and_unload) and "
                "save that"
            )
        place: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        with one_sentence(name):
            config = AutoConfig.from_pretrained(location, **place)
        text_config = config.get_text_config()  # checked before gigabytes are read
        check_layers(layers, text_config.num_hidden_layers)
        positions = getattr(text_config, "max_position_embeddings", None)
        if seq_len is not None and positions is not None and seq_len > positions:
            raise UserError(
                f"the base takes sequences of up to {positions} tokens, but seq_len is {seq_len}; lower it with "
                "--seq_len"
            )
        with one_sentence(name):
            place_and_type = {**place, DTYPE_ARGUMENT: dtype, "output_loading_info": True}
            loaded: Any = AutoModelForCausalLM.from_pretrained(location, **place_and_type)
            model, told = loaded
            if missing := sorted(map(str, told["missing_keys"])):
                raise ValueError(f"weights that lack {', '.join(missing[:3])}, which would be random numbers")
            tokenizer = AutoTokenizer.from_pretrained(location, **place)
        base = cls(model.to(device), tokenizer, layers)
        base.commit = cached_commit(location, revision)
        return base

    @classmethod
    def of_recipe(cls, recipe: Recipe, device: torch.device, layers: Sequence[int] | None = None) -> Base:
        """The base that a recipe names, in the type that it computes in; `layers` default to the recipe's."""
        return cls.load(
            recipe.base,
            revision=recipe.base_revision,
            trust_remote_code=recipe.trust_remote_code,
            layers=layers or recipe.layer_indices(),
            seq_len=recipe.seq_len,
            device=device,
            dtype=recipe.compute_dtype(device),
        )

    @property
    def vocabulary(self) -> int | None:
        """Rows of the token embedding, if it tells."""
        return getattr(self.model.get_input_embeddings(), "num_embeddings", None)

    def mlp_path(self, layer: int) -> str:
        """The MLP's module path from the causal language model, such as `gpt_neox.layers.3.mlp`."""
        return self._mlp_paths[layer]

    def mlp(self, layer: int) -> nn.Module:
        return self.model.get_submodule(self.mlp_path(layer))

    def stop_after_last_layer(self) -> None:
        """Drops what no asked-for MLP depends on: the blocks after the last layer asked for.

        The language model as such is spent afterwards: only `activations` may be called.
        """
        decoder = self.model.base_model
        parent_name, _, name = self._blocks_name.rpartition(".")
        blocks = decoder.get_submodule(self._blocks_name)
        setattr(decoder.get_submodule(parent_name), name, blocks[: self.layers[-1] + 1])

    def compile(self) -> None:
        """Compiles the parts of each layer (attention, MLP, norms of no single kernel): their elementwise work fuses.

        One compilation of a part serves all layers. The decoder around them stays as it is: traced as a whole it would
        take minutes, spell out the causal mask (which costs the fast attention kernels), and hold on to the hooks.
        """
        for block in self.model.base_model.get_submodule(self._blocks_name):
            parts = (part for part in block.children() if not type(part).__module__.startswith("torch."))
            for part in parts:
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

        def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
            def visit_layer(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
                seen.add(layer)
                visit(layer, inputs[0], output)
                return residuals.pop() + output if residuals else None

            return visit_layer

        residuals: list[Tensor] = []

        def take_residual(_module: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            """What is visited must be the MLP's own output, to which the residual stream is added afterwards."""
            residuals.append(inputs[1])
            return inputs[0], torch.zeros_like(inputs[1])

        mlps = {layer: self.mlp(layer) for layer in self.layers}
        handles = [mlp.register_forward_hook(hook(layer)) for layer, mlp in mlps.items()]
        if self._adds_residual:
            handles += [mlp.register_forward_pre_hook(take_residual) for mlp in mlps.values()]
        try:
            self.model.base_model(input_ids=input_ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self._check_all_seen(seen)

    def _check_all_seen(self, seen: Collection[int]) -> None:
        for layer in self.layers:
            if layer not in seen:
                raise UserError(
                    f"the forward pass never came to {self.mlp_path(layer)}: expected a decoder that runs each of its "
                    f"{self.num_layers} layers on text; leave this layer out with --layers"
                )

    @torch.no_grad()
    def _look_at_mlps(self) -> tuple[int, int]:
        """Width of the MLPs' inputs and outputs, as a forward pass over two tokens shows them.

        Raises:
            UserError: if a layer's MLP is not run, or is anything but a map of one tensor to one, beside the residual
                stream that some add to their output.
        """
        calls: dict[int, tuple[list[Tensor], Any]] = {}

        def note(layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
            def noted(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                calls[layer] = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)], output

            return noted

        mlps = {layer: self.mlp(layer) for layer in self.layers}
        handles = [mlp.register_forward_hook(note(layer), with_kwargs=True) for layer, mlp in mlps.items()]
        try:
            self.model.base_model(
                input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.model.device), use_cache=False
            )
        finally:
            for handle in handles:
                handle.remove()
        self._check_all_seen(calls)
        kinds = {layer: self._kind_of_call(layer, *calls[layer]) for layer in self.layers}
        first = self.layers[0]
        for layer, kind in kinds.items():
            if kind != kinds[first]:
                raise UserError(
                    f"{self.mlp_path(layer)} maps other widths than {self.mlp_path(first)}: expected the same of all "
                    "layers; fit those that are alike with --layers"
                )
        n_inputs, n_outputs, self._adds_residual = kinds[first]
        return n_inputs, n_outputs

    def _kind_of_call(self, layer: int, tensors: list[Tensor], output: Any) -> tuple[int, int, bool]:
        """Width of an MLP's input and output, and whether it adds the residual stream; UserError if it is no map."""
        adds = False
        if len(tensors) == 2 and isinstance(output, Tensor) and tensors[1].shape == output.shape:
            own = self.mlp(layer)(tensors[0], torch.zeros_like(tensors[1]))
            adds = torch.allclose(tensors[1] + own, output, rtol=1e-2, atol=1e-4)
        if not isinstance(output, Tensor) or len(tensors) != 1 + adds or tensors[0].shape[:-1] != output.shape[:-1]:
            came = f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise UserError(
                f"{self.mlp_path(layer)} ({type(self.mlp(layer)).__name__}) cannot be fitted: expected a map of one "
                f"tensor [sequences, tokens, width] to one, got {len(tensors)} tensors in and {came} out; choose other "
                "layers with --layers, or another base"
            )
        return tensors[0].shape[-1], output.shape[-1], adds


def find_blocks(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's list of layers: its longest ModuleList whose members hold an MLP."""
    lists = [
        (name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and any(MLP_NAMES.fullmatch(child) for child, _ in module[0].named_children())
    ]
    if not lists:
        raise UserError(
            f"no MLPs found in {type(decoder).__name__}: expected a ModuleList of layers that each have a child "
            "module named mlp, ffn or feed_forward"
        )
    return max(lists, key=lambda item: len(item[1]))


def check_layers(layers: Sequence[int] | None, num_layers: int) -> list[int]:
    """The layers asked for, ascending (default: all); UserError if one does not exist."""
    missing = sorted(set(layers or ()) - set(range(num_layers)))
    if missing:
        raise UserError(
            f"the base has layers 0 to {num_layers - 1}, but layers {', '.join(map(str, missing))} were asked for; "
            "name existing ones with --layers"
        )
    return sorted(set(layers)) if layers else list(range(num_layers))


def linear_maps(mlp: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Each linear map in an MLP, by module name, in order of registration."""
    return {name: module for name, module in mlp.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def map_widths(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Width of a linear map's input and of its output; GPT-2's keeps its weight transposed."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)
