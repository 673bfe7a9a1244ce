"""The model card: a repository folder's README.md, written from what the run holds and from nothing else."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from bilinear_tc.configuration_bilinear_tc import BilinearTCConfig
from bilinear_tc.modeling_bilinear_tc import STATISTICS
from bilinear_tc.train import run as files
from bilinear_tc.train.base import base_location
from bilinear_tc.train.errors import UserError, one_line
from bilinear_tc.train.files import written_whole
from bilinear_tc.train.measuring.evaluation import Evaluation
from bilinear_tc.train.run import Run
from bilinear_tc.train.text.documents import PYTHON_STDLIB
from bilinear_tc.upload import tables
from bilinear_tc.upload.figures import FIGURES, described_figures
from bilinear_tc.upload.findings import findings

HUB = "https://huggingface.co"
LICENSE = "mit"
NOTES_AT = 40  # column of the notes in the repository's tree
PYTHON_STDLIB_NAME = "the Python standard library's source"
FILE_NOTES = {
    REPOCARD_NAME: "this card",
    **dict(zip(files.CODE_FILES, ("the configuration class", "the model class"), strict=True)),
    files.RECIPE: "every setting of the fit",
    files.EVALUATION: "the held-out scores at full precision",
    files.CONFIG: "dimensions, form, and the MLP that the layer stands in for",
    files.WEIGHTS: "weights and z-score statistics",
    files.SETTINGS: "settings and cost of the fit, for a reader",
    files.HISTORY: "scores of every training batch",
}


def write_model_card(
    run: Run, repository: Path, *, repo_id: str | None, author: str | None, cast_to: str | None = None
) -> Path:
    """Writes README.md into a repository folder, once everything else is in it; returns the file.

    UserError if the run has no layers, its files are not readable, the card does not pass `check_card`, or it cannot be
    written.

    Args:
        run: the run that the repository was built from.
        repository: the folder, laid out like a run; the card shows its figures and links to its files.
        repo_id: where it will be published; without it the snippets load from the current folder.
        author: the name in the citation; by default the owner in `repo_id`.
        cast_to: the weights' dtype, if it is another than the one that they were measured in.
    """
    context = card_context(run, repository, repo_id=repo_id, author=author) | {"cast_to": cast_to}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    body = environment.get_template("model_card.md.jinja").render(context)
    card = f"---\n{card_data(context, run.scores).to_yaml()}\n---\n\n{body}"
    check_card(card, repository)
    with written_whole(repository) as scratch:
        (scratch / REPOCARD_NAME).write_text(card, encoding="utf-8", newline="\n")
    return repository / REPOCARD_NAME


def check_card(card: str, repository: Path) -> None:
    """What can be checked of a card without the Hub (`ModelCard.validate` asks the Hub itself).

    UserError if its metadata does not parse back, names a base or data set that cannot be on the Hub, or a relative
    link or image leads to no file of the folder.
    """
    data = ModelCard(card).data.to_dict()
    for name in filter(None, [data.get("base_model"), *(data.get("datasets") or [])]):
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UserError(f"the card's metadata names {name!r}, which is not a Hub id: {one_line(error)}") from error
    missing = [link for link in relative_links(card) if not (repository / link).exists()]
    if missing:
        raise UserError(f"the card links to {', '.join(missing)}, which {repository} does not hold")


def relative_links(card: str) -> list[str]:
    """Targets of a card's Markdown links and images that lie in its own repository."""
    targets = re.findall(r"\]\(([^)\s]+)", re.sub(r"```.*?```", "", card, flags=re.DOTALL))
    return [target for target in targets if not re.match(r"[a-z]+:|#", target) and target != REPOCARD_NAME]


def card_data(context: dict[str, Any], scores: Evaluation) -> ModelCardData:
    """The card's metadata, as the Hub reads it."""
    base, text, layers = context["base"], context["text"], context["layers"]
    mean = f"mean over layers {tables.layer_ranges(layers)}" if len(layers) > 1 else "one layer"
    source = {
        "task_type": "other",
        "task_name": "Approximating MLP outputs",
        "dataset_type": text["slug"],
        "dataset_name": text["name"],
        "dataset_split": scores.split,
    }
    kind = "held out" if scores.held_out else "training batches"
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
                metric_type=score,
                metric_name=f"{name} ({mean}, {kind})",
                metric_value=round(fmean(scores.values(score).values()), 6),
            )
            for score, name in (("fvu", "FVU"), ("variance_explained", "Variance explained"))
        ],
    )


def card_context(run: Run, repository: Path, *, repo_id: str | None, author: str | None) -> dict[str, Any]:
    """Everything that the template prints."""
    scores, layers = run.scores, run.layers
    example = 3 if 3 in layers else layers[0]
    config = run.config(example)
    settings = defaultdict(lambda: None, run.recipe_settings | run.settings(example))  # None: not recorded
    base = describe_base(config, settings)
    fitted_on = describe_text(settings.get("dataset"))
    longest = max(len(run.history(layer)["step"]) for layer in layers)
    figures = [figure for figure in described_figures(run) if (repository / FIGURES / figure["name"]).is_file()]
    return {
        "title": f"Bilinear MLP transcoders for {base['short']}",
        "slug": repo_id.split("/")[-1] if repo_id else f"{base['short']}-bilinear-transcoders",
        "repo_id": repo_id,
        "where": repo_id or ".",
        "url": f"{HUB}/{repo_id}" if repo_id else None,
        "author": latex(author or (repo_id.split("/")[0] if repo_id and "/" in repo_id else "")),
        "year": datetime.now(timezone.utc).year,
        "layers": layers,
        "example": example,
        "base": base,
        "config": config,
        "fitted_on": fitted_on,
        "text": describe_text(scores.dataset),
        "scores": scores,
        "settled_steps": min(files.SETTLED_STEPS, longest),
        "settings": settings,
        "fit": defaultdict(lambda: None, settings.get("fit") or {}),
        "tables": tables,
        "figures": figures,
        "tree": "\n".join([".", *repository_tree(repository, layers)]),
        "has_history": longest > 0,
        "checkpoint": next((path.name for path in sorted((repository / f"layer_{example}").glob("*.pt"))), None),
        "findings": findings(scores),
        "statistics": STATISTICS,
        "files": files,
        "figures_folder": FIGURES,
    }


def describe_base(config: BilinearTCConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """How the card names the base: a Hub id with its link, or the name of a local folder without one.

    `family` is the tag: the id's name without its size (`EleutherAI/pythia-410m` → pythia), or for a local base the
    architecture that its module paths begin with (`gpt_neox.layers.3.mlp` → gpt_neox).
    """
    name = config.base_model or settings.get("base") or "an unnamed base"
    on_hub = is_hub_id(name) and base_location(name) == name and not Path(name).exists()
    described = describe(name, f"{HUB}/{name}" if on_hub else None, "a local model")
    without_size = re.split(r"-\d", described["short"], maxsplit=1)[0].lower()
    architecture = (config.mlp_path or "transformer").split(".")[0]
    return described | {"revision": config.base_revision, "family": without_size if on_hub else architecture}


def describe_text(dataset: str | None) -> dict[str, Any]:
    """How the card names a text source: a Hub id with its link, or the name of local files without one."""
    if dataset is None:
        return {"name": "unnamed text", "link": "unnamed text", "url": None, "slug": "unnamed"}
    if dataset == PYTHON_STDLIB:
        return {"name": PYTHON_STDLIB_NAME, "link": PYTHON_STDLIB_NAME, "url": None, "slug": dataset}
    is_file = re.search(r"\.(txt|jsonl?|zst|gz|parquet|py|csv)$|[*,]", dataset)
    on_hub = is_hub_id(dataset) and not is_file and not Path(dataset).exists()
    described = describe(dataset, f"{HUB}/datasets/{dataset}" if on_hub else None, "local files")
    slug = re.sub(r"[^\w.-]+", "-", described["short"]).strip("-.") or "local"
    return described | ({"slug": dataset} if on_hub else {"name": described["short"], "slug": slug})


def describe(name: str, url: str | None, local: str) -> dict[str, Any]:
    """What has a page on the Hub by its id and a link to it, anything else by its own name alone."""
    short = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return {"name": name, "short": short, "url": url, "link": f"[{name}]({url})" if url else f"`{short}` ({local})"}


def is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def repository_tree(repository: Path, layers: Sequence[int]) -> Iterator[str]:
    """The lines of the folder's files as a tree: the first layer's in full, the other layers in one line."""

    def notes(names: Iterable[str]) -> dict[str, str]:
        others = ("the same weights for readers of the earlier set" if name.endswith(".pt") else "" for name in names)
        return {name: FILE_NOTES.get(name, other) for name, other in zip(names, others, strict=True)}

    def files(folder: Path) -> set[str]:
        return {path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}

    entries: dict[str, Any] = notes(sorted(files(repository) | {REPOCARD_NAME}))
    for folder in (FIGURES, f"layer_{layers[0]}"):
        if (repository / folder).is_dir():
            entries[f"{folder}/"] = notes(sorted(files(repository / folder), key=by_number))
    if len(layers) > 1:
        last = f" … layer_{layers[-1]}/" if len(layers) > 2 else ""
        entries[f"layer_{layers[1]}/{last}"] = "the same, a folder a layer"
    return branches(entries)


def branches(entries: dict[str, Any], stem: str = "") -> Iterator[str]:
    """The lines of a tree, by name the note on a file or the entries of a folder."""
    for name, content in entries.items():
        last = name == [*entries][-1]
        line = f"{stem}{'└' if last else '├'}── {name}"
        if isinstance(content, dict):
            yield line
            yield from branches(content, stem + ("    " if last else "│   "))
        else:
            yield line.ljust(NOTES_AT if content else 0) + content


def by_number(name: str) -> list[tuple[int, str]]:
    """Sorts file names as a reader counts: `_6_11` before `_12_17`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def latex(text: str) -> str:
    """Text as BibTeX prints it."""
    return re.sub(r"([&%$#_{}])", r"\\\1", " ".join(text.split()))
