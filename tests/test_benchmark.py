"""The benchmark: its operation counts against torch's own, and a short run of the command."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bilinear_tc.train.fitting.fitter import make_transcoders
from bilinear_tc.train.fitting.gradients import error_and_gradients
from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.studies import benchmark


def test_a_transcoders_operations_are_those_that_torch_counts(neox):
    (transcoder, *_) = make_transcoders(Recipe(init="random"), neox, torch.device("cpu"))
    parameters = dict(transcoder.named_parameters())
    x, y, zero, one = torch.randn(40, 16), torch.randn(40, 16), torch.zeros(16), torch.ones(16)
    with FlopCounterMode(display=False) as counter:
        error_and_gradients(parameters, x, y, zero, one, zero, one, torch.tensor(1.0), torch.float32)
    assert benchmark.transcoder_flops(16, 64, 16, 40) == counter.get_total_flops()


@pytest.mark.parametrize("lm_head", [False, True])
def test_a_bases_operations_are_those_that_torch_counts(neox, lm_head: bool):
    """But for attention, of which torch counts both halves and causal attention needs one."""
    neox.model.set_attn_implementation("eager")
    input_ids = torch.randint(50, (5, 8))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        (neox.model if lm_head else neox.model.base_model)(input_ids=input_ids)
    rotary = 5 * 2 * 8 * (16 // 2 // 4 // 2 or 1)  # inverse frequencies times positions, as a product
    attention_half = 2.0 * 40 * 3 * 16 * 8
    counted = benchmark.base_flops(neox.model.config, 3, 40, 8, lm_head=lm_head)
    assert abs(counter.get_total_flops() - attention_half - counted) <= rotary


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
    step = float(re.search(r"a step: ([\d.]+) s", printed)[1])
    for_all = float(re.search(r"([\d.]+) s for all$", printed, re.MULTILINE)[1])
    times = float(re.search(r"all layers in one pass are ([\d.]+) times faster", printed)[1])
    assert times == pytest.approx(for_all / step, rel=0.1, abs=0.1)
    sizes = re.findall(r"^ +(\d+) layers, +([\d,]+) tokens: +[\d.]+ s a step$", printed, re.MULTILINE)
    assert sizes == [("6", "128"), ("6", "256"), ("6", "512"), ("4", "512"), ("2", "512")]
