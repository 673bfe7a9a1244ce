"""The base: any frozen Hugging Face decoder, where its MLPs are, and what flows in and out of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

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
        maps = linear_maps(self.mlp(self.layers[0]))
        widths = [width for module in maps.values() for width in map_widths(module)]
        self.n_inputs, self.n_outputs, self.widest_map = widths[0], widths[-1], max(widths)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
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
            layers: the layers to look into; default: all.
            seq_len: tokens of the longest sequence that it will be given, if that is to be checked.
            device, dtype: where its weights go, and as what.
        """
        location = base_location(name)
        with one_sentence(name):
            config = AutoConfig.from_pretrained(location, revision=revision)
        text_config = config.get_text_config()  # checked before gigabytes are read
        check_layers(layers, text_config.num_hidden_layers)
        positions = getattr(text_config, "max_position_embeddings", None)
        if seq_len is not None and positions is not None and seq_len > positions:
            raise UserError(
                f"the base takes sequences of up to {positions} tokens, but seq_len is {seq_len}; lower it with "
                "--seq_len"
            )
        with one_sentence(name):
            model = AutoModelForCausalLM.from_pretrained(location, revision=revision, **{DTYPE_ARGUMENT: dtype})
            tokenizer = AutoTokenizer.from_pretrained(location, revision=revision)
        base = cls(model.to(device), tokenizer, layers)  # type: ignore[arg-type] # transformers hides the types of `to`
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
            device=device,
            dtype=recipe.compute_dtype(device),
        )

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
        self.run(input_ids, lambda layer, x, y: captured.update({layer: (x, y)}))
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

        def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            return lambda _module, inputs, output: visit(layer, inputs[0], output)

        handles = [self.mlp(layer).register_forward_hook(hook(layer)) for layer in self.layers]
        try:
            self.model.base_model(input_ids=input_ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()


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
    """Each linear map in an MLP, by module name, in order of registration; UserError if there are fewer than two."""
    maps = {name: module for name, module in mlp.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    if len(maps) < 2:
        raise UserError(
            f"{type(mlp).__name__} holds {len(maps)} linear maps: expected an MLP of two or more (mixtures of "
            "experts and fused layers are not supported)"
        )
    return maps


def map_widths(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Width of a linear map's input and of its output; GPT-2's keeps its weight transposed."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)
