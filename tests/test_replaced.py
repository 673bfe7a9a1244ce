"""A base whose MLPs are the transcoders: what it says, and its loading where this package is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bases import tiny_gpt2, tiny_llama, tiny_neox
from packaging.requirements import Requirement
from safetensors.torch import load_file
from test_decoders import falcon, qwen2_moe
from test_set import NEOX, PATHS, TOKENS, random_set, random_transcoder
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from bilinear_tc import BilinearTC, BilinearTCSet, replaced
from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.train.base import Base
from bilinear_tc.train.fitting.fitter import make_transcoders
from bilinear_tc.train.recipe import Recipe

LLAMA = PATHS[tiny_llama]
FAMILIES = [tiny_neox, tiny_llama, tiny_gpt2, falcon, qwen2_moe]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The code that comes with models is kept, and imported from, a folder of this file's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            patch.delitem(sys.modules, name)
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        patch.setattr(sys, "path", [modules, *sys.path])  # before the cache of other tests in this process
        yield
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]


def set_of(base: PreTrainedModel) -> BilinearTCSet:
    torch.manual_seed(1)
    made = make_transcoders(Recipe(init="random"), Base(base, tokenizer=None), torch.device("cpu"))
    for tc in made:
        tc.input_mean.normal_()
    return BilinearTCSet(made)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=TOKENS).logits


def attached_logits(base: PreTrainedModel, tcs: BilinearTCSet, layers: list[int] | None = None) -> Tensor:
    with tcs.attached(base, layers):
        return logits(base)


def generated(model: PreTrainedModel, **settings: Any) -> Tensor:
    mask = torch.ones_like(TOKENS)
    return model.generate(TOKENS, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=0, **settings)


def loaded(folder: Path, **settings: Any) -> PreTrainedModel:
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **settings
    )
    assert not any(told.values())
    return model


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_it_says_what_the_base_says_with_the_set_attached_and_loads_again(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = make().eval()
    tcs = set_of(base)
    alone, expected = logits(base), attached_logits(base, tcs)
    model = replaced(base, tcs)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(base), alone)
    assert not torch.allclose(alone, expected, atol=1e-3)
    with tcs.attached(base):
        continued = generated(base)
    assert torch.equal(generated(model), continued)
    assert torch.equal(generated(model, use_cache=False), continued)
    model.save_pretrained(tmp_path / "model")
    again = loaded(tmp_path / "model")
    assert torch.equal(logits(again), expected)
    assert torch.equal(generated(again), continued)
    again.save_pretrained(tmp_path / "again")  # by the class that came with it
    assert torch.equal(logits(loaded(tmp_path / "again")), expected)


@pytest.mark.parametrize("form", ["bilinear", "input_sum"])
@pytest.mark.parametrize("bias", [True, False])
def test_both_forms_with_and_without_biases_in_some_layers(form: str, bias: bool, tmp_path: Path) -> None:
    base = tiny_llama(num_key_value_heads=1)
    tcs = BilinearTCSet(random_transcoder(LLAMA, layer, form, bias) for layer in range(3))
    model = replaced(base, tcs, [2, 0])
    expected = attached_logits(base, tcs, [0, 2])
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    again = loaded(tmp_path)
    assert torch.equal(logits(again), expected)
    assert type(again.get_submodule(LLAMA.format(1))).__name__ == "LlamaMLP"
    assert again.get_submodule(LLAMA.format(2)).config.form == form


def test_what_only_readings_use_is_left_out_and_the_count_of_parameters_is_the_widths() -> None:
    base = tiny_neox()
    shape = {"layer_index": 1, "mlp_path": NEOX.format(1), "input_correlation": True, "input_norm": "layernorm"}
    tc = BilinearTC(BilinearTCConfig(16, 24, 16, **shape))
    model = replaced(base, BilinearTCSet([tc]))
    put = model.get_submodule(NEOX.format(1))
    assert {name for name, _ in put.named_buffers()} == {"input_mean", "input_std", "output_mean", "output_std"}
    assert {*dict(tc.named_buffers())} > {*dict(put.named_buffers())}
    mlp, own = 64 * 16 * 2 + 64 + 16, 24 * 16 * 3 + 24 * 2 + 16
    assert model.num_parameters() == base.num_parameters() - mlp + own


def test_it_shares_the_bases_memory_and_casting_it_leaves_the_base_alone() -> None:
    base, tcs = tiny_llama(), random_set(LLAMA)
    before, statistics = logits(base), tcs[1].input_mean.clone()
    model = replaced(base, tcs)
    for (_, ours), (_, theirs) in (
        (next(model.named_parameters()), next(base.named_parameters())),
        (("", model.get_submodule(LLAMA.format(1)).left.weight), ("", tcs[1].left.weight)),
    ):
        assert ours.data_ptr() == theirs.data_ptr()
        assert ours is not theirs
    model.bfloat16()
    assert torch.equal(logits(base), before)
    assert tcs[1].left.weight.dtype == torch.float32
    assert torch.equal(model.get_submodule(LLAMA.format(1)).input_mean, statistics)


@pytest.mark.parametrize("make", [tiny_neox, qwen2_moe], ids=lambda make: make.__name__)
def test_weights_have_the_names_that_the_bases_own_have_in_files(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    """Which differ from the modules' in transformers 5, and then go by the class."""
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = replaced(base, tcs := set_of(base), [1])
    model.save_pretrained(tmp_path / "model")
    names = [{*load_file(tmp_path / folder / "model.safetensors")} for folder in ("base", "model")]
    assert {name for name in names[0] ^ names[1] if f"{tcs[1].config.mlp_path}." not in name} == set()
    assert torch.equal(logits(loaded(tmp_path / "model")), attached_logits(base, tcs, [1]))


def test_tied_embeddings_and_generation_settings_stay(tmp_path: Path) -> None:
    base, tcs = tiny_llama(tie_word_embeddings=True), random_set(LLAMA)
    base.generation_config.max_new_tokens = 3
    model = replaced(base, tcs)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), attached_logits(base, tcs))
    assert again.generate(TOKENS[:1]).shape == (1, TOKENS.shape[1] + 3)


def test_in_half_precision_the_statistics_keep_theirs(tmp_path: Path) -> None:
    base, tcs = tiny_neox().bfloat16(), random_set()
    model = replaced(base, tcs)
    expected = attached_logits(base, tcs.bfloat16())
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    for again in (loaded(tmp_path, dtype="auto"), loaded(tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"})):
        assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
        assert again.get_submodule(NEOX.format(0)).input_mean.dtype == torch.float32
        assert torch.equal(logits(again), expected)
    wide = loaded(tmp_path, dtype=torch.float32)
    assert wide.get_submodule(NEOX.format(0)).left.weight.dtype == torch.float32


def test_layers_on_disk_run(tmp_path: Path) -> None:
    base, tcs = tiny_llama(), random_set(LLAMA)
    replaced(base, tcs).save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": place for layer, place in enumerate(("cpu", "disk", "cpu"))}
    if int(transformers.__version__.split(".")[0]) < 5:  # which leaves out what is no parameter there
        with pytest.raises(ValueError, match="on disk lose their buffers"):
            loaded(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded")
        return
    model = loaded(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded")
    assert model.get_submodule(LLAMA.format(1)).left.weight.is_meta
    assert torch.equal(logits(model), attached_logits(base, tcs))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")  # by its later name in transformers 5.24
def test_it_can_be_trained_with_checkpointing_and_another_attention() -> None:
    base, tcs = tiny_llama(), random_set(LLAMA)
    model = replaced(base, tcs).train()
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
        assert model.is_gradient_checkpointing == checkpointing
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        grads.append(model.get_submodule(LLAMA.format(0)).left.weight.grad.clone())
    torch.testing.assert_close(*grads)
    assert grads[0].abs().sum() > 0
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model.eval()), attached_logits(base, tcs), rtol=1e-4, atol=1e-5)


def test_code_of_the_family_alone_does_not_load_it(tmp_path: Path) -> None:
    """It would start with MLPs of random weights."""
    replaced(tiny_llama(), random_set(LLAMA)).save_pretrained(tmp_path)
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            auto.from_pretrained(tmp_path, trust_remote_code=False)


def named(base: PreTrainedModel, name: str) -> PreTrainedModel:
    base.name_or_path = name
    return base


def wide_set() -> BilinearTCSet:
    return BilinearTCSet([BilinearTC(BilinearTCConfig(8, 24, 16, layer_index=0, mlp_path=NEOX.format(0)))])


def set_for(name: str) -> BilinearTCSet:
    tcs = random_set()
    tcs[1].config.base_model = name
    return tcs


def opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
    )


@pytest.mark.parametrize(
    ("make", "tcs", "layers", "sentence"),
    [
        (tiny_neox, wide_set, None, "does not take one tensor of that width"),
        (tiny_neox, random_set, [1, 7], "This set has no layer 7"),
        (tiny_llama, random_set, None, "has no module of that name"),
        (lambda: tiny_neox(num_hidden_layers=2), random_set, None, "has no module of that name"),
        (lambda: named(tiny_neox(), "a/copy"), lambda: set_for("the/base"), None, "of the/base.* this base is a/copy"),
        (lambda: tiny_neox().gpt_neox, random_set, None, "must be a causal language model"),
        (lambda: torch.nn.Linear(2, 2), random_set, None, "must be a causal language model.* not Linear"),
        (opt, lambda: set_of(opt()), None, "only an MLP that is one module"),
        (lambda: tiny_neox().to("meta"), random_set, None, "must be in memory and not quantized"),
    ],
)
def test_what_does_not_belong_together_is_refused_with_a_sentence(
    make: Callable[[], Any], tcs: Callable[[], BilinearTCSet], layers: list[int] | None, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        replaced(make(), tcs(), layers)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_a_base_with_transcoders_attached_is_refused() -> None:
    """A copy of an MLP that they stand in for would go on saying what they do, until it is saved."""
    base, tcs = tiny_neox(), random_set()
    with tcs.attached(base, [1]), pytest.raises(ValueError, match="transcoders are attached: leave that context"):
        replaced(base, tcs, [0])
    assert torch.equal(logits(replaced(base, tcs, [0])), attached_logits(base, tcs, [0]))


def test_a_base_in_a_folder_may_be_a_copy(tmp_path: Path) -> None:
    assert replaced(named(tiny_neox(), str(tmp_path)), set_for("the/base")) is not None
    assert replaced(named(tiny_neox(), "the/base"), set_for("the/base")) is not None


def linked(*names: str, into: Path) -> Path:
    """A folder with these distributions, those that they need, and nothing else."""
    left, seen = [*names], set()
    while left:
        name = left.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # such as those of another platform
        if distribution.metadata["Name"] in seen:
            continue
        seen.add(distribution.metadata["Name"])
        for top in {file.parts[0] for file in distribution.files or [] if ".." not in file.parts}:
            if (there := Path(str(distribution.locate_file(top)))).exists() and not (into / top).exists():
                (into / top).symlink_to(there)
        needed = map(Requirement, distribution.requires or [])
        left += [need.name for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    return into


ELSEWHERE = """
import importlib.util, sys
for name in ("bilinear_tc", "accelerate", "datasets"):
    assert importlib.util.find_spec(name) is None, name
import torch
import transformers
from transformers import AutoModelForCausalLM

ids = torch.arange(24).reshape(2, 12)
how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        said = [model(input_ids=ids).logits, model.generate(ids, **how), type(model).__name__]
    torch.save(said, folder + "/said.pt")
"""


@pytest.mark.slow
def test_it_loads_where_there_are_only_torch_and_transformers(tmp_path: Path) -> None:
    bases = {tmp_path / make.__name__: (make(), random_set(PATHS[make])) for make in (tiny_neox, tiny_llama)}
    for folder, (base, tcs) in bases.items():
        replaced(base, tcs).save_pretrained(folder)
    (tmp_path / "site").mkdir()
    site = linked("torch", "transformers", into=tmp_path / "site")
    environment = {"PYTHONPATH": str(site), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment |= {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-c", ELSEWHERE, *map(str, bases)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for folder, (base, tcs) in bases.items():
        there, said, name = torch.load(folder / "said.pt")
        assert torch.equal(there, attached_logits(base, tcs))
        with tcs.attached(base):
            assert torch.equal(said, generated(base))
        assert name == f"BilinearTC{type(base).__name__}"
        assert json.loads((folder / "config.json").read_text())["auto_map"] == {
            "AutoConfig": f"modeling_bilinear_tc.BilinearTC{type(base.config).__name__}",
            "AutoModelForCausalLM": f"modeling_bilinear_tc.{name}",
        }
