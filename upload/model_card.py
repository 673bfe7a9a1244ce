"""The model card: a repository folder's README.md, written from what the folder holds and from nothing else."""

from __future__ import annotations

import os
import re
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.train.base import base_location
from bilinear_tc.train.text.documents import PYTHON_STDLIB
from bilinear_tc.upload.figures import COMPARISON, curves_name, sixes
from bilinear_tc.upload.findings import (
    LIKE,
    findings,
    format_fvu,
    format_nats,
    format_percent,
    format_range,
    layer_ranges,
    like_layers,
)
from bilinear_tc.upload.results import (
    SETTLED_STEPS,
    Results,
    final_scores,
    layer_folders,
    read_history,
    read_results,
    read_yaml,
)

HUB = "https://huggingface.co"
LICENSE = "mit"
NOTES_AT = 40  # column of the notes in the repository's tree
PYTHON_STDLIB_NAME = "the Python standard library's source"
FILE_NOTES = {
    "README.md": "this card",
    "configuration_bilinear_tc.py": "the configuration class",
    "modeling_bilinear_tc.py": "the model class",
    "recipe.yaml": "every setting of the fit",
    "evaluation.json": "the held-out scores at full precision",
    "config.json": "dimensions, form, and the MLP that the layer stands in for",
    "model.safetensors": "weights and z-score statistics",
    "config.yaml": "settings and cost of the fit, for a reader",
    "history.parquet": "scores of every training batch",
}
SCORES = {  # key of evaluation.json: column of the full table, its format
    "fvu": ("FVU", format_fvu),
    "variance_explained": ("Variance explained", format_percent),
    "fvu_raw": ("FVU, raw outputs", format_fvu),
    "fvu_linear": ("FVU, best affine map", format_fvu),
    "mse": ("MSE", format_fvu),
    "ce_increase": ("Loss increase (nats)", partial(format_nats, sign="+")),
    "kl": ("KL (nats)", "{:.4f}".format),
    "loss_recovered": ("Loss recovered", format_percent),
}


def write_model_card(repository: Path, *, repo_id: str | None, author: str | None, cast_to: str | None = None) -> Path:
    """Writes README.md into a repository folder; call it once everything else is in the folder.

    Args:
        repository: the folder, laid out like a run; the figures in its `figures/` are shown.
        repo_id: where it will be published; without it the snippets load from the current folder.
        author: the name in the citation; the owner in `repo_id` where left out.
        cast_to: the weights' dtype, where it is another than the one that they were measured in.

    Returns:
        The card's path.

    Raises:
        ValueError: where the folder is not a run, its files are not readable, or the card does not pass
            `check_card`.
    """
    results = read_results(repository)
    context = card_context(repository, results, repo_id=repo_id, author=author) | {"cast_to": cast_to}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    body = environment.get_template("model_card.md.jinja").render(context)
    card = f"---\n{card_data(context, results).to_yaml()}\n---\n\n{body}"
    check_card(card, repository)
    path = repository / "README.md"
    partial = path.with_name(".README.md.partial")
    partial.write_text(card, encoding="utf-8", newline="\n")
    os.replace(partial, path)
    return path


def check_card(card: str, repository: Path) -> None:
    """What can be checked of a card without the Hub (`ModelCard.validate` asks the Hub itself).

    Raises:
        ValueError: where its metadata does not parse back, names a base or data set that cannot be on the Hub, or a
            relative link or image leads to no file of the folder.
    """
    data = ModelCard(card).data
    for name in filter(None, [data.base_model, *(data.datasets or [])]):
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(f"the card's metadata names {name!r}, which is not a Hub id: {error}") from error
    missing = [link for link in relative_links(card) if not (repository / link).exists()]
    if missing:
        raise ValueError(f"the card links to {', '.join(missing)}, which {repository} does not hold")


def relative_links(card: str) -> list[str]:
    """Targets of a card's Markdown links and images that lie in its own repository."""
    targets = re.findall(r"\]\(([^)\s]+)", re.sub(r"```.*?```", "", card, flags=re.DOTALL))
    return [target for target in targets if not re.match(r"[a-z]+:|#", target) and target != "README.md"]


def card_data(context: dict[str, Any], results: Results) -> ModelCardData:
    """The card's metadata, as the Hub reads it."""
    base, text = context["base"], context["text"]
    mean = f"mean over layers {layer_ranges(context['layers'])}" if len(context["layers"]) > 1 else "one layer"
    source = {
        "task_type": "other",
        "task_name": "Approximating MLP outputs",
        "dataset_type": text["slug"],
        "dataset_name": text["name"],
        "dataset_split": results.split,
    }
    kind = "held out" if results.held_out else "training batches"
    scores = [("fvu", "FVU"), ("variance_explained", "Variance explained")]
    return ModelCardData(
        base_model=base["name"] if base["url"] else None,
        datasets=[context["fitted_on"]["name"]] if context["fitted_on"]["url"] else None,
        library_name="transformers",
        license=LICENSE,
        tags=["mechanistic-interpretability", "transcoding", "bilinear", base["family"], "mlp"],
        model_name=context["slug"],
        eval_results=[
            EvalResult(
                **source,
                metric_type=key,
                metric_name=f"{name} ({mean}, {kind})",
                metric_value=round(results.mean(key), 6),
            )
            for key, name in scores
        ],
    )


def card_context(repository: Path, results: Results, *, repo_id: str | None, author: str | None) -> dict[str, Any]:
    """Everything that the template prints."""
    folders = layer_folders(repository)
    layers = list(folders)
    example = 3 if 3 in folders else layers[0]
    config = read_config(folders[example])
    settings = read_yaml(repository / "recipe.yaml") | read_yaml(folders[example] / "config.yaml")
    base = describe_base(config, settings)
    slug = repo_id.split("/")[-1] if repo_id else f"{base['short']}-bilinear-transcoders"
    fitted_on = describe_text(settings.get("dataset"))
    longest = max(len(read_history(folder)["step"]) for folder in folders.values())
    return {
        "title": f"Bilinear MLP transcoders for {base['short']}",
        "slug": slug,
        "repo_id": repo_id,
        "where": repo_id or ".",
        "url": f"{HUB}/{repo_id}" if repo_id else None,
        "author": latex(author or (repo_id.split("/")[0] if repo_id and "/" in repo_id else "")),
        "year": datetime.now(timezone.utc).year,
        "layers": layers,
        "layer_ranges": layer_ranges(layers),
        "example": example,
        "base": base,
        "config": config,
        "parameters": count_parameters(config),
        "fitted_on": fitted_on,
        "text": describe_text(results.dataset),
        "results": results,
        "settled_steps": min(SETTLED_STEPS, longest),
        "like": f"{LIKE:g}",
        "summary": summary_table(results),
        "full": full_table(results),
        "figures": figures(repository, results),
        "tree": repository_tree(repository),
        "training": training_rows(settings, fitted_on),
        "imported": settings.get("imported"),
        "fit": settings.get("fit") or {},
        "has_history": longest > 0,
        "checkpoint": next((path.name for path in sorted(folders[example].glob("*.pt"))), None),
        "findings": findings(results),
        "format_fvu": format_fvu,
        "format_percent": format_percent,
    }


def read_config(folder: Path) -> BilinearTCConfig:
    """A layer's config.json."""
    try:
        return BilinearTCConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} is not readable: {str(error).splitlines()[0]}") from error


def describe_base(config: BilinearTCConfig, settings: dict[str, Any]) -> dict[str, str | None]:
    """How the card names the base: a Hub id with its link, or the name of a local folder without one.

    `family` is the tag: the id's name without its size (`EleutherAI/pythia-410m` → pythia), or for a local base the
    architecture that its module paths begin with (`gpt_neox.layers.3.mlp` → gpt_neox).
    """
    name = config.base_model or settings.get("base") or "an unnamed base"
    on_hub = is_hub_id(name) and base_location(name) == name and not Path(name).exists()
    short = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    without_size = re.split(r"-\d", short, maxsplit=1)[0].lower()
    architecture = (config.mlp_path or "transformer").split(".")[0]
    return {
        "name": name,
        "revision": config.base_revision,
        "short": short,
        "url": f"{HUB}/{name}" if on_hub else None,
        "link": f"[{name}]({HUB}/{name})" if on_hub else f"`{short}` (a local model)",
        "family": without_size if on_hub else architecture,
    }


def describe_text(dataset: str | None) -> dict[str, str | None]:
    """How the card names a text source: a Hub id with its link, or the name of local files without one."""
    if dataset is None:
        return {"name": "unnamed text", "link": "unnamed text", "url": None, "slug": "unnamed"}
    if dataset == PYTHON_STDLIB:
        return {"name": PYTHON_STDLIB_NAME, "link": PYTHON_STDLIB_NAME, "url": None, "slug": dataset}
    is_file = re.search(r"\.(txt|jsonl?|zst|gz|parquet|py|csv)$|[*,]", dataset)
    if is_hub_id(dataset) and not is_file and not Path(dataset).exists():
        url = f"{HUB}/datasets/{dataset}"
        return {"name": dataset, "link": f"[{dataset}]({url})", "url": url, "slug": dataset}
    short = re.split(r"[/\\]", dataset.rstrip("/\\"))[-1]
    return {
        "name": short,
        "link": f"`{short}` (local files)",
        "url": None,
        "slug": re.sub(r"[^\w.-]+", "-", short).strip("-.") or "local",
    }


def is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def count_parameters(config: BilinearTCConfig) -> int:
    """Trained parameters of one layer, from its dimensions."""
    inputs, hidden, outputs, bias = config.n_inputs, config.n_hidden, config.n_outputs, config.bias
    if config.form == "input_sum":
        return inputs * hidden + outputs * (hidden + bias)
    return 2 * hidden * (inputs + bias) + outputs * (hidden + bias)


def summary_table(results: Results) -> list[list[str]]:
    """Header and rows: consecutive layers of like FVU, best and hardest marked, then the average."""
    fvu, explained = results.values("fvu"), results.values("variance_explained")
    affine = results.values("fvu_linear") if results.mean("fvu_linear") is not None else {}
    best, hardest = min(fvu, key=fvu.__getitem__), max(fvu, key=fvu.__getitem__)
    rows = [["Layers", "FVU", "Variance explained", *(["FVU, best affine map"] if affine else []), "Notes"]]
    for group in like_layers(fvu):
        marked = [
            mark if len(group) == 1 else f"{mark}: layer {layer}"
            for mark, layer in (("best", best), ("hardest", hardest))
            if layer in group and len(fvu) > 1
        ]
        rows.append(
            [
                layer_ranges(group),
                format_range((fvu[layer] for layer in group), format_fvu),
                format_range((explained[layer] for layer in group), format_percent),
                *([format_range((affine[layer] for layer in group), format_fvu)] if affine else []),
                "; ".join(marked),
            ]
        )
    if len(fvu) > 1:
        average = [format_fvu(results.mean("fvu")), format_percent(results.mean("variance_explained"))]
        average += [format_fvu(results.mean("fvu_linear"))] if affine else []
        rows.append([f"**{cell}**" for cell in ("average", *average)] + [""])
    return rows


def full_table(results: Results) -> list[list[str]]:
    """Header and rows: every layer, every score that all layers have, and the means."""
    columns = {key: column for key, column in SCORES.items() if results.mean(key) is not None}
    rows = [["Layer", *(name for name, _ in columns.values())]]
    for layer, scores in results.layers.items():
        rows.append([str(layer), *(form(scores[key]) for key, (_, form) in columns.items())])
    if len(results.layers) > 1:
        rows.append(["mean", *(form(results.mean(key)) for key, (_, form) in columns.items())])
    return rows


def figures(repository: Path, results: Results) -> list[dict[str, str]]:
    """Path, alternative text and caption of each figure that the folder holds."""
    layers = list(results.layers)
    shown = [{"path": f"figures/{COMPARISON}", "alt": comparison_alt(results), "caption": comparison_caption(results)}]
    for six in sixes(layers):
        ends = {}
        for layer in six:
            folder = repository / f"layer_{layer}"
            if len(read_history(folder)["step"]):
                ends[layer] = final_scores(folder)["fvu"]
        values = ", ".join(f"{format_fvu(value)} at layer {layer}" for layer, value in ends.items())
        shown.append(
            {
                "path": f"figures/{curves_name(six)}",
                "alt": f"Training-batch FVU by optimiser step on a log scale, one curve a layer. The last steps "
                f"average {values}.",
                "caption": f"Training curves, layer{'s' if len(six) > 1 else ''} {layer_ranges(six)}.",
            }
        )
    return [figure for figure in shown if (repository / figure["path"]).is_file()]


def comparison_alt(results: Results) -> str:
    fvu = results.values("fvu")
    best, hardest = min(fvu, key=fvu.__getitem__), max(fvu, key=fvu.__getitem__)
    kind = "Held-out" if results.held_out else "Training-batch"
    extent = (
        f"FVU runs from {format_fvu(fvu[best])} at layer {best} to {format_fvu(fvu[hardest])} at layer {hardest}"
        if best != hardest
        else f"FVU is {format_fvu(fvu[best])} at layer {best}"
    )
    affine = results.mean("fvu_linear")
    average = " on average" if len(fvu) > 1 else ""
    beside = f"; the best affine map's is {format_fvu(affine)}{average}" if affine is not None else ""
    return f"{kind} FVU (log scale) and variance explained by layer. {extent}{beside}."


def comparison_caption(results: Results) -> str:
    beside = " beside the best affine map of the same input" if results.values("fvu_linear") else ""
    kind = "Held-out" if results.held_out else "Training-batch"
    return f"{kind} FVU and variance explained of every layer{beside}."


def repository_tree(repository: Path) -> str:
    """The folder's files as a tree, the first layer's in full and the other layers as one line."""
    layers = list(layer_folders(repository))
    first = f"layer_{layers[0]}"
    files = sorted({p.name for p in repository.iterdir() if p.is_file() and p.name[0] != "."} | {"README.md"})
    lines = ["."]
    lines += [tree_line("├── ", name) for name in files]
    folders = [name for name in ("figures", first) if (repository / name).is_dir()]
    for folder in folders:
        last = folder == folders[-1] and len(layers) == 1
        lines.append(f"{'└' if last else '├'}── {folder}/")
        members = sorted((p.name for p in (repository / folder).iterdir() if p.name[0] != "."), key=by_number)
        stem = "    " if last else "│   "
        lines += [tree_line(f"{stem}{'└' if m == members[-1] else '├'}── ", m) for m in members]
    if len(layers) > 1:
        others = f"layer_{layers[1]}/" + (f" … layer_{layers[-1]}/" if len(layers) > 2 else "")
        lines.append(f"└── {others}".ljust(NOTES_AT) + "the same, a folder a layer")
    return "\n".join(lines)


def by_number(name: str) -> list[tuple[int, str]]:
    """Sorts file names as a reader counts: `_6_11` before `_12_17`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def tree_line(stem: str, name: str) -> str:
    note = FILE_NOTES.get(name, "the same weights for readers of the earlier set" if name.endswith(".pt") else "")
    return f"{stem}{name}".ljust(NOTES_AT if note else 0) + note


def training_rows(settings: dict[str, Any], fitted_on: dict[str, str | None]) -> list[tuple[str, str]]:
    """What is known of the fit, a row each; what was not recorded is left out."""
    fit = settings.get("fit") or {}
    steps = fit.get("steps", settings.get("max_steps"))
    rows = [("Text", text_row(settings, fitted_on)), ("Optimiser steps", f"{steps:,}" if steps is not None else None)]
    if steps:
        rows += [("Batch", batch_row(settings)), ("Tokens", f"{fit['tokens']:,}" if fit.get("tokens") else None)]
        rows += [("Optimiser", optimizer_row(settings)), ("Loss", "mean squared error on z-scored outputs")]
    starts = {
        "mlp": "closed form from the base's own MLP, the head solved by least squares",
        "random": "random (PyTorch's default for linear maps)",
    }
    normalizations = {
        "batch": "inputs and outputs z-scored, per feature, by each batch's own mean and standard deviation",
        "running": "inputs and outputs z-scored, per feature, by the statistics of all rows seen so far",
    }
    rows += [
        ("Start", starts.get(settings.get("init"))),
        ("Normalisation", normalizations.get(settings.get("normalization"))),
        ("Seed", str(settings["seed"]) if settings.get("seed") is not None else None),
        ("Device", device_row(fit)),
        ("Wall time", wall_time_row(fit)),
        ("Software", ", ".join(f"{name} {fit[name]}" for name in ("torch", "transformers") if fit.get(name))),
    ]
    return [(label, value) for label, value in rows if value]


def text_row(settings: dict[str, Any], fitted_on: dict[str, str | None]) -> str:
    parts = [fitted_on["link"]]
    parts += [f"configuration `{settings['dataset_config']}`"] if settings.get("dataset_config") else []
    parts += [f"split `{settings['split']}`"] if settings.get("split") else []
    packing = {
        True: "packed without padding",
        False: "each document cut to one sequence, padding left out of the loss and of every statistic",
    }
    if settings.get("imported") and settings.get("pack") is False:
        parts.append("each document cut to one sequence, its padding counted like text")
    elif isinstance(settings.get("pack"), bool):
        parts.append(packing[settings["pack"]])
    return ", ".join(parts)


def batch_row(settings: dict[str, Any]) -> str | None:
    sequences, length = settings.get("batch_size"), settings.get("seq_len")
    if not sequences or not length:
        return None
    return f"{sequences:,} sequences of {length:,} tokens ({sequences * length:,} rows)"


def optimizer_row(settings: dict[str, Any]) -> str | None:
    names = {
        "muon": "Muon on the matrices, AdamW on the biases",
        "normuon": "NorMuon on the matrices, AdamW on the biases",
        "adamw": "AdamW",
    }
    if settings.get("optimizer") not in names:
        return None
    labels = {
        "lr": "learning rate",
        "bias_lr": "of the biases",
        "lr_schedule": "schedule",
        "momentum": "momentum",
        "weight_decay": "weight decay",
    }
    parts = [f"{label} {settings[key]}" for key, label in labels.items() if settings.get(key) is not None]
    return "; ".join([names[settings["optimizer"]], ", ".join(parts)]) if parts else names[settings["optimizer"]]


def device_row(fit: dict[str, Any]) -> str | None:
    if not fit.get("device"):
        return None
    processes = f"{fit['processes']} × " if fit.get("processes", 1) > 1 else ""
    return f"{processes}{fit['device']}" + (f", computing in {fit['dtype']}" if fit.get("dtype") else "")


def wall_time_row(fit: dict[str, Any]) -> str | None:
    return f"{format_duration(fit['seconds'])} for all layers together, as measured" if fit.get("seconds") else None


def format_duration(seconds: float) -> str:
    """In the unit that a reader would say it in."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def latex(text: str) -> str:
    """Text as BibTeX prints it."""
    return re.sub(r"([&%$#_{}])", r"\\\1", " ".join(text.split()))
