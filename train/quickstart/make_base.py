"""Trains the quickstart base: a small GPT-NeoX with Pythia's layout, on Python's standard library.

    python train/quickstart/make_base.py

writes config.json, model.safetensors, the tokenizer and README.md (with the losses it measured) beside this
file. Its held-out text is the "validation" split of `python_stdlib_files`, which the quickstart's fit and
evaluation hold out too.
"""

from __future__ import annotations

import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from bilinear_tc.train.files import read_json, write_json
from bilinear_tc.train.recipe import option, parse_settings
from bilinear_tc.train.text.documents import python_stdlib_files

END_OF_TEXT = "<|endoftext|>"

README = """---
license: mit
---

# The quickstart base

A GPT-NeoX with Pythia's layout (parallel residual, rotary 0.25): {layers} layers, width {width},
{parameters:,} parameters, stored in float16 ({size:.1f} MB with its tokenizer). Small enough to ship, and
really trained, so that the quickstart and the tests fit transcoders to MLPs that compute something.

| figure | value |
| --- | --- |
| held-out loss | {loss:.3f} nats a token |
| unigram entropy of the same text | {entropy:.3f} nats a token |
| training text | standard library of Python {python}, {train_tokens:,} tokens |
| held-out text | {held_out_files} other files of it, {held_out_tokens:,} tokens |
| training | {steps} steps of {batch_size} × {length} tokens, {minutes:.0f} minutes on {threads} CPU threads |

Made, tokenizer and figures included, by `python train/quickstart/make_base.py`.
"""


@dataclass
class BaseSettings:
    """Trains the quickstart's base."""

    steps: int = option(3000, "Optimizer steps.")
    batch_size: int = option(16, "Sequences a step.")
    length: int = option(256, "Tokens a sequence.")
    lr: float = option(3e-3, "Peak learning rate.")
    vocab_size: int = option(2048, "Entries of the tokenizer.")
    output_dir: str = option(str(Path(__file__).parent), "The base's folder.")


def train_tokenizer(files: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose token 0 is the end of text, as in Pythia's."""
    bpe = ByteLevelBPETokenizer()
    bpe.train(files, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    )


def tokenize_files(files: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All files as one [tokens] stream, an end of text after each."""
    tokens: list[int] = []
    for file in files:
        text = Path(file).read_text(encoding="utf-8", errors="replace")
        tokens += tokenizer(text, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(tokens)


def unigram_entropy(train: torch.Tensor, held_out: torch.Tensor, vocab_size: int) -> float:
    """Cross-entropy (nats a token) of the training text's token frequencies, plus one, on the held-out text."""
    counts = torch.bincount(train, minlength=vocab_size).double() + 1
    return -(counts / counts.sum()).log()[held_out].mean().item()


@torch.inference_mode()
def held_out_loss(model: GPTNeoXForCausalLM, tokens: torch.Tensor, length: int, batch_size: int) -> float:
    """Mean cross-entropy in nats a token over the held-out text, in windows of `length` tokens."""
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    losses = [model(batch, labels=batch).loss.item() * len(batch) for batch in windows.split(batch_size)]
    return sum(losses) / len(windows)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a half cosine down to a twentieth of the peak."""
    decay = 0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / warmup) * decay


def save(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the base so that transformers 4.51 and 5 both read it, and read it as float32."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, fields in {
        "config.json": {"dtype": "float32", "torch_dtype": "float32", "rotary_pct": 0.25, "rotary_emb_base": 10000},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }.items():
        write_json(read_json(folder / name) | fields, folder / name)


def train(model: GPTNeoXForCausalLM, tokens: torch.Tensor, settings: BaseSettings) -> None:
    """AdamW on windows of the text at random places, gradients cut at norm 1."""
    matrices, vectors = ([p for p in model.parameters() if (p.ndim == 2) == matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    generator, offsets = torch.Generator().manual_seed(0), torch.arange(settings.length)
    for step in (progress := tqdm(range(settings.steps), unit="step")):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.lr)
        starts = torch.randint(len(tokens) - settings.length, (settings.batch_size, 1), generator=generator)
        batch = tokens[starts + offsets]
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def main() -> None:
    settings = parse_settings(BaseSettings)
    folder = Path(settings.output_dir)
    torch.manual_seed(0)
    files = python_stdlib_files()
    tokenizer = train_tokenizer(files["train"], settings.vocab_size)
    tokens, held_out = (tokenize_files(files[split], tokenizer) for split in ("train", "validation"))
    entropy = unigram_entropy(tokens, held_out, settings.vocab_size)
    print(f"{len(tokens):,} training tokens, {len(held_out):,} held out, unigram entropy {entropy:.3f} nats")

    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=settings.length,
        rotary_pct=0.25,  # type: ignore[call-arg] # read by every version, declared by 4
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoXForCausalLM(config)
    started = time.perf_counter()
    train(model, tokens, settings)
    minutes = (time.perf_counter() - started) / 60

    model.half()  # stored in half precision, measured as stored
    save(model, tokenizer, folder)
    loss = held_out_loss(model.float().eval(), held_out, settings.length, settings.batch_size)
    size = sum(f.stat().st_size for f in folder.iterdir() if f.suffix in {".json", ".safetensors"}) / 1e6
    print(f"held-out loss {loss:.3f} nats a token, unigram entropy {entropy:.3f}, {size:.1f} MB")
    figures = {"loss": loss, "entropy": entropy, "size": size, "minutes": minutes}
    card = README.format(
        **vars(settings),
        **figures,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        parameters=sum(p.numel() for p in model.parameters()),
        python=platform.python_version(),
        train_tokens=len(tokens),
        held_out_files=len(files["validation"]),
        held_out_tokens=len(held_out),
        threads=torch.get_num_threads(),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
