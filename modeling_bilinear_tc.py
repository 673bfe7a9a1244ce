"""A bilinear transcoder: stands in for one MLP of a language model, with no element-wise non-linearity.

    x̂ = (x − input_mean) / input_std
    ŷ = head( left(x̂) ⊙ right(x̂) )
    y = ŷ · output_std + output_mean

Every output direction is therefore an exact quadratic form in the MLP's input, which `BilinearTC.quadratic_form`
reads from the weights. `BilinearTCSet` holds the transcoders of a base's layers. This file and
`configuration_bilinear_tc.py` need only torch and transformers, with the huggingface_hub that it needs itself.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import tqdm
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .configuration_bilinear_tc import BilinearTCConfig

STATISTICS = ("input_mean", "input_std", "output_mean", "output_std")


class QuadraticForm(NamedTuple):
    """`u·y = xᵀ Q x + b·x + c` for an output direction `u`; `...` are the direction's leading dimensions."""

    quadratic: Tensor  # Q [..., n_inputs, n_inputs], symmetric
    linear: Tensor  # b [..., n_inputs]
    constant: Tensor  # c [...]


class Spectrum(NamedTuple):
    """Eigen-decomposition of a symmetric Q, the eigenvalue of largest magnitude first."""

    eigenvalues: Tensor  # [..., n_inputs]
    eigenvectors: Tensor  # [..., n_inputs, n_inputs]; column k, [..., :, k], belongs to eigenvalue k


StandIn = Callable[[list[Tensor], Callable[[], Any], Callable[[], Any]], Any]


class Site(NamedTuple):
    """Where an MLP is in a base: its input enters one module, and its output leaves one, mostly the same.

    A site's path is the module's, `model.layers.3.mlp`, or two with a colon between, `model.layers.3.fc1:fc2`: the
    second is looked up from the parents of the first, the nearest before the others.
    """

    enter: nn.Module
    leave: nn.Module

    @contextmanager
    def replaced(self, stand_in: StandIn) -> Iterator[None]:
        """While the context lasts, `stand_in(entered, true, before)` says what leaves the MLP: it is given the tensors
        that entered, and functions that give what the MLP itself says, and what would leave it but for this context."""
        entered: list[Tensor] = []
        enter_before, leave_before = map(_forward, self)
        true_leave = _true_forward(self.leave)
        spliced = hasattr(leave_before, "true_forward")

        def enter(*args: Any, **kwargs: Any) -> Any:
            entered[:] = tensors_in(args, kwargs)
            return enter_before(*args, **kwargs)

        def leave(*args: Any, **kwargs: Any) -> Any:
            tensors = tensors_in(args, kwargs) if self.leave is self.enter else entered.copy()
            entered.clear()
            true = partial(true_leave, *args, **kwargs)
            return stand_in(tensors, true, partial(leave_before, *args, **kwargs) if spliced else true)

        with ExitStack() as stack:
            if self.leave is not self.enter:
                stack.enter_context(_forward_replaced(self.enter, enter))
            stack.enter_context(_forward_replaced(self.leave, leave))
            yield


class BilinearTC(PreTrainedModel):
    """Bilinear transcoder of one MLP: raw MLP inputs [..., n_inputs] to raw MLP outputs [..., n_outputs].

    In form `bilinear` the parameters are the linear maps `left`, `right` (n_inputs → n_hidden) and `head`
    (n_hidden → n_outputs). In form `input_sum` they are `W_right` (n_inputs → n_hidden, no bias) and `W_left`
    (n_hidden → n_outputs). The z-score statistics `input_mean`, `input_std` [n_inputs] and `output_mean`,
    `output_std` [n_outputs] are persistent buffers, 0 and 1 in a new model. They stay in float32 (or wider)
    when the model is cast to half precision: rounded to bfloat16, a mean far from 0 would shift every input.

    Example:
        >>> base = AutoModelForCausalLM.from_pretrained("EleutherAI/pythia-410m")
        >>> tc = AutoModel.from_pretrained(repo, subfolder="layer_3", trust_remote_code=True)
        >>> x, y = tc.capture(base, input_ids=input_ids)
        >>> unexplained = (y - tc(x)).square().sum() / (y - y.mean((0, 1))).square().sum()
        >>> with tc.attached(base):
        ...     logits = base(input_ids=input_ids).logits
    """

    config_class = BilinearTCConfig
    main_input_name = "x"
    _no_split_modules = ["BilinearTC"]  # noqa: RUF012  (so declared by the base class)
    # transformers 4 would otherwise take the dtype of the first tensor, a statistic, for that of all.
    _supports_param_buffer_assignment = False
    # There is no attention, so that what a caller asks of it is accepted (transformers 4.51 looks at these names).
    _supports_sdpa = _supports_flex_attn = _supports_flash_attn_2 = True

    config: BilinearTCConfig
    left: nn.Linear
    right: nn.Linear
    head: nn.Linear
    W_left: nn.Linear
    W_right: nn.Linear
    input_mean: Tensor
    input_std: Tensor
    output_mean: Tensor
    output_std: Tensor

    def __init__(self, config: BilinearTCConfig) -> None:
        super().__init__(config)
        for name in ("n_inputs", "n_hidden", "n_outputs"):
            if getattr(config, name) is None:
                raise ValueError(f"A BilinearTC cannot be built without {name}: set it in the BilinearTCConfig.")
        for name, (inputs, outputs, bias) in config.maps.items():
            setattr(self, name, nn.Linear(inputs, outputs, bias=bias))
        dtype = _at_least_float32(torch.get_default_dtype())
        self.register_buffer("input_mean", torch.zeros(config.n_inputs, dtype=dtype))
        self.register_buffer("input_std", torch.ones(config.n_inputs, dtype=dtype))
        self.register_buffer("output_mean", torch.zeros(config.n_outputs, dtype=dtype))
        self.register_buffer("output_std", torch.ones(config.n_outputs, dtype=dtype))
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        """Map MLP inputs to MLP outputs.

        Args:
            x: raw MLP inputs [..., n_inputs] of any floating-point dtype. The z-scores are computed in float32
                or wider, the products in the dtype of the model's weights. Where these are quantized, that is the
                dtype of the last map's bias, or of x without one.

        Returns:
            Raw MLP outputs [..., n_outputs], in the dtype of the products.

        Raises:
            ValueError: x is not a floating-point tensor whose last dimension is n_inputs.
        """
        return self._output(self.units(x))

    def normalized_forward(self, x: Tensor) -> Tensor:
        """Map z-scored inputs x̂ [..., n_inputs] to z-scored outputs ŷ [..., n_outputs]; this is what a fit trains.

        Form `input_sum` is the published formula `W_left @ (x ⊙ (W_right @ x)) + bias` with the product read as an
        outer product summed over the input axis: Σᵢ xᵢ · (W_right x), computed without the outer product.
        """
        return self._last_map(self._products(x))

    def units(self, x: Tensor) -> Tensor:
        """The hidden products left(x̂) ⊙ right(x̂) of raw MLP inputs; in form `input_sum` (Σᵢ x̂ᵢ) · W_right(x̂).

        They are in the units of the z-scores, in which the last map's columns are too: unit k adds
        `units[..., k] · head.weight[:, k]` to ŷ, and that times `output_std` to y. (`folded().units(x)` has products of
        raw inputs, and columns in raw outputs.)

        Args:
            x: raw MLP inputs [..., n_inputs], as for `forward`.

        Returns:
            [..., n_hidden], in the dtype of the products.

        Raises:
            ValueError: x is not a floating-point tensor whose last dimension is n_inputs.
        """
        n_inputs = self.input_mean.shape[0]
        if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] != n_inputs:
            raise ValueError(
                f"A BilinearTC takes floating-point MLP inputs of shape [..., {n_inputs}], "
                f"not {x.dtype} of shape {list(x.shape)}."
            )
        dtype = self._product_dtype(x)
        return self._products(((_widened(x) - self.input_mean) / self.input_std).to(dtype))

    def _product_dtype(self, x: Tensor) -> torch.dtype:
        return next((p.dtype for p in self._last_map.parameters() if not _is_quantized(p)), x.dtype)

    def _products(self, x: Tensor) -> Tensor:
        if self.config.form == "bilinear":
            return self.left(x) * self.right(x)
        return x.sum(-1, keepdim=True) * self.W_right(x)

    def _output(self, units: Tensor) -> Tensor:
        y = _widened(self._last_map(units)) * self.output_std + self.output_mean
        return y.to(self._product_dtype(units))

    def capture(self, base: Any, *args: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Run the base up to this layer's MLP, and return what enters and leaves it.

        Inside `attached` the input is the one that the base as spliced produces, and the output is still the true
        MLP's on it.

        Args:
            base: the language model, with its language-model head or without; an nnsight `LanguageModel` or a
                TransformerLens `TransformerBridge` of it does too.
            inputs: arguments of the base's forward pass, such as `input_ids` [batch, seq]. Those of a bridge go to the
                model inside it, unless the first is given by position, as in `capture(bridge, "text")`.

        Returns:
            The MLP's input [batch, seq, n_inputs] and its output [batch, seq, n_outputs], without gradients.

        Raises:
            ValueError: the base does not have this transcoder's MLP, or it takes or returns something else.
            RuntimeError: the forward pass never came to that MLP.
        """
        return _capture([self], base, args, inputs)[0]

    @contextmanager
    def attached(
        self,
        base: Any,
        *,
        scale: Mapping[int, float | Tensor] | None = None,
        add: Mapping[int, float | Tensor] | None = None,
        error_term: bool | Tensor = False,
    ) -> Iterator[Any]:
        """While the context lasts, the base runs with this transcoder in place of its MLP, in `generate` too.

        The base's modules, parameters and hooks stay as they are: only the MLP's `forward` is replaced (of an MLP that
        is no module, those of its two ends), and put back on exit, also after an exception. The transcoder computes on
        its own device and in its own dtype; its output goes to the device and dtype of the MLP's input. Gradients flow
        through it. Contexts may be nested: of those at one MLP, the innermost counts alone.

        Args:
            base: the language model, with its language-model head or without; an nnsight `LanguageModel` or a
                TransformerLens `TransformerBridge` of it does too, and its traces and hooks then see the transcoder's
                output as the MLP's.
            scale: what hidden units (see `units`) are multiplied by: 0.0 switches one off.
            add: what is added to hidden units after that, a number or a tensor that broadcasts to [batch, seq].
            error_term: True adds the transcoder's error, true output minus its own without edits, taken in the same
                pass and without gradients. If nothing is edited, the base's outputs stay as they are, to the bit;
                gradients go through the transcoder, and so does an edit of its units. But layers that come after an
                edit, with error terms too, answer it as the true MLPs would. If their transcoders are to answer it,
                give the errors of the pass without the edit: `y - tc(x)` of a `capture` of the same tokens, a tensor
                [batch, seq, n_outputs].

        Yields:
            The base.

        Raises:
            ValueError: the base does not have this transcoder's MLP, its widths differ, or it takes or returns more
                than one tensor; an edit names a unit that does not exist; the error is of another shape.
        """
        scale, add = scale or {}, add or {}
        for unit in {*scale, *add}:
            if unit not in range(self.config.n_hidden):
                raise ValueError(f"The hidden units are 0 to {self.config.n_hidden - 1}, but an edit names {unit!r}.")
        site = self._find_site(base)
        self._check_replaceable(site, _torch_module(base))

        def stand_in(entered: list[Tensor], true: Callable[[], Any], _before: Callable[[], Any]) -> Tensor:
            x = self._input(entered)
            own_x = x.to(self.input_mean.device)
            y = (self._output(_edited(self.units(own_x), scale, add)) if scale or add else self(own_x)).to(x)
            if error_term is False:
                return y
            if isinstance(error_term, Tensor):
                if error_term.numel() != y.numel():
                    raise ValueError(
                        f"error_term has shape {list(error_term.shape)}, but the MLP's output {list(y.shape)}."
                    )
                return y + error_term.detach().to(y).reshape(y.shape)
            with torch.no_grad():
                true_y = true()
                plain = self(own_x).to(x) if scale or add else y
            return true_y + (y - plain.detach())  # in this order it is true_y to the bit where nothing is edited

        with site.replaced(stand_in):
            yield base

    @torch.no_grad()
    def folded(self) -> BilinearTC:
        """The same map as a transcoder of form `bilinear` with the z-scores folded into its weights and biases.

        Its statistics are 0 and 1, so its weights act on raw MLP inputs and outputs. It has biases, and is at least
        in float32. Folded means that are far larger than the standard deviations cost digits: fold a model in
        float64 if that matters.
        """
        config = copy.deepcopy(self.config)
        config.form, config.bias = "bilinear", True
        with torch.device("meta"):
            folded = BilinearTC(config)
        dtype = _at_least_float32(self._last_map.weight.dtype)
        raw = self._raw_weights()
        state = {name: tensor.to(self.input_mean.device, dtype).contiguous() for name, tensor in raw.items()}
        for name in STATISTICS:
            fill = torch.zeros_like if name.endswith("mean") else torch.ones_like
            state[name] = fill(getattr(self, name), dtype=dtype)
        folded.load_state_dict(state, assign=True)
        return folded.train(self.training)

    @torch.no_grad()
    def quadratic_form(self, direction: Tensor) -> QuadraticForm:
        """The exact quadratic form that one output direction is in the raw MLP input.

        With left(x) = L x + l, right(x) = R x + r, head(h) = H h + η after folding, and g = Hᵀu:
        Q = ½ (Lᵀ diag(g) R + Rᵀ diag(g) L), b = Lᵀ(g ⊙ r) + Rᵀ(g ⊙ l), c = g·(l ⊙ r) + u·η.

        Args:
            direction: u [..., n_outputs].

        Returns:
            `QuadraticForm(Q, b, c)` with u·y = xᵀQx + b·x + c, computed in float64 and returned in the dtype of the
            weights, or float32 if that is wider.

        Raises:
            ValueError: the direction's last dimension is not n_outputs, or the weights are quantized.
        """
        dtype = _at_least_float32(self._last_map.weight.dtype)
        return QuadraticForm(*(part.to(self.input_mean.device, dtype) for part in self._quadratic_form(direction)))

    @torch.no_grad()
    def spectrum(self, direction: Tensor) -> Spectrum:
        """Eigenvalues and eigenvectors of `quadratic_form(direction)`'s Q, by magnitude, the largest first.

        Args:
            direction: u [..., n_outputs].

        Returns:
            `Spectrum(eigenvalues [..., n_inputs], eigenvectors [..., n_inputs, n_inputs])`, orthonormal columns.

        Raises:
            ValueError: the direction's last dimension is not n_outputs, or the weights are quantized.
        """
        values, vectors = torch.linalg.eigh(self._quadratic_form(direction).quadratic)
        order = values.abs().argsort(dim=-1, descending=True, stable=True)
        values = values.gather(-1, order)
        vectors = vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors))
        dtype = _at_least_float32(self._last_map.weight.dtype)
        device = self.input_mean.device
        return Spectrum(values.to(device, dtype), vectors.to(device, dtype))

    @property
    def _last_map(self) -> nn.Linear:
        return getattr(self, self.config.last_map)

    def _raw_weights(self) -> dict[str, Tensor]:
        """Weights and biases of `folded`, named as its parameters, in float64."""
        for name, parameter in self.named_parameters():
            if _is_quantized(parameter):
                raise ValueError(
                    f"Quadratic forms are read from whole weights, but {name} is quantized ({parameter.dtype}): "
                    "load the transcoder without a quantization_config."
                )
        wide = {name: _float64(tensor) for name, tensor in self.state_dict().items()}
        if self.config.form == "input_sum":
            wide["left.weight"] = torch.ones_like(wide["W_right.weight"])
            wide["right.weight"] = wide["W_right.weight"]
            wide["head.weight"] = wide["W_left.weight"]
            if self.config.bias:
                wide["head.bias"] = wide["W_left.bias"]
        raw = {}
        for name in ("left", "right"):
            raw[f"{name}.weight"] = wide[f"{name}.weight"] / wide["input_std"]
            raw[f"{name}.bias"] = wide.get(f"{name}.bias", 0) - raw[f"{name}.weight"] @ wide["input_mean"]
        raw["head.weight"] = wide["head.weight"] * wide["output_std"].unsqueeze(-1)
        raw["head.bias"] = wide.get("head.bias", 0) * wide["output_std"] + wide["output_mean"]
        return raw

    def _quadratic_form(self, direction: Tensor) -> QuadraticForm:
        n_outputs = self.config.n_outputs
        if direction.ndim == 0 or direction.shape[-1] != n_outputs:
            raise ValueError(f"An output direction has shape [..., {n_outputs}], not {list(direction.shape)} as given.")
        raw = self._raw_weights()
        left, right, left_bias, right_bias = (
            raw[name] for name in ("left.weight", "right.weight", "left.bias", "right.bias")
        )
        u = _float64(direction).to(left.device)
        g = u @ raw["head.weight"]  # [..., n_hidden]
        half = (left.T * g.unsqueeze(-2)) @ right  # [..., n_inputs, n_inputs]
        return QuadraticForm(
            quadratic=(half + half.mT) / 2,
            linear=(g * right_bias) @ left + (g * left_bias) @ right,
            constant=g @ (left_bias * right_bias) + u @ raw["head.bias"],
        )

    def _find_site(self, base: Any) -> Site:
        """This transcoder's MLP in a causal language model, in the inner model of one, or in a wrapper (torch.compile,
        peft, nnsight, TransformerLens) of either."""
        path = self.config.mlp_path
        if path is None:
            raise ValueError(
                "This transcoder does not say which MLP it stands in for: set tc.config.mlp_path, "
                "e.g. 'gpt_neox.layers.3.mlp'."
            )
        base = _torch_module(base)
        # A TransformerLens bridge puts a module of its own around each of the base's.
        modules = {name.replace("._original_component", ""): module for name, module in base.named_modules()}
        inner_path = path.removeprefix(f"{getattr(base, 'base_model_prefix', '')}.")
        names = site_names(modules, path) or site_names(modules, inner_path)
        if names is None:
            raise ValueError(f"{self._belongs()} this base ({type(base).__name__}) has no module of that name.")
        return Site(*(modules[name] for name in names))

    def _belongs(self) -> str:
        home = f" of {self.config.base_model}" if self.config.base_model else ""
        return (
            f"This transcoder stands in for {self.config.mlp_path}{home}, "
            f"from width {self.config.n_inputs} to {self.config.n_outputs}, but"
        )

    def _check_replaceable(self, site: Site, base: nn.Module) -> None:
        """Try the true MLP (of a pair, its last map on its first's output) on one row of zeros: no reading of its
        weights could tell as surely what it takes and returns."""
        weights = [*site.enter.parameters(), *base.parameters()]
        device = torch.device("cpu") if weights[0].is_meta else weights[0].device  # an offloaded MLP's hook moves it
        dtype = next(w.dtype for w in weights if w.is_floating_point() and w.dtype.itemsize > 1)  # not quantized
        y: Any = torch.zeros(1, 1, self.config.n_inputs, dtype=dtype, device=device)
        generators = [device] if device.type == "cuda" else []
        try:
            with torch.no_grad(), torch.random.fork_rng(generators):
                for module in dict.fromkeys(site):
                    with _hooks_silenced(module):
                        y = _true_forward(module)(y)
        except torch.cuda.OutOfMemoryError:  # a RuntimeError that tells nothing about widths
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            hidden_size = getattr(getattr(base, "config", None), "hidden_size", "unknown")
            raise ValueError(
                f"{self._belongs()} in this base (hidden size {hidden_size}) it does not take one tensor of that width."
            ) from error
        self._check_mlp_output(y)
        if y.shape[-1] != self.config.n_outputs:
            raise ValueError(f"{self._belongs()} in this base it returns width {y.shape[-1]}.")

    def _check_mlp_output(self, y: Any) -> None:
        if not isinstance(y, Tensor):
            raise ValueError(f"{self._belongs()} in this base it returns a {type(y).__name__}, not one tensor.")

    def _input(self, entered: list[Tensor]) -> Tensor:
        if len(entered) != 1:
            raise ValueError(f"{self._belongs()} in this base it takes {len(entered)} tensors, not one.")
        return entered[0]

    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initialization of a Linear, uniform in ±1/√fan_in, and identity statistics; what a checkpoint
        has loaded already is left alone."""
        if isinstance(module, nn.Linear):
            if _is_missing(module.weight):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None and _is_missing(module.bias):
                bound = 1 / math.sqrt(module.in_features)
                nn.init.uniform_(module.bias, -bound, bound)
        elif module is self:
            for name in STATISTICS:
                if _is_missing(getattr(self, name)):
                    nn.init.constant_(getattr(self, name), 0.0 if name.endswith("mean") else 1.0)

    def _check_and_adjust_attn_implementation(self, *_: Any, **__: Any) -> str:
        return "eager"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BilinearTC:
        """Every cast and move of a module comes through here: the statistics move, but are not narrowed."""
        before = {name: getattr(self, name) for name in STATISTICS}
        super()._apply(fn, recurse)
        for name, statistic in before.items():
            device, dtype = getattr(self, name).device, getattr(self, name).dtype
            if dtype != _at_least_float32(dtype):
                setattr(self, name, statistic.to(device, _at_least_float32(dtype)))
        return self


def site_names(modules: Collection[str], path: str) -> tuple[str, str] | None:
    """The full names of a site's two modules among a base's, or those of a wrapper of it; None if it has none such."""
    enter, _, leave = path.partition(":")
    wrapped = [name for name in modules if name.endswith(f".{enter}")]
    for first in [enter] if enter in modules else wrapped if len(wrapped) == 1 else []:
        parents = first.split(".")[:-1]
        for depth in range(len(parents), -1, -1):
            last = ".".join([*parents[:depth], leave]) if leave else first
            if last in modules:
                return first, last
    return None


class _Captured(Exception):
    """Stops a forward pass once all MLPs that are captured have run."""


@torch.no_grad()
def _capture(
    transcoders: Sequence[BilinearTC], base: Any, args: tuple[Any, ...], inputs: dict[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    """What enters and leaves each transcoder's MLP in one pass of the base, which ends when all of them have run."""
    captured: dict[BilinearTC, tuple[Tensor, Tensor]] = {}

    def recording(transcoder: BilinearTC) -> StandIn:
        def record(entered: list[Tensor], true: Callable[[], Any], before: Callable[[], Any]) -> Any:
            x = transcoder._input(entered).clone()  # copies, since some decoders (Falcon) add to an output in place
            transcoder._check_mlp_output(y := true())
            captured.setdefault(transcoder, (x, y.clone()))
            if len(captured) == len(transcoders):
                raise _Captured
            return y if before is true else before()

        return record

    with ExitStack() as stack:
        stack.enter_context(suppress(_Captured))
        stack.enter_context(_eager())
        for transcoder in transcoders:
            stack.enter_context(transcoder._find_site(base).replaced(recording(transcoder)))
        (base if args else _torch_module(base))(*args, **inputs)
    if missing := [str(t.config.mlp_path) for t in transcoders if t not in captured]:
        raise RuntimeError(f"The base's forward pass never came to {', '.join(missing)}.")
    pairs = []
    for transcoder in transcoders:
        config, (x, y) = transcoder.config, captured[transcoder]
        if (x.shape[-1], y.shape[-1]) != (config.n_inputs, config.n_outputs):
            raise ValueError(f"{transcoder._belongs()} in this base it maps width {x.shape[-1]} to {y.shape[-1]}.")
        given = tensors_in(args, inputs)
        batch = given[0].shape[:2] if given and x.ndim == 2 else x.shape[:-1]  # some decoders (OPT) flatten it
        pairs.append((x.reshape(*batch, -1), y.reshape(*batch, -1)))
    return pairs


def tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of a call."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def _torch_module(base: Any) -> nn.Module:
    """The model itself, of an nnsight model or a TransformerLens bridge."""
    if getattr(base, "dispatched", None) is False:  # nnsight loads no weights before they are needed
        base.dispatch()
    for name in ("_module", "original_model"):
        inner = getattr(base, name, None)
        base = inner if isinstance(inner, nn.Module) else base
    if not isinstance(base, nn.Module):
        raise ValueError(f"The base must be a loaded model (a torch module), not {type(base).__name__}.")
    return base


def _forward(module: nn.Module) -> Callable[..., Any]:
    """What the module computes as it stands: its own forward, or a transcoder's that is attached."""
    if (state := _nnsight_state(module)) is None:
        return module.forward
    return getattr(state.body, "forward", partial(state.body, module))


def _true_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's own forward, also while a transcoder is attached."""
    forward = _forward(module)
    return getattr(forward, "true_forward", forward)


def _nnsight_state(module: nn.Module) -> Any:
    """nnsight's forward of a module shows its traces what enters, runs `state.body(module, ...)`, and shows them what
    leaves: the body is the module's own forward. None of a module that nnsight has not wrapped."""
    state = getattr(vars(module).get("forward"), "state", None)
    return state if hasattr(state, "body") else None


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    vars(forward)["true_forward"] = _true_forward(module)
    # A module has a `forward` of its own, beside its class's, where another library or a transcoder has put one.
    state, previous = _nnsight_state(module), vars(module).get("forward")
    if state is None:
        module.forward = forward
    else:
        body, state.body = state.body, lambda _module, *args, **kwargs: forward(*args, **kwargs)
        vars(state.body)["forward"] = forward
    try:
        yield
    finally:
        if state is not None:
            state.body = body
        elif previous is None:
            del module.forward
        else:
            module.forward = previous


def _edited(units: Tensor, scale: Mapping[int, Any], add: Mapping[int, Any]) -> Tensor:
    """Hidden units [..., n_hidden], of which each one named is multiplied by its scale, then added to."""
    edited = units.clone()
    for unit in {*scale, *add}:
        factor, term = (torch.as_tensor(value).to(units) for value in (scale.get(unit, 1.0), add.get(unit, 0.0)))
        edited[..., unit] = units[..., unit] * factor + term
    return edited


@contextmanager
def _hooks_silenced(module: nn.Module) -> Iterator[None]:
    """Forward hooks that the caller has put inside the module do not see what runs in this context."""
    tables = [table for part in module.modules() for table in (part._forward_hooks, part._forward_pre_hooks)]
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)


def _eager() -> Any:
    """torch.compile cannot trace a pass that ends in an exception; torch before 2.6 has no switch for it."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if set_stance is None else set_stance("force_eager")


def _is_missing(tensor: Tensor) -> bool:
    """Whether transformers (4.57 and later mark each tensor) has not loaded it from a checkpoint."""
    return not getattr(tensor, "_is_hf_initialized", False)


def _is_quantized(parameter: Tensor) -> bool:
    """Whether a parameter holds codes of less than two bytes, whose scales only its own module knows."""
    return not parameter.is_floating_point() or parameter.dtype.itemsize < 2


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(_at_least_float32(tensor.dtype))


def _float64(tensor: Tensor) -> Tensor:
    # Apple's MPS has no float64: such tensors are computed with on the CPU.
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


class BilinearTCSet(nn.Module):
    """The transcoders of several layers of one base, in the order of the layers.

    Where only the Hub has this class, transformers fetches it:

        >>> from transformers.dynamic_module_utils import get_class_from_dynamic_module
        >>> BilinearTCSet = get_class_from_dynamic_module("modeling_bilinear_tc.BilinearTCSet", repo)

    Example:
        >>> tcs = BilinearTCSet.from_pretrained(repo)
        >>> tcs.fvu(base, input_ids=input_ids)
        {0: 0.0003, 1: 0.1292, ...}
        >>> with tcs.attached(base), tcs[3].attached(base, scale={17: 0.0}):  # one of layer 3's units switched off
        ...     base.generate(input_ids)

    Args:
        transcoders: one for each layer, in any order.

    Attributes:
        layers: their layers' numbers, ascending.

    Raises:
        ValueError: two are of the same layer, or one does not say of which it is.
    """

    def __init__(self, transcoders: Iterable[BilinearTC]) -> None:
        super().__init__()
        given = list(transcoders)
        layers = [transcoder.config.layer_index for transcoder in given]
        if None in layers or len({*layers}) < len(layers):
            raise ValueError(f"A set holds one transcoder for each layer, but those given are of layers {layers}.")
        self.layers: list[int] = sorted(layers)
        self.transcoders = nn.ModuleDict({str(layer): given[layers.index(layer)] for layer in self.layers})

    @classmethod
    def from_pretrained(
        cls,
        where: str | Path,
        layers: Iterable[int] | None = None,
        revision: str | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> BilinearTCSet:
        """Load the transcoders of a published set, or of a run's folder.

        Args:
            where: Hub id, or folder with a subfolder `layer_N` for each layer.
            layers: the layers' numbers; by default all that are there.
            revision: branch, tag or commit of the Hub repository.
            device: where to put them.
            kwargs: `cache_dir`, `token`, `local_files_only` and `force_download` for the Hub; all others, such as
                `dtype`, for `BilinearTC.from_pretrained`.

        Raises:
            ValueError: a layer asked for is not there, or none is.
            OSError: no such folder, and no Hub repository that can be read.
        """
        hub: dict[str, Any] = {"revision": revision}
        for name in ("cache_dir", "token", "local_files_only", "force_download"):
            if name in kwargs:
                hub[name] = kwargs.pop(name)
        folder = Path(where).expanduser()
        remote = not folder.is_dir()
        if remote:
            try:
                with _no_progress_bars():
                    folder = Path(snapshot_download(str(where), allow_patterns="layer_*/*.json", **hub))
            except (OSError, ValueError) as error:
                raise OSError(
                    f"There are no transcoders at {str(where)!r}: expected a run's folder, or a Hub repository that "
                    f"you can read, got {type(error).__name__}."
                ) from error
        names = [re.fullmatch(r"layer_(\d+)", path.parent.name) for path in folder.glob("layer_*/config.json")]
        there = sorted(int(name[1]) for name in names if name)
        if not there:
            raise ValueError(f"{where} holds no layer_N/config.json: expected a set of transcoders.")
        chosen = _chosen(layers, there, str(where))
        if remote:
            weights = [f"layer_{layer}/*.safetensors" for layer in chosen]
            hub["revision"] = folder.name  # the commit: a branch may have moved on since
            snapshot_download(str(where), allow_patterns=weights, tqdm_class=_FilesBar, **hub)
        with _no_progress_bars():
            tcs = cls(BilinearTC.from_pretrained(folder / f"layer_{layer}", **kwargs) for layer in chosen)
        return tcs.to(device=device).eval()

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[BilinearTC]:
        return map(self.__getitem__, self.layers)

    def __getitem__(self, layer: int) -> BilinearTC:
        """The transcoder of the layer of that number; IndexError if the set has none."""
        if layer not in self.layers:
            raise IndexError(_no_layer("This set", [layer], self.layers))
        return cast(BilinearTC, self.transcoders[str(layer)])

    def capture(self, base: Any, *args: Any, **inputs: Any) -> dict[int, tuple[Tensor, Tensor]]:
        """What enters and leaves the MLP of every layer, in one pass of the base.

        Arguments, values and errors are those of `BilinearTC.capture`: of each layer, the MLP's input
        [batch, seq, n_inputs] and its output [batch, seq, n_outputs].
        """
        return dict(zip(self.layers, _capture([*self], base, args, inputs), strict=True))

    @contextmanager
    def attached(
        self, base: Any, layers: Iterable[int] | None = None, error_term: bool | Mapping[int, Tensor] = False
    ) -> Iterator[Any]:
        """While the context lasts, the base runs with these transcoders in place of its MLPs.

        It is `BilinearTC.attached` of each layer, one within the other. To edit units too, attach those layers once
        more within.

        Args:
            base: as for `BilinearTC.attached`.
            layers: the layers' numbers; by default all of the set.
            error_term: as for `BilinearTC.attached`; errors are given by layer, and a layer without one has none.

        Yields:
            The base.

        Raises:
            ValueError: as `BilinearTC.attached` does, or the set has no such layer.
        """
        with ExitStack() as stack:
            for layer in _chosen(layers, self.layers, "This set"):
                error = error_term if isinstance(error_term, bool) else error_term.get(layer, False)
                stack.enter_context(self[layer].attached(base, error_term=error))
            yield base

    @torch.no_grad()
    def fvu(self, base: Any, *args: Any, **inputs: Any) -> dict[int, float]:
        """Each layer's fraction of variance unexplained on these inputs, as it is measured for the card.

        It is Σ‖z − ẑ‖² / Σ‖z − mean(z)‖² of outputs z-scored by their own mean and standard deviation over the rows:
        the mean over output features of each one's FVU, without those that do not vary. Rows are the positions of all
        sequences that `attention_mask` keeps, or all. The card's are taken over far more text: on a short prompt the
        outputs vary less, and the FVU is another.

        Arguments and errors are those of `capture`.
        """
        fvu = {}
        kept = inputs.get("attention_mask")
        for layer, (x, y) in self.capture(base, *args, **inputs).items():
            rows = ... if kept is None else kept.to(x.device).bool()
            x, true = x[rows], _float64(y[rows]).flatten(0, -2)
            y = _float64(self[layer](x.to(self[layer].input_mean.device))).to(true.device).flatten(0, -2)
            unexplained, spread = ((true - guess).square().sum(0) for guess in (y, true.mean(0)))
            fvu[layer] = (unexplained / spread)[spread > 0].mean().item()
        return fvu


def _chosen(layers: Iterable[int] | None, there: list[int], where: str) -> list[int]:
    """The layers asked for, ascending; ValueError if one is not there."""
    chosen = there if layers is None else sorted({*layers})
    if missing := [layer for layer in chosen if layer not in there]:
        raise ValueError(_no_layer(where, missing, there))
    return chosen


def _no_layer(where: str, missing: list[int], there: list[int]) -> str:
    return f"{where} has no layer {', '.join(map(str, missing))}: it has layers {', '.join(map(str, there))}."


class _FilesBar(tqdm):
    """Of the bars that a download draws, the one that counts files."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | ({"disable": True} if kwargs.get("unit") == "B" else {}))


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


BilinearTC.register_for_auto_class("AutoModel")
