"""Which decoders work: small random ones of many architectures, from where their MLPs are to a built card.

    python train/studies/decoders.py

prints two Markdown tables: what works, and what is refused with which sentence. It needs no network, which
HF_HUB_OFFLINE=1 tells the Hub's library. Of each decoder

- the MLPs are found, or named as `--mlp_path` names them;
- the closed form's units are held against least squares in float64 over what the MLP's own maps are seen to compute;
- what `Base.activations`, `capture` and `attached` see and change is held against hooks set by hand;
- `train/fit.py`, `train/evaluate.py` and `upload/publish.py --dry_run` run, from the closed form where there is one.
"""

from __future__ import annotations

import io
import runpy
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.activations import Activations
from bilinear_tc.train.base import REPOSITORY_ROOT, Base
from bilinear_tc.train.errors import UserError, command_line
from bilinear_tc.train.fitting.closed_form import set_all_units
from bilinear_tc.train.fitting.fitter import make_transcoders
from bilinear_tc.train.fitting.mlp_weights import FUNCTIONS
from bilinear_tc.train.fitting.stack import Stack
from bilinear_tc.train.mlps import linear_maps
from bilinear_tc.train.recipe import Recipe, option, parse_settings
from bilinear_tc.train.text.batches import TokenBatch

CPU = torch.device("cpu")
VOCABULARY = 2048  # the quickstart tokenizer's
# Sizes by the names that configurations have for them; each takes those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("attention_hidden_size", "dim_model", "moe_intermediate_size", "lru_width"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff"), 32),
    **dict.fromkeys(("n_inner", "d_inner", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "rotary_dim"), 4),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim", "head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **{"vocab_size": VOCABULARY, "initializer_range": 0.25, "is_decoder": True},  # pre-activations vary by about one
    **{"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "n_group": 1, "topk_group": 1},
}
NAMED = """
    gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gptj codegen openai-gpt ctrl falcon bloom mpt phi persimmon starcoder2
    nemotron arcee apertus nanochat jais2 llama mistral ministral qwen2 qwen3 gemma gemma2 gemma3_text vaultgemma cohere
    cohere2 olmo olmo2 olmo3 granite stablelm smollm3 helium ernie4_5 exaone4 seed_oss hunyuan_v1_dense diffllama doge
    minicpm3 recurrent_gemma moshi modernbert-decoder phi3 glm glm4 xglm opt biogpt bart mbart pegasus
    bigbird_pegasus marian blenderbot plbart mvp trocr whisper bert roberta roberta-prelayernorm electra camembert
    xlm-roberta bert-generation rembert roformer megatron-bert bitnet mixtral qwen2_moe qwen3_moe olmoe jamba
    deepseek_v2 gpt_oss llama4_text rwkv mamba cpmant
"""
# By name the settings of the configuration and, if they are not those of the name, its type, and the recipe's fields.
DECODERS: dict[str, dict[str, Any]] = {name: {} for name in NAMED.split()} | {
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "opt (norm after)": {"model_type": "opt", "do_layer_norm_before": False},
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "deepseek_v3": {"head_dim": 4, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8},
    "nemotron_h": {
        **{"mamba_num_heads": 2, "mamba_head_dim": 8, "ssm_state_size": 4, "chunk_size": 8, "n_groups": 1},
        "recipe": {"layers": "3"},
    },
    "granitemoe": {"recipe": {"mlp_path": "model.layers.{}.block_sparse_moe"}},
    "xlm": {"causal": True, "recipe": {"mlp_path": "transformer.ffns.{}"}},
    "xlnet": {"recipe": {"mlp_path": "transformer.layer.{}.ff.layer_1:layer_2"}},
}


def known() -> list[str]:
    """The decoders that the installed transformers has."""
    return [name for name, settings in DECODERS.items() if settings.get("model_type", name) in CONFIG_MAPPING]


def tiny(name: str) -> PreTrainedModel:
    """A small random decoder."""
    settings = {key: value for key, value in DECODERS[name].items() if key not in ("model_type", "recipe")}
    kind = CONFIG_MAPPING[DECODERS[name].get("model_type", name)]
    knows = {*kind().to_dict(), *kind.attribute_map}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        kind(**{key: value for key, value in SIZES.items() if key in knows} | settings)
    )


def recipe_of(name: str, **settings: Any) -> Recipe:
    """A recipe of few tokens, with more hidden units than the MLP has."""
    sizes = {"hidden_multiplier": 8.0, "seq_len": 16, "batch_size": 8, "init_tokens": 1024, "eval_tokens": 512}
    return Recipe(**sizes | {"max_steps": 2} | DECODERS[name].get("recipe", {}) | settings)


def open_base(name: str) -> Base:
    recipe = recipe_of(name)
    return Base(tiny(name), None, recipe.layer_indices(), recipe.mlp_path)  # type: ignore[arg-type] # no text is read


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(seed))


def closed_form_error(base: Base, recipe: Recipe) -> float:
    """The largest difference of the closed form's units from `reference`, over the largest output.

    UserError if there is no closed form.
    """
    activations = Activations(base, tokens().numel(), device=CPU, dtype=torch.float32)
    activations.fill(TokenBatch(tokens()), 8)
    stack = Stack(make_transcoders(recipe, base, CPU), dtype=torch.float32)
    set_all_units(stack, base, [activations])
    errors = []
    for index, layer in enumerate(base.layers):
        expected = reference(base, layer)
        with torch.no_grad():
            got = stack.transcoders[index](activations.x[index]).double()
        errors.append(((got - expected).abs().max() / expected.abs().max()).item())
    return max(errors)


@torch.no_grad()
def reference(base: Base, layer: int) -> Tensor:
    """What the closed form must give on `tokens` [rows, n_outputs]: each neuron's value, as it enters the MLP's last
    map, is replaced by its least-squares fit, in float64."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    maps = linear_maps(base.parts(layer))

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[module] = rows(inputs[0]), rows(output)

    def rows(t: Tensor) -> Tensor:
        return t.reshape(-1, t.shape[-1]).double()

    handles = [module.register_forward_hook(note) for module in maps]
    base.model(tokens(), use_cache=False)
    for handle in handles:
        handle.remove()
    last = maps[-1]
    hidden, output = seen[last]
    first = torch.cat([seen[module][1] for module in maps[:-1]], 1)
    z, *ups = first.split(hidden.shape[1], 1)
    if ups:  # the order in which one of the usual activations of one, times the other, is what enters the last map
        orders = [(gate, up) for gate, up in ((z, ups[0]), (ups[0], z))]
        z, up = min(orders, key=lambda order: min((ACT2FN[f](order[0]) * order[1] - hidden).norm() for f in FUNCTIONS))
        terms = torch.stack([up, up * z], -1)
    else:
        terms = torch.stack([torch.ones_like(z), z, z**2], -1)
    terms = terms.transpose(0, 1)  # [neurons, rows, terms]
    fitted = (terms @ torch.linalg.lstsq(terms, hidden.T.unsqueeze(-1)).solution).squeeze(-1).T
    weight = last.weight.double() if isinstance(last, nn.Linear) else last.weight.double().T
    return output + (fitted - hidden) @ weight.T


@contextmanager
def by_hand(base: Base, layer: int, replace: Callable[[Tensor], Tensor] | None = None) -> Iterator[list[Tensor]]:
    """Hooks at an MLP's ends, which note what enters and leaves, and may replace the latter."""
    seen: list[Tensor] = []

    def entering(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).clone())

    def leaving(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        seen.append(output.clone())
        return None if replace is None else replace(seen[0])

    enter, leave = base.site(layer)
    handles = [enter.register_forward_pre_hook(entering, with_kwargs=True), leave.register_forward_hook(leaving)]
    yield seen
    for handle in handles:
        handle.remove()


@torch.no_grad()
def is_exact(base: Base, transcoder: BilinearTC) -> bool:
    """Whether what is captured and spliced is to the bit what hooks set by hand see and do."""
    layer = transcoder.config.layer_index

    def logits() -> Tensor:
        return base.model(tokens(), use_cache=False).logits

    with by_hand(base, layer) as seen:
        before = logits()
    x, y = (t.reshape(*tokens().shape, -1) for t in seen)
    captured = [base.activations(tokens())[layer], transcoder.capture(base.model, input_ids=tokens(), use_cache=False)]
    with transcoder.attached(base.model):
        spliced = logits()
    with by_hand(base, layer, transcoder):
        expected = logits()
    alike = [torch.equal(a, b) for ends in captured for a, b in zip(ends, (x, y), strict=True)]
    return all(alike) and torch.equal(spliced, expected) and torch.equal(logits(), before)


def run_commands(name: str, start: str, folder: Path) -> str | None:
    """Fits, measures and builds the card, as commands; the sentence of the first that fails."""
    base, run = folder / "base", folder / "run"
    tiny(name).save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(REPOSITORY_ROOT / "train" / "quickstart" / file, base / file)
    recipe = recipe_of(name, init=start).to_dict()
    given = ["seq_len", "batch_size", "hidden_multiplier", "init_tokens", "eval_tokens", "max_steps", "init"]
    given += ["layers", "mlp_path", "jvp"]
    flags = [f"--{key}={recipe[key]}" for key in given if recipe[key] is not None]
    for script, *arguments in (
        ("train/fit.py", "--recipe=quickstart", f"--base={base}", f"--output_dir={run}", "--shuffle_buffer=0", *flags),
        ("train/evaluate.py", f"--transcoders={run}"),
        ("upload/publish.py", str(run), "--repo_id=tester/decoder", "--base_model=tester/base", "--dry_run"),
    ):
        said, given_here = io.StringIO(), sys.argv
        sys.argv = [script, *arguments]
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(said):
                runpy.run_path(str(REPOSITORY_ROOT / script), run_name="__main__")
        except SystemExit:
            return f"{script}: {said.getvalue().strip().splitlines()[-1]}"
        finally:
            sys.argv = given_here
    return None if (run / "repository" / "README.md").is_file() else "no card"


@dataclass
class Finding:
    """What was found of a decoder."""

    site: str
    error: float | None
    why_no_closed_form: str
    exact: bool
    failure: str | None


def examine(name: str, *, commands: bool = True) -> Finding:
    """UserError if the decoder is refused."""
    base = open_base(name)
    first = base.layers[0]
    error, reason = None, ""
    try:
        error = closed_form_error(base, recipe_of(name))
    except UserError as refusal:
        reason = str(refusal)
    exact = all(is_exact(base, transcoder) for transcoder in make_transcoders(recipe_of(name), base, CPU))
    with TemporaryDirectory() as folder:
        failure = run_commands(name, "random" if reason else "mlp", Path(folder)) if commands else None
    site = base.mlp_path(first).partition(f".{first}.")[2] or f"{base.mlp_path(first).rpartition('.')[0]}.{{}}"
    return Finding(site, error, reason, exact, failure)


@dataclass
class StudySettings:
    """What to look at."""

    only: str | None = option(None, "Decoders by name, with commas between. Default: all.")


def main() -> None:
    only = parse_settings(StudySettings).only
    names = only.split(",") if only else known()
    if unknown := {*names} - {*known()}:
        raise UserError(f"--only must name decoders among {', '.join(known())}, got {', '.join(sorted(unknown))}")
    transformers.logging.set_verbosity_error()
    rows: dict[tuple[str, str, str, str], list[tuple[str, float]]] = defaultdict(list)
    refused = []
    for name in names:
        try:
            found = examine(name)
        except UserError as error:
            refused.append(f"| {name} | {str(error).partition(';')[0]} |")
            continue
        start = "closed form" if found.error is not None else "noise"
        exact, done = "exact" if found.exact else "differ", found.failure or "done"
        rows[f"`{found.site}`", start, exact, done].append((name, found.error or 0.0))
    print("| MLP in a layer | decoders | start, largest difference | captured, spliced | fit, evaluate, card |")
    print("| --- | --- | --- | --- | --- |")
    for (site, start, exact, done), alike in sorted(rows.items(), key=lambda row: row[0][1]):
        difference = f", {max(error for _, error in alike):.0e}" if start == "closed form" else ""
        print(f"| {site} | {', '.join(name for name, _ in alike)} | {start}{difference} | {exact} | {done} |")
    print("\n| refused | why |\n| --- | --- |", *refused, sep="\n")


if __name__ == "__main__":
    command_line(main)
