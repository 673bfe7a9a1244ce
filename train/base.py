"""The base: any frozen Hugging Face decoder, where its MLPs are, and what flows in and out of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import transformers
from accelerate.utils import align_module_device
from huggingface_hub import try_to_load_from_cache
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bilinear_tc.modeling_bilinear_tc import Norm, Site, StandIn, read_norm
from bilinear_tc.train.errors import UserError, one_line
from bilinear_tc.train.mlps import (
    entered_from,
    entry_device,
    find_mlps,
    linear_maps,
    map_of,
    map_widths,
    named_mlps,
    parts_between,
    path_of,
    short_pass,
    without_residual,
)
from bilinear_tc.train.processes import process_count
from bilinear_tc.train.recipe import Recipe

Visit = Callable[[int, Tensor, Tensor], None]  # of a layer, its MLP's input and its output

REPOSITORY_ROOT = Path(__file__).resolve().parent.parent
# transformers 4.56 renamed the argument, and 5 warns of the old name
DTYPE_ARGUMENT = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


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
        device: where what it computes is handed over, wherever its own parts are.
        commit: the commit of the Hub repository that `load` took it from; None if it was a folder.
        replay: what tells of recorded activations in place of a pass, if they are recorded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layers: Sequence[int] | None = None,
        mlp_path: str | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.device = entry_device(model)
        self.commit: str | None = None
        self.disk: TemporaryDirectory[str] | None = None  # of what is put there, which goes when the base does
        self.replay: Callable[[Tensor, Visit], None] | None = None
        self.tokenizer = tokenizer
        found = find_mlps(model) if mlp_path is None else named_mlps(model, mlp_path)
        calls = short_pass(model)
        ran = {call.module for call in calls}

        def runs(blocks: str) -> int:
            return sum(model.get_submodule(enter) in ran for enter, _ in found[blocks].values())

        self._blocks_name = max(found, key=runs)  # a vision tower never runs on text
        mlps = {layer: without_residual(model, ends, calls) for layer, ends in found[self._blocks_name].items()}
        self._ends, self._parts = mlps, {layer: parts_between(model, ends, calls) for layer, ends in mlps.items()}
        self.num_layers = sum(1 for _ in model.get_submodule(self._blocks_name).children())
        self.layers = check_layers(layers, self.num_layers, mlps)
        widths = {layer: map_of(model, mlps[layer], calls) for layer in self.layers}
        self._before = {layer: entered_from(model, mlps[layer], calls) for layer in self.layers}
        first = self.layers[0]
        for layer in self.layers:
            if widths[layer] != widths[first]:
                raise UserError(
                    f"{self.mlp_path(layer)} maps other widths than {self.mlp_path(first)}: expected the same of all "
                    "layers; fit those that are alike with --layers"
                )
        self.n_inputs, self.n_outputs = widths[first]
        maps = (module for layer in self.layers for module in linear_maps(self.parts(layer)))
        inside = (width for module in maps for width in map_widths(module))
        self.widest_map = max([self.n_inputs, self.n_outputs, *inside])

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        layers: Sequence[int] | None = None,
        seq_len: int | None = None,
        mlp_path: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        device_map: str | dict[str, Any] | None = None,
        quantization: str | None = None,
    ) -> Base:
        """Loads a base by Hub id or folder.

        UserError if the folder or repository holds no model, a layer does not exist, or the sequences are longer than
        its positions.

        Args:
            name, revision: where it is.
            trust_remote_code: let code that lies beside it run.
            layers: the layers to look into; default: all.
            seq_len: tokens of the longest sequence that it will be given, if that is to be checked.
            mlp_path: where its MLPs are, as in the recipe; default: looked for.
            device, dtype: where its weights go, and as what. On the meta device it has shapes alone, and no tokenizer.
            device_map: "auto", or what Accelerate takes: its parts' places, among them the CPU and the disk; what it
                computes is handed over on `device`.
            quantization: "int8" or "nf4", for weights that bitsandbytes packs; default: as `dtype`.
        """
        location = base_location(name)
        if Path(location, "adapter_config.json").is_file():
            raise UserError(
                f"the base {name!r} is a PEFT adapter: expected a whole model; merge it first (merge_and_unload) and "
                "save that"
            )
        config_of_packing = None if quantization is None else packed(quantization, dtype)
        place: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        with one_sentence(name):
            config = AutoConfig.from_pretrained(location, **place)
        check_layers(layers, count_layers(config))  # before gigabytes are read
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if seq_len is not None and positions is not None and seq_len > positions:
            raise UserError(
                f"the base takes sequences of up to {positions} tokens, but seq_len is {seq_len}; lower it with "
                "--seq_len"
            )
        with one_sentence(name):
            if torch.device(device).type == "meta":
                with torch.device(device):
                    kind: dict[str, Any] = {DTYPE_ARGUMENT: dtype, "trust_remote_code": trust_remote_code}
                    return cls(AutoModelForCausalLM.from_config(config, **kind), None, layers, mlp_path)  # type: ignore
            place_and_type = {**place, DTYPE_ARGUMENT: dtype, "output_loading_info": True}
            if config_of_packing is not None:
                place_and_type["quantization_config"] = config_of_packing
                device_map = device_map or {"": torch.device(device)}
            if device_map is not None:
                disk = TemporaryDirectory(prefix="bilinear-tc-")
                place_and_type |= {"device_map": device_map, "offload_folder": disk.name}
            loaded: Any = AutoModelForCausalLM.from_pretrained(location, **place_and_type)
            model, told = loaded
            if missing := sorted(map(str, told["missing_keys"])):
                raise ValueError(f"weights that lack {', '.join(missing[:3])}, which would be random numbers")
            tokenizer = AutoTokenizer.from_pretrained(location, **place)
        base = cls(model if device_map else model.to(device), tokenizer, layers, mlp_path)
        base.device = torch.device(device)
        if device_map is not None:
            base.disk = disk
        base.commit = cached_commit(location, revision)
        return base

    @classmethod
    def of_recipe(cls, recipe: Recipe, device: torch.device, layers: Sequence[int] | None = None) -> Base:
        """The base that a recipe names, in the type that it computes in; `layers` default to the recipe's."""
        if recipe.base_device_map != "none" and process_count() > 1:
            raise UserError(
                f"--base_device_map {recipe.base_device_map} places one base over all GPUs: expected a single process, "
                f"got {process_count()}; start one, with --num_processes 1"
            )
        return cls.load(
            recipe.base,
            revision=recipe.base_revision,
            trust_remote_code=recipe.trust_remote_code,
            layers=layers or recipe.layer_indices(),
            seq_len=recipe.seq_len,
            mlp_path=recipe.mlp_path,
            device=device,
            dtype=recipe.compute_dtype(device) if recipe.base_dtype == "auto" else getattr(torch, recipe.base_dtype),
            device_map=None if recipe.base_device_map == "none" else recipe.base_device_map,
            quantization=None if recipe.base_quantization == "none" else recipe.base_quantization,
        )

    @property
    def vocabulary(self) -> int | None:
        """Rows of the token embedding, if it tells."""
        return getattr(self.model.get_input_embeddings(), "num_embeddings", None)

    def mlp_path(self, layer: int) -> str:
        """The MLP's path from the causal language model, as `Site` reads it: `gpt_neox.layers.3.mlp`, or a pair."""
        return path_of(self._ends[layer])

    def norm(self, layer: int) -> Norm | None:
        """What the norm does that a layer's MLP input leaves; None if it leaves none, or one that drops a feature."""
        found = (norm for module in self._before[layer] if (norm := self._read_norm(module)))
        norm = next(found, None)
        return norm if norm is not None and norm.weight.abs().min() > 1e-6 * norm.weight.abs().max() else None

    def _read_norm(self, module: nn.Module) -> Norm | None:
        with align_module_device(module):  # from the CPU or the disk, if it was put there
            bare = copy.copy(module)
            for hook in ("forward", "_old_forward", "_hf_hook"):  # of Accelerate
                bare.__dict__.pop(hook, None)
            return read_norm(bare, self.n_inputs)

    def holds_mlp(self, layer: int) -> bool:
        return layer in self._ends

    def site(self, layer: int) -> Site:
        return Site(*map(self.model.get_submodule, self._ends[layer]))

    def mlp(self, layer: int) -> nn.Module:
        """The MLP's module; of an MLP that is no module, the one that its output leaves."""
        return self.site(layer).leave

    def parts(self, layer: int) -> list[nn.Module]:
        """The MLP's modules without children, in the order in which they run."""
        return [self.model.get_submodule(name) for name in self._parts[layer]]

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder's layers."""
        return cast(nn.ModuleList, self.model.get_submodule(self._blocks_name))

    def stop_after_last_layer(self) -> None:
        """Drops what no asked-for MLP depends on: the blocks after the last layer asked for.

        The language model as such is spent afterwards: only `activations` may be called.
        """
        if self._blocks_name == self._ends[self.layers[0]][0].rpartition(".")[0]:
            return  # a list of MLPs alone (XLM), which the decoder counts on
        parent_name, _, name = self._blocks_name.rpartition(".")
        setattr(self.model.get_submodule(parent_name), name, self.blocks[: self.layers[-1] + 1])

    def compile(self) -> None:
        """Compiles the parts of each layer (attention, MLP, norms of no single kernel): their elementwise work fuses.

        One compilation of a part serves all layers. The decoder around them stays as it is: traced as a whole it would
        take minutes, spell out the causal mask (which costs the fast attention kernels), and hold on to the hooks.
        """
        if hasattr(self.model, "hf_device_map"):
            return  # Accelerate's hooks move weights around
        ends = {end for layer in self.layers for end in self.site(layer)}
        for block in self.blocks.children():
            for part in block.children():
                if not type(part).__module__.startswith("torch.") and ends.isdisjoint({*part.modules()} - {part}):
                    part.forward = torch.compile(part.forward, dynamic=False)

    def activations(self, input_ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """MLP input [sequences, tokens, n_inputs] and output [.., n_outputs] of each layer asked for, as by `run`."""
        captured: dict[int, tuple[Tensor, Tensor]] = {}
        # copies, since some decoders (Falcon) add to an MLP's output in place
        self.forward_pass(input_ids, lambda layer, x, y: captured.update({layer: (x.clone(), y.clone())}))
        return captured

    def run(self, input_ids: Tensor, visit: Visit) -> None:
        """What `forward_pass` does, or `replay` in its place if that is set."""
        (self.replay or self.forward_pass)(input_ids, visit)

    @torch.no_grad()
    def forward_pass(self, input_ids: Tensor, visit: Visit) -> None:
        """One forward pass without the LM head, which tells what flows through the MLPs of the layers asked for.

        Padding on the right needs no attention mask: causal attention lets no earlier position see it.

        Args:
            input_ids: [sequences, tokens] token ids on the base's device.
            visit: called with layer, MLP input [sequences, tokens, n_inputs] and output [.., n_outputs] as soon as the
                MLP has run, so that the activations of two layers need not exist at once.
        """
        seen = set()

        def visiting(layer: int) -> StandIn:
            def visited(entered: list[Tensor], true: Callable[[], Tensor], _before: Callable[[], Tensor]) -> Tensor:
                seen.add(layer)
                y = true()
                at_hand = (t.reshape(*input_ids.shape, -1).to(self.device) for t in (entered[0], y))  # OPT flattens it
                visit(layer, *at_hand)
                return y

            return visited

        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(self.site(layer).replaced(visiting(layer)))
            self.model.base_model(input_ids=input_ids.to(entry_device(self.model)), use_cache=False)
        for layer in set(self.layers) - seen:
            raise UserError(f"the forward pass never came to {self.mlp_path(layer)}, as it did when it was loaded")


def packed(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How bitsandbytes is to pack weights; UserError if it is not installed."""
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"base_quantization is {quantization}, but the package bitsandbytes is not installed: install it "
            "(pip install 'bilinear-tc[quantization]'), or leave --base_quantization out"
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def count_layers(config: PretrainedConfig) -> int:
    """How many layers a decoder has, by its configuration; BART's and its like count their encoder's apart."""
    text_config = config.get_text_config()
    return getattr(text_config, "decoder_layers", text_config.num_hidden_layers)


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
