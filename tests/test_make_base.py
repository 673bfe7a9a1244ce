"""The script that trains the quickstart's base, on a few files."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bilinear_tc.train.quickstart import make_base
from bilinear_tc.train.text.documents import python_stdlib_files


@pytest.mark.slow
def test_the_base_that_it_leaves_loads_in_float32_and_has_the_loss_that_its_card_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = sorted(python_stdlib_files()["train"], key=lambda file: Path(file).stat().st_size)[-60:-55]
    (tmp_path / "held_out.py").write_text(Path(train[0]).read_text(encoding="utf-8")[:6000], encoding="utf-8")
    files = {"train": train[1:], "validation": [str(tmp_path / "held_out.py")]}
    monkeypatch.setattr(make_base, "python_stdlib_files", lambda: files)
    sizes = ["--steps", "8", "--batch_size", "4", "--length", "32", "--vocab_size", "300"]
    monkeypatch.setattr(sys, "argv", ["make_base.py", *sizes, "--output_dir", str(tmp_path / "base")])
    make_base.main()

    card = (tmp_path / "base" / "README.md").read_text(encoding="utf-8")
    loss, entropy = (float(re.search(rf"{name}.*\| ([\d.]+) nats", card)[1]) for name in ("loss", "entropy"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert base.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokens = [*tokenizer((tmp_path / "held_out.py").read_text(encoding="utf-8"))["input_ids"], tokenizer.eos_token_id]
    windows = torch.tensor(tokens[: len(tokens) // 32 * 32]).view(-1, 32)
    with torch.no_grad():
        losses = [base(window[None], labels=window[None]).loss.item() for window in windows]
    assert sum(losses) / len(losses) == pytest.approx(loss, abs=1e-3)
    assert entropy < math.log(300)
    assert loss < math.log(300)
    assert "| training | 8 steps of 4 × 32 tokens" in card
