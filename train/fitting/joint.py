"""The joint finish: all transcoders in the base at once, fitted to what the base itself predicts.

The loss is KL(base ‖ base with the transcoders), a token, plus `anchor` times the fit's own loss of every layer, on the
base's true inputs. Without that part the layers learn to make up for each other's errors, which spoils each of them as
a reading of its own MLP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.base import Base
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.fitting.fitter import Fitter, even_part, free_memory
from bilinear_tc.train.measuring.reentry import Reentry, first
from bilinear_tc.train.moments import Moments, check_finite
from bilinear_tc.train.processes import process_count, sum_over_processes
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.text.batches import TokenBatch

# Logits that exist at once, of the base and of the base with transcoders each: 8 MiB in float32 on the CPU, which stay
# in its cache (at 64 MiB a step takes 5% longer), 128 MiB on a GPU; and the rows that there are at least.
LOGITS, GPU_LOGITS, LEAST_ROWS = 2**21, 2**25, 64
CPU_ROWS = 1024  # tokens that gradients pass the base for at once: more make it no faster, and keep more
GPU_ROWS = 4096  # fewer at once leave a GPU idle, so that it is better to recompute what they would have kept


class JointFitter(Fitter):
    """The transcoders of a finished set under the joint finish; of its like in all but the loss, and in the z-scores,
    which stay those of the set.

    UserError if the base's blocks hand on more than their outputs.

    Args:
        recipe: the settings, `finish_lr` and `finish_steps` among them.
        transcoders: the set, in the order of `base.layers`.
        base, device, timer: as for `Fitter`; a step's further phase is called "spliced".

    Attributes:
        shown: what a step's progress says beside the FVU: `kl`, nats a token.
    """

    def __init__(
        self,
        recipe: Recipe,
        transcoders: Sequence[BilinearTC],
        base: Base,
        device: torch.device,
        timer: Callable[[str], AbstractContextManager] = lambda _phase: nullcontext(),
    ) -> None:
        self.passes = Reentry(base)
        self.vocabulary = base.model.config.get_text_config().vocab_size
        if not self.passes.is_exact(torch.arange(16, device=device)[None] % self.vocabulary):
            raise UserError(
                "--finish joint cannot part this base's head from its blocks, which hand on more than one output: "
                "leave it out"
            )
        super().__init__(
            dataclasses.replace(recipe, lr=recipe.finish_lr, max_steps=recipe.finish_steps or 0), base, device
        )
        self.timer = timer
        for own, given in zip(self.stack.transcoders, transcoders, strict=True):
            own.load_state_dict(given.state_dict())
            own.requires_grad_(True)
        self.stack.inputs, self.stack.outputs = (fixed(self.stack.transcoders, of) for of in ("input", "output"))
        share = -(-recipe.batch_size // process_count())
        chosen, self.recompute = choose_part(self, share)
        self.micro_batch_size = recipe.micro_batch_size or chosen
        self.shown = {"kl": float("nan")}

    def step(self, batch: TokenBatch, number: int) -> tuple[Tensor, Tensor, int]:
        with self.timer("base"):
            true = self._true_pass(batch)
        with self.timer("statistics"):
            self.stack.weigh(self.activations)
            inputs, outputs = (moments.over_processes() for moments in self.activations.moments())
            check_finite(inputs, outputs, self.base.layers, f"step {number + 1}")
            rows, batch_deviation = self.activations.count(), outputs.deviation
            inputs, outputs = self.stack.inputs, self.stack.outputs
        with self.timer("spliced"):
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=False)
            kl = self._accumulate_divergence(batch, true, rows)
        with self.timer("transcoders"):
            if self.tangents is not None:
                self.tangents.begin(number, self.activations)
            loss: dict[str, Any] = {"tangents": self.tangents, "jvp": self.recipe.jvp or 0.0, "onto": True}
            loss["weight"] = self.recipe.anchor
            errors = self.stack.accumulate(self.activations, inputs, outputs, rows, self.micro_rows, **loss)
            mse = errors / (rows * outputs.mean.shape[-1])
            fvu = errors / (batch_deviation / outputs.std.square()).sum(-1)
            mse, fvu, self.shown = mse.cpu(), fvu.cpu(), {"kl": float(sum_over_processes(kl)) / rows}
        self._update(number, fvu)
        return mse, fvu, rows

    def _update(self, number: int, fvu: Tensor) -> None:
        """Steps along the gradients, in each layer as far as the root of its FVU is to the mean's, and no farther than
        without that: Muon's steps are as long in a layer that is nearly exact as in the others, and would spoil it."""
        params = [(parameter, parameter.detach().clone()) for _, parameter in self._optimized()]
        self.update(number)
        paces = (fvu / fvu.mean()).sqrt().clamp(max=1).to(self.device)
        with torch.no_grad():
            for parameter, before in params:
                pace = paces.to(parameter.dtype).reshape(-1, *[1] * (parameter.ndim - 1))
                parameter.copy_(before.lerp(parameter, pace))

    def _true_pass(self, batch: TokenBatch) -> Tensor:
        """Fills the activations; returns what the last block leaves [sequences, tokens, width]."""
        left: list[Tensor] = []

        def keep(_block: nn.Module, _inputs: Any, output: Any) -> None:
            self.passes.left = [output]  # which tells `logits` what a block's output is like
            left.append(first(output).clone())

        handle = self.passes.blocks[-1].register_forward_hook(keep)
        try:
            self.activations.fill(batch, self.micro_batch_size)
        finally:
            handle.remove()
        return torch.cat(left) if left else torch.empty(0, device=self.device)

    def _accumulate_divergence(self, batch: TokenBatch, true: Tensor, rows: int) -> Tensor:
        """Adds the gradients of the mean KL over `rows` tokens; returns this process's sum of it, float64."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        mask = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask
        parts = (of.to(self.device).split(self.micro_batch_size) for of in (batch.input_ids, mask, true))
        for ids, kept, of_base in zip(*parts, strict=True) if len(batch) else ():
            with torch.enable_grad(), self._spliced():
                left = self.passes.enter(ids, 0)[kept]  # [rows, width]
                gradient = torch.empty_like(left)
                size = max(LEAST_ROWS, (GPU_LOGITS if self.device.type == "cuda" else LOGITS) // self.vocabulary)
                for own, known, place in zip(*(of.split(size) for of in (left, of_base[kept], gradient)), strict=True):
                    row = own.detach().requires_grad_()
                    logits = self.passes.logits(row)
                    with torch.no_grad():
                        kl, by_logits = divergence(self.passes.logits(known), logits)
                        total += kl
                    place.copy_(torch.autograd.grad(logits, row, by_logits.div_(rows))[0])
                left.backward(gradient)
        return total

    @contextmanager
    def _spliced(self) -> Iterator[None]:
        """While the context lasts, the transcoders stand in for their MLPs, with gradients, in the fit's type."""

        def stand_in(transcoder: BilinearTC, entered: list[Tensor], *_: Callable[[], Tensor]) -> Tensor:
            (x,) = entered
            with torch.autocast(self.device.type, self.stack.dtype, enabled=self.stack.dtype != torch.float32):
                return transcoder(x).to(x.dtype)

        with ExitStack() as stack:
            for layer, transcoder in zip(self.base.layers, self.stack.transcoders, strict=True):
                stack.enter_context(self.base.site(layer).replaced(partial(stand_in, transcoder)))
            if self.recompute:
                stack.enter_context(recomputed(self.passes.blocks))
            yield


def divergence(true: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Σ KL(p ‖ q) over rows of logits [rows, vocabulary], p of `true`, q of `own`; and q − p, its gradient by `own`."""
    true, own = true.log_softmax(-1), own.log_softmax(-1)
    p = true.exp()
    kl = true.sub_(own).mul_(p).sum(dtype=torch.float64)
    return kl, own.exp_().sub_(p)


def fixed(transcoders: Sequence[BilinearTC], of: str) -> Moments:
    """Moments [layers, features] whose mean and standard deviation are a set's own, of its "input" or "output"."""
    mean, std = (torch.stack([getattr(t, f"{of}_{name}") for t in transcoders]).double() for name in ("mean", "std"))
    return Moments(torch.ones_like(mean[:, :1]), mean, std.square())


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While the context lasts, blocks keep what enters them alone for the backward pass, and run once more in it."""
    forwards = [block.forward for block in blocks]
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def choose_part(fitter: Fitter, share: int) -> tuple[int, bool]:
    """How many of its `share` of sequences a process passes gradients through the base for at once, and whether blocks
    are recomputed. A part takes at most half of a GPU's free memory; on the CPU it has `CPU_ROWS` tokens.

    A token keeps about these of a block: sixteen times its width in norms, attention and residual stream, a
    transcoder's hidden units four times over and its ends in float32; or, recomputed, what enters it.
    """
    base, recipe, bytes_each = fitter.base, fitter.recipe, fitter.stack.dtype.itemsize
    if fitter.device.type != "cuda":
        return even_part(share, CPU_ROWS // recipe.seq_len), False
    ends = base.n_inputs + base.n_outputs
    block = bytes_each * (16 * base.n_inputs + 4 * recipe.n_hidden(base.n_inputs)) + 8 * ends
    tokens = free_memory(fitter.device) / 2 / (block * base.num_layers)
    recompute = tokens < min(GPU_ROWS, share * recipe.seq_len)
    if recompute:
        tokens = free_memory(fitter.device) / 2 / (block + bytes_each * base.n_inputs * base.num_layers)
    return even_part(share, int(tokens / recipe.seq_len)), recompute
