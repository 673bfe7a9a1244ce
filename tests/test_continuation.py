"""Greedy continuations against a plain loop over whole passes in float64, whatever the base's own settings."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from bases import tiny_gpt2, tiny_llama, tiny_neox
from test_replacement import transcoders_of
from torch import Tensor
from transformers import PreTrainedModel

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.base import Base
from bilinear_tc.train.measuring import continuation
from bilinear_tc.train.measuring.continuation import Continuing
from bilinear_tc.train.text.batches import TokenBatch


class Numbers:
    """A tokenizer whose texts are the ids."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def batches(count: int = 3) -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(3)
    made = [TokenBatch(torch.randint(50, (4, 12), generator=generator)) for _ in range(count)]
    made[1] = TokenBatch(made[1].input_ids, torch.arange(12) < torch.tensor([12, 3, 12, 11])[:, None])
    return made


class Near(BilinearTC):
    """The MLP, and a little of a transcoder."""

    def forward(self, x: Tensor) -> Tensor:
        return self.copied(x) + 0.05 * super().forward(x)


def near(base: Base) -> list[BilinearTC]:
    transcoders = transcoders_of(base)
    for layer, transcoder in enumerate(transcoders):
        transcoder.__class__ = Near
        transcoder.copied = copy.deepcopy(base.mlp(layer))
    return transcoders


@torch.no_grad()
def by_hand(model: PreTrainedModel, prompts: Tensor, count: int) -> list[list[int]]:
    """The most likely token, added, and again: a whole pass in float64 for each."""
    wide, ids = copy.deepcopy(model).double(), prompts
    for _ in range(count):
        ids = torch.cat([ids, wide(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[:, prompts.shape[1] :].tolist()


@pytest.mark.parametrize(
    "make",
    [tiny_neox, *(pytest.param(of, marks=pytest.mark.slow) for of in (tiny_llama, tiny_gpt2))],
    ids=lambda make: make.__name__,
)
def test_they_are_those_of_a_plain_loop(make: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuation, "AT_ONCE", 4)
    model = make()
    settings = {"repetition_penalty": 3.0, "do_sample": True, "num_beams": 2, "eos_token_id": [*range(25)]}
    model.generation_config.update(**settings)
    base = Base(model, tokenizer=Numbers())
    transcoders = near(base)
    continuing = Continuing(base, transcoders)
    for batch in batches():
        continuing.add(batch)
    found = continuing.scores()
    assert found is not None
    new = 16 if make is tiny_gpt2 else 32  # half of its positions
    prompts = torch.cat([batch.input_ids if batch.mask is None else batch.input_ids[[0, 2]] for batch in batches()])
    own = by_hand(model, prompts, new)
    replaced = copy.deepcopy(model)
    for tc in transcoders:
        path, _, name = tc.config.mlp_path.rpartition(".")
        setattr(replaced.get_submodule(path), name, tc)
    said = list(zip(own, by_hand(replaced, prompts, new), strict=True))
    same = [next((i for i, (a, b) in enumerate(zip(*both, strict=True)) if a != b), new) for both in said]
    assert (found.prompts, found.prompt_tokens, found.tokens) == (10, 12, new)
    assert 0 < sum(same) < 10 * new
    assert found.same_median == sorted(same)[4] / 2 + sorted(same)[5] / 2
    wide = torch.tensor(same).double()
    assert found.same_mean == pytest.approx(wide.mean().item())
    assert found.same_mean_se == pytest.approx((wide.std() / 10**0.5).item())
    shown = sorted(range(10), key=same.__getitem__)[4]
    texts = [" ".join(map(str, ids)) for ids in (prompts[shown].tolist(), *said[shown])]
    assert [found.prompt, found.base, found.replaced] == texts
    assert model.generation_config.repetition_penalty == 3.0


def test_the_mlps_themselves_never_depart(neox: Base) -> None:
    transcoders = transcoders_of(neox)
    for layer, transcoder in enumerate(transcoders):
        transcoder.forward = copy.deepcopy(neox.mlp(layer)).forward
    continuing = Continuing(neox, transcoders)
    continuing.add(batches()[0])
    found = continuing.scores()
    assert found is not None
    assert (found.same_median, found.same_mean, found.same_mean_se) == (32, 32, 0)
    assert (found.prompt, found.base, found.replaced) == (None, None, None)  # without a tokenizer


def test_there_are_as_many_prompts_as_are_said_and_no_longer_than_half_the_positions(
    neox: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuation, "PROMPTS", 6)
    continuing = Continuing(neox, transcoders_of(neox))
    for _ in range(5):
        continuing.add(TokenBatch(torch.zeros(4, 50, dtype=torch.long)))
    found = continuing.scores()
    assert found is not None
    assert (found.prompts, found.prompt_tokens, found.tokens) == (6, 32, 32)


def test_what_cannot_be_continued_is_left_out_with_a_sentence(
    neox: Base, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*given: TokenBatch) -> str:
        caplog.clear()
        continuing = Continuing(neox, transcoders_of(neox))
        for batch in given:
            continuing.add(batch)
        with caplog.at_level(logging.WARNING):
            assert continuing.scores() is None
        (record,) = caplog.records
        return record.getMessage().removeprefix("greedy continuations were not compared: ")

    settings = neox.model.generation_config
    short = TokenBatch(torch.zeros(2, 12, dtype=torch.long), torch.arange(12).expand(2, 12) < 5)
    assert told(short) == "no held-out sequence begins with text enough for a prompt"
    monkeypatch.setattr(neox.model, "generate", lambda *_, **__: torch.zeros(1) @ torch.zeros(2))
    assert "size" in told(batches()[0])
    assert neox.model.generation_config is settings
    monkeypatch.setattr(type(neox.model), "can_generate", lambda *_: False)
    assert told(batches()[0]) == "GPTNeoXForCausalLM cannot generate"
