"""Loads layers as users do, from a Hub or a folder, in a process that has only torch and transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from bilinear_tc.modeling_bilinear_tc import BilinearTC

# Only torch and transformers: the package itself is out of reach, as it is for a reader of the Hub.
LOADER = """
import json, sys
sys.modules["bilinear_tc"] = None
import torch
from transformers import AutoConfig, AutoModel

out, where, loads = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
outputs = []
for load in loads:
    place = {name: value for name, value in load.items() if name in ("subfolder", "revision")}
    config = AutoConfig.from_pretrained(where, trust_remote_code=True, **place)
    model = AutoModel.from_pretrained(where, trust_remote_code=True, **load)
    read, held = ({name: value for name, value in vars(made).items() if name[0] != "_" and "dtype" not in name}
                  for made in (config, model.config))
    assert read == held, (read, held)
    x = torch.linspace(-2, 2, 6 * config.n_inputs).reshape(2, 3, config.n_inputs)
    with torch.no_grad():
        u, rows = torch.ones(config.n_outputs, device=model.device), x.to(model.device)
        form, wanted = model.quadratic_form(u), model(rows).sum(-1).float()
        digits = 1e-4 if model.dtype == torch.float32 else 0.05
        size = sum(part.abs().max().item() for part in (*form.parts(rows), form.constant))
        assert torch.allclose(form(rows), wanted, rtol=0, atol=digits * size)
        assert model.spectrum(u, 2).share.isfinite().all()
        outputs.append((config.layer_index, type(model).__name__, model(x.to(model.device)).cpu()))
torch.save(outputs, out)
"""


def load_in_fresh_process(where: str | Path, loads: list[dict], environment: dict[str, str], out: Path):
    """Layer index, class name and output on a fixed input of every load, from a process that starts with nothing."""
    command = [sys.executable, "-c", LOADER, str(out), str(where), json.dumps(loads)]
    done = subprocess.run(command, env=environment, cwd=out.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def saved_output(run: Path, layer: int) -> torch.Tensor:
    model = BilinearTC.from_pretrained(run / f"layer_{layer}")
    x = torch.linspace(-2, 2, 6 * model.config.n_inputs).reshape(2, 3, model.config.n_inputs)
    with torch.no_grad():
        return model(x)


def run_files(run: Path) -> dict[str, bytes | Path]:
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and "checkpoints" not in path.parts]
    return {path.relative_to(run).as_posix(): path for path in files}
