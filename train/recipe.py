"""Every setting of a fit: its default, its meaning, its check, and how recipe files and flags set it."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import torch
from transformers import HfArgumentParser

from bilinear_tc.train.errors import UserError
from bilinear_tc.train.files import read_yaml

T = TypeVar("T")

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "pythia-410m"
MOST_LAYERS = 10_000  # more than any decoder has, and few enough to list
# Settings that change neither the weights nor the history of a fit, but for the order of additions.
FREE_SETTINGS = {
    *("output_dir", "activations", "base_device_map", "eval_split", "eval_tokens", "micro_batch_size"),
    *("tokenizer_workers", "shard", "checkpoint_every", "resume", "overwrite", "report_to", "skip_bad_rows"),
    "trust_remote_code",
}
FINISH = ("finish", "finish_steps", "finish_lr", "anchor", "from_run")  # settings of what follows the fit itself
PASSING = {"overwrite", "activations"}  # settings that a run does not record
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


def option(default: Any, help: str) -> Any:
    """A field that is a flag too."""
    return field(default=default, metadata={"help": help})


@dataclass
class Recipe:
    """A fit's settings. The defaults are the recipe `pythia-410m`; a recipe file or a flag outranks them."""

    base: str = option("EleutherAI/pythia-410m", "The frozen decoder: a Hub id or a folder.")
    base_revision: str | None = option(None, "The base's branch, tag or commit.")
    trust_remote_code: bool = option(False, "Run the code that lies beside the base, as some bases need.")
    base_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "The type of the base's weights. auto: that of products."
    )
    base_device_map: Literal["none", "auto"] = option(
        "none", "auto: Accelerate places a base that one device cannot hold over the GPUs, the CPU and the disk."
    )
    base_quantization: Literal["none", "int8", "nf4"] = option(
        "none", "Pack the base's weights into 8 or 4 bits (bitsandbytes, for GPUs)."
    )
    mlp_path: str | None = option(
        None,
        "Where the base's MLPs are, with {} for the layer's number: a module, model.layers.{}.mlp, or the two that the "
        "MLP's input enters and its output leaves, model.layers.{}.fc1:fc2. Default: looked for by usual names.",
    )
    dataset: str = option(
        "monology/pile-uncopyrighted",
        "Text to fit on: a Hub id, a folder in a Hub dataset's layout, files (txt, jsonl, jsonl.zst, csv, parquet, py; "
        "a comma list or a glob) or python-stdlib.",
    )
    dataset_config: str | None = option(None, "The dataset's configuration name.")
    split: str = option("train", "The split to fit on.")
    text_column: str = option("text", "The column that holds a document's text.")
    skip_bad_rows: bool = option(False, "Leave out, and count, rows that hold no text or cannot be read.")
    eval_split: str | None = option(
        "val.jsonl.zst",
        "The held-out split, or a file in the dataset or elsewhere, to measure on at the end of the fit. 'none': "
        "measure nothing.",
    )
    eval_tokens: int = option(65536, "Held-out tokens to measure on.")
    layers: str | None = option(None, "Layers to fit, such as 0-5,9. Default: all.")
    activations: str | None = option(
        None, "Read MLP inputs and outputs from this folder, as train/cache.py writes them, and not from the base."
    )
    output_dir: str | None = option(None, "The run's folder. Default: runs/RECIPE.")
    seq_len: int = option(128, "Tokens a sequence.")
    batch_size: int = option(512, "Sequences a step, over all processes.")
    micro_batch_size: int | None = option(
        None, "Sequences that a process works on at once. Default: chosen from the free device memory."
    )
    max_steps: int = option(3000, "Optimizer steps. 0: the set is its start, closed form or random.")
    form: Literal["bilinear", "input_sum"] = option("bilinear", "The transcoder's form.")
    hidden_multiplier: float = option(4.0, "Hidden units of a transcoder, as a multiple of its input's width.")
    bias: bool = option(True, "Whether the transcoders' maps have biases.")
    init: Literal["mlp", "random"] = option("mlp", "Start from the base's own MLP, in closed form, or from noise.")
    init_tokens: int = option(1048576, "Tokens of the calibration sample that --init mlp solves on.")
    optimizer: Literal["muon", "normuon", "adamw"] = option(
        "muon", "The optimizer of the matrices; biases always use AdamW."
    )
    lr: float | None = option(
        None,
        "Peak learning rate of the matrices. Default: 0.02 at 65,536 tokens a step, and falls with their 4th root.",
    )
    bias_lr: float = option(3e-4, "Peak learning rate of the biases.")
    lr_schedule: Literal["constant", "linear", "wsd"] = option(
        "linear", "The learning rate over the fit: constant, linear decay to 0, or warmup-stable-decay."
    )
    momentum: float = option(0.95, "Muon's momentum (Nesterov).")
    newton_schulz: Literal["classic", "polar_express"] = option(
        "classic", "Muon's polynomials: the same in all five steps, or one fitted to each step."
    )
    weight_decay: float = option(0.01, "Decoupled weight decay of the matrices.")
    jvp: float | None = option(
        None,
        "Weight of the derivative's error in the loss: along random directions, at a quarter of the tokens. Default: "
        "0.1 with --init mlp, else 0.",
    )
    normalization: Literal["auto", "batch", "running"] = option(
        "auto",
        "The statistics of the fit's z-scores: each batch's own, or those of all rows seen so far. auto: running with "
        "--init mlp, which solves for them, else batch.",
    )
    pack: bool = option(
        True,
        "Fill sequences with text, with an eos between documents. --no_pack cuts each document to one sequence "
        "and leaves its padding out of every statistic.",
    )
    bos: str = option(
        "auto",
        "What each sequence starts with: auto, whatever the tokenizer puts before a text; none; or a token's id. A run "
        "goes on, and is measured, with what it was begun with.",
    )
    shuffle_buffer: int = option(
        16384, "Sequences that are held back and drawn from at random. 0: the text's own order."
    )
    tokenizer_workers: int | None = option(None, "Threads that tokenize text. Default: chosen from the cores.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "The type of products. auto: bfloat16 on CUDA (with float32 master weights), float32 on the CPU."
    )
    compile: bool | None = option(None, "Compile the code that runs on the device. Default: on CUDA only.")
    finish: Literal["none", "joint"] = option(
        "none",
        "joint: after the fit of each layer by itself, fit all of them once more with all at once in the base's place, "
        "so that it goes on predicting what it did.",
    )
    finish_steps: int | None = option(
        None, "Steps of --finish joint. Default: those that bring as many tokens as the fit took, start included."
    )
    finish_lr: float | None = option(None, "Its peak learning rate of the matrices. Default: a quarter of lr.")
    anchor: float = option(0.5, "Weight of each layer's own loss, as in the fit, beside the KL of --finish joint.")
    from_run: str | None = field(
        default=None,
        metadata={
            "help": "A finished run that --finish joint starts from, and leaves as it is. Without --recipe its own "
            "settings are the defaults, and RUN-joint is the output_dir.",
            "aliases": ["--from"],
        },
    )
    checkpoint_every: int = option(500, "Steps between checkpoints. 0: only at the end.")
    resume: bool = option(
        True,
        "Resume from the newest checkpoint of the same recipe in output_dir. --no_resume deletes the run that is "
        "there, and starts anew.",
    )
    overwrite: bool = option(
        False,
        "Let --no_resume fit over a finished set, which goes once the new one is whole. Without --no_resume: resume "
        "such a fit.",
    )
    shard: Literal["auto", "none", "layers"] = option(
        "auto",
        "Whether each of several processes holds all layers, or some of its own. auto: some, if all would not fit.",
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = option(
        "none", "The tracker to send each step's scores to."
    )
    seed: int = option(0, "The seed of the random start and of the shuffle.")

    def __post_init__(self) -> None:
        """Refuses impossible values: UserError, with the field, what was expected and what came."""
        for name in ("layers", "bos"):
            if type(getattr(self, name)) is int:  # what YAML makes of `layers: 3`
                setattr(self, name, str(getattr(self, name)))
        for name, hint in get_type_hints(Recipe).items():
            check_type(name, hint, getattr(self, name))
        for name in ("base", "dataset", "eval_split", "output_dir", "activations", "from_run"):
            if getattr(self, name) is not None:
                setattr(self, name, expanded(getattr(self, name)))
        if self.eval_split is not None and self.eval_split.lower() == "none":
            self.eval_split = None
        from_mlp = self.init == "mlp"
        if self.jvp is None:
            self.jvp = 0.1 if from_mlp else 0.0
        if self.normalization == "auto":
            self.normalization = "running" if from_mlp else "batch"
        at_least_0 = ("seed", "max_steps", "shuffle_buffer", "tokenizer_workers", "checkpoint_every")
        at_least_1 = ("seq_len", "batch_size", "micro_batch_size", "eval_tokens", "init_tokens", "finish_steps")
        for name in (*at_least_0, *at_least_1):
            value, least = getattr(self, name), int(name in at_least_1)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        if self.lr is None:
            self.lr = float(f"{0.02 * (self.batch_size * self.seq_len / 65_536) ** 0.25:.3g}")
        if self.finish_lr is None and self.finish == "joint":
            self.finish_lr = self.lr / 4
        multiplier = "a positive number, since n_hidden must be at least 1"
        for name, fits, expected in (  # each comparison is written so that a NaN fails it
            ("seed", self.seed < 2**64, "below 2 to the 64th, so as to fit in 64 bits"),
            ("lr", 0 < self.lr < math.inf, "a positive number"),
            ("bias_lr", 0 < self.bias_lr < math.inf, "a positive number"),
            ("hidden_multiplier", 0 < self.hidden_multiplier < math.inf, multiplier),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("seq_len", self.finish == "none" or self.seq_len > 1, "at least 2 with --finish joint"),
            ("finish_lr", self.finish_lr is None or 0 < self.finish_lr < math.inf, "a positive number"),
            ("anchor", 0 <= self.anchor < math.inf, "a finite number of at least 0"),
            ("jvp", 0 <= self.jvp < math.inf, "a finite number of at least 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number of at least 0"),
        ):
            if not fits:
                raise UserError(f"{name} must be {expected}, got {getattr(self, name)}")
        if self.finish == "none" and (self.from_run or self.finish_steps):
            raise UserError("finish_steps and from_run are of the joint finish: add --finish joint, or leave them out")
        for name in ("dtype", "base_dtype"):
            if self.finish == "joint" and getattr(self, name) == "float16":
                raise UserError(f"{name} float16 has too small a range for --finish joint's gradients: use bfloat16")
        if self.finish == "joint" and self.shard == "layers":
            raise UserError("--finish joint needs all layers in every process: leave --shard layers out")
        if self.finish == "joint" and (self.activations or self.base_device_map != "none"):
            raise UserError(
                "--finish joint runs the base itself, whole on each device: expected no --activations, and "
                "--base_device_map none"
            )
        if from_mlp and self.form != "bilinear":
            raise UserError(f"init mlp can start the bilinear form only, got form {self.form}; use --init random")
        if from_mlp and not self.bias:
            raise UserError("init mlp needs biases, which carry its units' linear parts; without, use --init random")
        if not re.fullmatch(r"auto|none|\d+(,\d+)*", self.bos):
            raise UserError(f"bos must be auto, none or a token's id, got {self.bos!r}")
        self.layer_indices()

    def layer_indices(self) -> list[int] | None:
        """The layers that `layers` names, ascending, or None for all; UserError if it does not read like 0-5,9."""
        if self.layers is None:
            return None
        indices: set[int] = set()
        for part in self.layers.split(","):
            match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if last < first:
                raise UserError(f"layers must read like 0-5,9, got {self.layers!r}")
            if last >= MOST_LAYERS:
                raise UserError(f"layers must be below {MOST_LAYERS}, got {self.layers!r}")
            indices.update(range(first, last + 1))
        return sorted(indices)

    @property
    def all_steps(self) -> int | None:
        """Optimizer steps of all stages; None if those of the joint finish are still open."""
        if self.finish == "none":
            return self.max_steps
        return None if self.finish_steps is None else self.max_steps + self.finish_steps

    def n_hidden(self, n_inputs: int) -> int:
        """Hidden units of a transcoder whose input has this width; UserError if that is none."""
        units = round(self.hidden_multiplier * n_inputs)
        if units < 1:
            raise UserError(
                f"n_hidden must be at least 1, got {units} from hidden_multiplier {self.hidden_multiplier} and "
                f"inputs of width {n_inputs}; raise --hidden_multiplier"
            )
        return units

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """What products are computed in: master weights, statistics and losses are float32 or wider in any case."""
        if self.dtype == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return getattr(torch, self.dtype)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def expanded(path: str) -> str:
    """A path, or several between commas, with `~` and `$HOME` spelled out, which a shell does not do in every place."""
    return ",".join(os.path.expandvars(os.path.expanduser(part)) for part in path.split(","))


def check_type(name: str, hint: Any, value: Any) -> None:
    """UserError if a value, as a recipe file may hold it, is not of its setting's type; whole numbers are numbers."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"{name} must be one of {', '.join(get_args(hint))}, got {value!r}")
        return
    types = get_args(hint) or (hint,)
    if type(value) not in types and not (type(value) is int and float in types):
        expected = " or ".join(TYPE_NAMES[expected] for expected in types)
        came = "null" if value is None else repr(value)
        raise UserError(f"{name} must be {expected}, got {came}")


def recipe_file(name: str) -> Path:
    """The file of a recipe that is named or given by its path; UserError if there is none."""
    for path in (RECIPES / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise UserError(f"no recipe {name!r}: expected one of {known}, or a YAML file")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a recipe file; UserError if it is not a YAML mapping or names a field that no recipe has."""
    settings = read_yaml(path)
    unknown = sorted(set(map(str, settings)) - {f.name for f in dataclasses.fields(Recipe)})
    if unknown:
        raise UserError(f"{path} sets {', '.join(unknown)}, which no recipe has")
    for name, hint in get_type_hints(Recipe).items():
        if float in (hint, *get_args(hint)) and isinstance(settings.get(name), str):
            with suppress(ValueError):
                settings[name] = float(settings[name])  # PyYAML takes 1e-3 for text
    return settings


def named_recipe(name: str) -> Recipe:
    """A recipe by name or YAML file; UserError if there is none or it is not readable."""
    return Recipe(**read_settings(recipe_file(name)))


def parse_settings(kind: type[T]) -> T:
    """A script's settings, a dataclass whose fields are its flags, from the command line."""
    parser = HfArgumentParser(cast(Any, kind), allow_abbrev=False, description=kind.__doc__)
    (settings,) = parser.parse_args_into_dataclasses()
    return settings


def parse_recipe(arguments: list[str] | None = None) -> Recipe:
    """The recipe of a command line, as `parse_command` reads it."""
    return parse_command(arguments)[0]


def parse_command(arguments: list[str] | None = None) -> tuple[Recipe, str | None]:
    """The recipe of a command line: `--recipe NAME|FILE`, and any field as a flag, which outranks the file. Beside it
    what `--plan` says: None if it is not there, "" if it names no device.

    Exits with a usage message on an unknown flag; UserError on an impossible value.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser(
        cast(Any, Recipe), allow_abbrev=False, description="Fits the transcoders of a base's layers."
    )
    parser.add_argument(
        "--recipe",
        help=f"A recipe by name or YAML file. Defaults to {DEFAULT_RECIPE}; here are "
        + ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml"))),
    )
    known = parser.parse_known_args(arguments)[0]
    source = None if known.recipe or not known.from_run else expanded(known.from_run)
    path = recipe_file(known.recipe or DEFAULT_RECIPE) if source is None else Path(source, "recipe.yaml")
    if not path.is_file():
        raise UserError(f"--from {source} holds no recipe.yaml: expected a finished run, as train/fit.py writes it")
    settings = read_settings(path)
    if source is not None:
        folder = Path(source) if Path(source).name not in ("", "..") else Path(source).resolve()
        settings |= {"output_dir": f"{folder}-joint", "resume": True, "shard": "auto"}
    parser.set_defaults(**settings)
    parser.add_argument(
        "--plan",
        nargs="?",
        const="",
        metavar="DEVICE",
        help="Do not fit: say what the fit would need, on the device at hand or on GPUs such as 80GB or 8x80GB.",
    )
    values = vars(parser.parse_args(arguments))
    plan = values.pop("plan")
    del values["recipe"]
    if values["output_dir"] is None:
        values["output_dir"] = f"runs/{path.stem}"
    return Recipe(**values), plan
