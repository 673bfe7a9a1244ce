"""The benchmark: its operation counts against formulas, and a short run of the command."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from bilinear_tc.train.fitting.fitter import Fitter
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.studies import benchmark
from bilinear_tc.train.text.batches import TokenBatch


def test_a_steps_operations_are_those_of_its_products(neox):
    """By phase: the weights' products, attention over whole rows, three weight gradients and the head's input's."""
    recipe = Recipe(init="random", batch_size=5, seq_len=8)
    flops = benchmark.count_flops(Fitter(recipe, neox, torch.device("cpu")), TokenBatch(torch.randint(50, (5, 8))))
    config, tokens = neox.model.config, 5 * 8
    d, hidden = config.hidden_size, 64
    block = 4 * d * d + 2 * d * config.intermediate_size + 2 * d * 8
    rotary = tokens * 2 * (d // config.num_attention_heads)  # inverse frequencies times positions, as a product
    assert abs(flops.pop("base") - 2 * tokens * 3 * block) <= rotary
    small, large, stretches = d, hidden, 2
    newton_schulz = 4 * stretches * small**2 * large + (8 * 5 - 6 * stretches) * small**3
    assert flops == {
        "statistics": 0,
        "transcoders": 3 * 2 * tokens * (2 * 3 * d * hidden + d * hidden),
        "optimizer": 3 * 3 * newton_schulz,
    }


@pytest.mark.slow
def test_the_command_prints_ratios_that_follow_from_its_figures(monkeypatch, capsys):
    """A step's phases add up, and the baseline is so many times slower as its seconds say."""
    arguments = ["--batch_size", "4", "--steps", "2", "--baseline_steps", "1", "--baseline_layers", "1"]
    monkeypatch.setattr(sys, "argv", ["train/studies/benchmark.py", *arguments, "--text_tokens", "20000"])
    benchmark.main()
    printed = capsys.readouterr().out
    phases = re.findall(
        r"^  (data|base|statistics|transcoders|Muon, AdamW) +([\d.]+) +([\d.]+)%", printed, re.MULTILINE
    )
    assert [name for name, *_ in phases] == ["data", "base", "statistics", "transcoders", "Muon, AdamW"]
    total = sum(float(seconds) for _, seconds, _ in phases)
    for _, seconds, share in phases:
        assert float(share) == pytest.approx(100 * float(seconds) / total, abs=1)
    step, share = map(float, re.search(r"a step: ([\d.]+) s, .* ([\d.]+)% of the product's", printed).groups())
    arithmetic = float(re.search(r"at the product's rate: ([\d.]+) s", printed)[1])
    assert arithmetic == pytest.approx(step * share / 100, rel=0.1, abs=0.01 * step + 0.001)
    assert re.search(r"^the first step, what it compiles included: [\d.]+ s$", printed, re.MULTILINE)
    for_all = float(re.search(r"([\d.]+) s for all$", printed, re.MULTILINE)[1])
    times = float(re.search(r"all layers in one pass are ([\d.]+) times faster", printed)[1])
    assert times == pytest.approx(for_all / step, rel=0.1, abs=0.1)
    sizes = re.findall(r"^ +(\d+) layers, +([\d,]+) tokens: +[\d.]+ s a step$", printed, re.MULTILINE)
    assert sizes == [("6", "128"), ("6", "256"), ("6", "512"), ("4", "512"), ("2", "512")]
