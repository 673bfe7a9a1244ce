"""The base entered at a block, and the losses that are measured so: those of whole passes, at half their cost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from bases import tiny_gpt2, tiny_llama, tiny_neox
from test_decoders import MODELS
from torch import Tensor
from transformers import PreTrainedModel

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.base import Base
from bilinear_tc.train.fitting.fitter import make_transcoders
from bilinear_tc.train.measuring import replacement
from bilinear_tc.train.measuring.reentry import Reentry
from bilinear_tc.train.measuring.replacement import Replacement, mean_output
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.text.batches import TokenBatch

CPU = torch.device("cpu")
LENGTHS = torch.tensor([12, 1, 7, 9])


def tokens(seed: int) -> Tensor:
    return torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(seed))


def transcoders_of(base: Base) -> list[BilinearTC]:
    torch.manual_seed(1)
    return make_transcoders(Recipe(init="random"), base, CPU)


def padded() -> list[TokenBatch]:
    return [TokenBatch(tokens(seed), torch.arange(12) < LENGTHS[:, None]) for seed in range(2)]


@pytest.mark.parametrize("make", [tiny_neox, tiny_llama, tiny_gpt2, *MODELS], ids=lambda make: make.__name__)
@torch.no_grad()
def test_a_pass_from_a_block_on_is_the_whole_pass(make: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    base = Base(make(), tokenizer=None)
    passes = Reentry(base)
    assert passes.is_exact(tokens(0)[:1])
    true = base.model(tokens(1)).logits
    for transcoder in transcoders_of(base):
        for context in (transcoder.attached(base.model), mean_output(base, [transcoder])):
            passes.keep(tokens(1))
            with context:
                whole = base.model(tokens(1)).logits
                left = passes.enter(tokens(1), transcoder.config.layer_index)
            logits = passes.logits(left.flatten(0, 1)).view_as(whole)
            torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(whole, true, rtol=1e-2, atol=1e-2)
    assert torch.equal(base.model(tokens(1)).logits, true)


def hand_on_aside(base: Base) -> None:
    """Makes the last block add what the first one's MLP has said, which no block hands on."""
    first, *_, last = base.model.gpt_neox.layers
    aside: list[Tensor] = []
    first.mlp.register_forward_hook(lambda _mlp, _args, output: aside.append(output))
    last.register_forward_pre_hook(lambda _block, args: (args[0] + aside[-1], *args[1:]))


def test_a_base_whose_blocks_hand_on_more_than_their_outputs_is_told(neox: Base) -> None:
    with torch.no_grad():
        assert Reentry(neox).is_exact(tokens(0)[:1])
        hand_on_aside(neox)
        assert not Reentry(neox).is_exact(tokens(0)[:1])


@torch.no_grad()
def test_so_is_one_whose_blocks_miss_what_an_earlier_one_lays_aside_in_each_pass(neox: Base) -> None:
    """As Gemma 4's last ones, which take an earlier one's keys and values from a dictionary."""
    first, *_, last = neox.model.gpt_neox.layers
    aside: dict[str, Tensor] = {}
    neox.model.gpt_neox.register_forward_pre_hook(lambda *_: aside.clear())
    first.mlp.register_forward_hook(lambda _mlp, _args, output: aside.update(keys=output))
    last.register_forward_pre_hook(lambda _block, args: (args[0] + aside["keys"], *args[1:]))
    assert not Reentry(neox).is_exact(tokens(0)[:1])


@torch.no_grad()
def test_a_block_that_writes_over_its_input_spoils_no_later_pass(neox: Base) -> None:
    neox.model.gpt_neox.layers[1].register_forward_pre_hook(lambda _block, args: (args[0].add_(0.5), *args[1:]))
    passes = Reentry(neox)
    assert passes.is_exact(tokens(0)[:1])
    left = passes.keep(tokens(1))
    for _ in range(2):
        torch.testing.assert_close(passes.enter(tokens(1), 1), left)


def test_the_losses_are_those_of_whole_passes(neox: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for exact, logits in ((True, 2**23), (True, 50 * 3), (False, 0)):
        monkeypatch.setattr(replacement, "LOGITS", logits)
        measured = Replacement(neox, transcoders_of(neox))
        measured._exact = exact
        for batch in padded():
            measured.add(batch)
        results.append(measured.scores())
    for result in results[:2]:
        assert result.base_ce == pytest.approx(results[2].base_ce, rel=1e-5)
        assert result.tokens == results[2].tokens == 2 * (11 + 6 + 8)
        assert result.mean_se == pytest.approx(results[2].mean_se, rel=1e-4)
        for own, expected in zip(
            (*result.layers, result.together), (*results[2].layers, results[2].together), strict=True
        ):
            assert vars(own) == pytest.approx(vars(expected), rel=1e-3, abs=1e-5)


def test_where_it_cannot_be_entered_whole_passes_are_made(neox: Base) -> None:
    hand_on_aside(neox)
    measured = Replacement(neox, transcoders_of(neox))
    for batch in padded():
        measured.add(batch)
    ce = measured.scores().base_ce
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(neox.model(ids[None]).logits[0, : n - 1], ids[1:n], reduction="sum")
            for batch in padded()
            for ids, n in zip(batch.input_ids, LENGTHS.tolist(), strict=True)
        ]
    assert ce == pytest.approx(float(sum(losses)) / 50, rel=1e-5)


def test_half_the_blocks_run_and_few_logits_exist_at_once(neox: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replacement, "LOGITS", 50 * 5)
    rows, runs = [], []
    logits = Reentry.logits
    monkeypatch.setattr(Reentry, "logits", lambda self, x: rows.append(len(x)) or logits(self, x))
    measured = Replacement(neox, transcoders_of(neox))
    measured.add(TokenBatch(tokens(0)))
    with ExitStack() as stack:
        for block in neox.model.gpt_neox.layers:
            handle = block.attention.register_forward_hook(lambda *_: runs.append(1))
            stack.callback(handle.remove)
        rows.clear()
        measured.add(TokenBatch(tokens(1)))
    # the true pass; of three layers alone 3, 2 and 1 blocks, of all at once 3, by transcoders and by means
    assert len(runs) == 3 + 2 * (3 + 2 + 1 + 3)
    assert max(rows) == 5
    assert sum(rows) == 4 * 11 * 9


def test_standard_errors_are_those_of_the_sequences(neox: Base) -> None:
    transcoders = transcoders_of(neox)
    measured = Replacement(neox, transcoders)
    batch = padded()[0]
    measured.add(batch)
    found = measured.scores()
    lengths = (LENGTHS - 1).double()
    residuals = []
    for transcoder, scores in zip(transcoders, found.layers, strict=True):
        rises, divergences, agreements = [], [], []
        for ids, n in zip(batch.input_ids, LENGTHS.tolist(), strict=True):
            with torch.no_grad():
                true = neox.model(ids[None, :n]).logits[0, :-1].double().log_softmax(-1)
                with transcoder.attached(neox.model):
                    own = neox.model(ids[None, :n]).logits[0, :-1].double().log_softmax(-1)
            rises.append((true - own).gather(1, ids[1:n, None]).sum())
            divergences.append((true.exp() * (true - own)).sum())
            agreements.append((true.argmax(-1) == own.argmax(-1)).sum())
        sums = torch.tensor([rises, divergences, agreements]).double()
        ratio = sums.sum(1) / lengths.sum()
        residuals.append((sums - ratio[:, None] * lengths) / lengths.sum())
        assert [scores.ce_increase, scores.kl, scores.top1] == pytest.approx(ratio.tolist(), rel=1e-3)
        errors = [scores.ce_increase_se, scores.kl_se, scores.top1_se]
        assert errors == pytest.approx(spread(residuals[-1]), rel=1e-3)
    of_mean = [found.mean_se[f"{score}_se"] for score in ("ce_increase", "kl", "top1")]
    assert of_mean == pytest.approx(spread(torch.stack(residuals).mean(0)), rel=1e-3)


def spread(residuals: Tensor) -> list[float]:
    """Of four sequences' residuals [figures, sequences]."""
    return (4 / 3 * residuals.square().sum(1)).sqrt().tolist()
