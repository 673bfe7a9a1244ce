"""The CUDA path without a GPU: whole steps on tensors that have a CUDA device and no values, and what they wait for.

A torch that is built for the CPU alone lacks what switches between CUDA's devices; a few lines of C++ give it one that
does nothing. Autograd's backward passes need CUDA itself: they are left out, and so are the compiled functions.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import shutil
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from plans import CONFIGS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.cpp_extension import include_paths, library_paths
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from bilinear_tc.train.base import Base
from bilinear_tc.train.fitting import fitter, joint
from bilinear_tc.train.fitting.fitter import Fitter
from bilinear_tc.train.fitting.joint import JointFitter
from bilinear_tc.train.recipe import named_recipe
from bilinear_tc.train.text.batches import TokenBatch

CUDA = torch.device("cuda")
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>) }
"""
TINY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}

aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Notes, by the function of the package that asks, what makes the host wait for the device, and every copy between
    the two. On the host tensors are real.

    Args:
        answers: what the device's numbers are, by the function that asks; elsewhere yes, 1.0 and 0.

    Attributes:
        seen: how often "what module:function" came up: a "value" or a "size" that the host asked for, "to host", "to
            device". A list of values is one.
        products: the types of matrix products.
    """

    def __init__(self, answers: dict[str, float]) -> None:
        super().__init__()
        self.answers = answers
        self.seen: Counter[str] = Counter()
        self.products: set[str] = set()
        self._list: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type == "cpu" and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if "generator" in kwargs:
            kwargs["generator"] = None
        packet = func.overloadpacket
        if packet in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm):
            self.products.add(f"{packet.__name__} {str(tensors[-1].dtype)[6:]}")
        if packet is aten.copy_ or (packet is aten._to_copy and "device" in kwargs):
            start, end = (tensors[1].device, tensors[0].device) if packet is aten.copy_ else (tensors[0].device, device)
            if start.type != end.type:
                self.note("to device" if end.type == "cuda" else "to host")
        elif packet is aten._local_scalar_dense:
            kind = tensors[0].dtype
            default = True if kind == torch.bool else 1.0 if kind.is_floating_point else 0
            return self.answers.get(self.note("value"), default)
        elif torch.Tag.data_dependent_output in func.tags:
            self.note("value")
            return False
        elif packet is aten.nonzero:  # as if every row were kept, here and below
            self.note("size")
            return torch.empty(args[0].numel(), args[0].ndim, dtype=torch.long, device=CUDA)
        elif packet is aten.index and args[1][0].dtype == torch.bool:
            self.note("size")
            return args[0].flatten(0, args[1][0].ndim - 1).clone()
        elif torch.Tag.dynamic_output_shape in func.tags and packet is not aten.index:
            self.note("size")
        return func(*args, **kwargs)

    def note(self, what: str) -> str:
        frame, a_list = sys._getframe(2), None
        while frame.f_back and not frame.f_globals["__name__"].startswith("bilinear_tc."):
            a_list = frame if frame.f_code.co_name == "tolist" else a_list
            frame = frame.f_back
        place = f"{frame.f_globals['__name__'].rpartition('.')[2]}:{frame.f_code.co_qualname}"
        if a_list is None or a_list is not self._list:
            self.seen[f"{what} {place}"] += 1
        self._list = a_list
        return place


# What is said where a value decides: all is finite, and no base is told of later tokens.
ANSWERS = {"moments:check_finite": 1, "mlps:map_of": False}


def run_steps() -> None:
    """Prints what the first step, a later one, one on padded text and one of the joint finish wait for.

    Its command line: a base's settings, and the library that stands in for CUDA's switches, if torch has none.
    """
    config, library = sys.argv[1:]
    if library:
        ctypes.CDLL(library)
    generator = torch.Generator
    torch.Generator = lambda _device: generator()  # type: ignore[assignment,misc]
    fitter.free_memory = joint.free_memory = lambda _device: 80 * 10**9
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_: True
    torch.autograd.grad = lambda _of, by, *_: [torch.zeros_like(by)]
    Tensor.backward = lambda *_: None  # type: ignore[method-assign,assignment]

    recipe = dataclasses.replace(named_recipe("pythia-410m"), micro_batch_size=256, compile=False)
    joint_recipe = dataclasses.replace(recipe, finish="joint", finish_steps=10)
    ids = torch.zeros(recipe.batch_size, recipe.seq_len, dtype=torch.long)
    steps: dict[str, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), Waits(ANSWERS) as waits:
        with CUDA:
            model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**json.loads(config)), dtype=torch.bfloat16)
        base = Base(model, None)
        batch = TokenBatch(ids).to(CUDA)
        padded = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool)).to(CUDA)
        fit = Fitter(recipe, base, CUDA)
        wide = base.n_inputs > 16  # where a joint step, of thousands of pieces, takes minutes without values
        finish = None if wide else JointFitter(joint_recipe, fit.stack.transcoders, base, CUDA)
        waits.products.clear()
        for name, of, given in (
            ("first", fit, batch),
            ("later", fit, batch),
            ("padded", fit, padded),
            ("joint, first", finish, batch),
            ("joint, later", finish, batch),
        ):
            if of is None:
                continue
            waits.seen.clear()
            of.step(given, len(steps))
            steps[name] = dict(waits.seen)
            if name == "padded":
                steps["products"] = sorted(waits.products)
    print(json.dumps(steps))


@pytest.fixture(scope="session")
def switches(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library of C++ that this torch needs; none if it is built for CUDA."""
    if torch.version.cuda is not None:
        return ""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    source = tmp_path_factory.mktemp("switches") / "guard.cpp"
    source.write_text(GUARD)
    library = source.with_suffix(".so")
    places = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", *places, str(source), "-lc10", "-o", str(library)], check=True
    )
    return str(library)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "pythia-410m"])
def test_what_a_step_waits_for(fork_server, switches, name):
    config = {**CONFIGS["pythia-410m"], **(TINY if name == "tiny" else {})}
    ended = fork_server.start(run_steps, [json.dumps(config), switches]).wait()
    assert ended.returncode == 0, ended.stderr
    steps = json.loads(ended.stdout.splitlines()[-1])
    types = {"mm bfloat16", "addmm bfloat16", "bmm float16", "baddbmm float16"}  # of the fit; then the base's angles
    assert types < set(steps.pop("products")) <= types | {"bmm float32", "addmm float32"}  # and the reading of its MLPs
    reading = {"value mlp_weights:MLPWeights.read": 2 * config["num_hidden_layers"]}
    fit = {"value moments:check_finite": 1, "to host fitter:Fitter.step": 1}
    finish = {
        "value moments:check_finite": 1,
        "size joint:JointFitter._accumulate_divergence": 4,  # two a part: which rows are text
        "to host joint:JointFitter.step": 2,
        "value joint:JointFitter.step": 1,
        "to device joint:JointFitter._update": 1,  # of a number a layer
    }
    joint_steps = {"joint, first": finish | reading, "joint, later": finish} if name == "tiny" else {}
    # padded: a part of the batch, which rows are text
    assert steps == {
        "first": fit | reading,
        "later": fit,
        "padded": fit | {"size activations:Activations.fill": 2},
        **joint_steps,
    }
