"""The model card: a repository folder's README.md, written from what the run holds and from nothing else."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from bilinear_tc.modeling_bilinear_tc import STATISTICS
from bilinear_tc.train import run as files
from bilinear_tc.train.errors import UserError, one_line
from bilinear_tc.train.files import written_whole
from bilinear_tc.train.finish import COLUMNS, STATES, finish_remarks
from bilinear_tc.train.measuring.evaluation import Evaluation
from bilinear_tc.train.run import Run
from bilinear_tc.upload import tables
from bilinear_tc.upload.base_card import BaseCard
from bilinear_tc.upload.figures import FIGURES, described_figures
from bilinear_tc.upload.findings import distrust, findings
from bilinear_tc.upload.names import HUB, described_base, described_text
from bilinear_tc.upload.pages import PAGES, page_name

PREDECESSOR = "Elriggs/hnn_transcoders"
NOTES_AT = 40  # column of the notes in the repository's tree
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
    run: Run,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    author: str | None = None,
    base_card: BaseCard | None = None,
    license: str | None = None,
    cast_to: str | None = None,
) -> Path:
    """Writes README.md into a repository folder, which is a run, once everything else is in it; returns the file.

    UserError if the run has no layers, its files are not readable, the card does not pass `check_card`, or it cannot be
    written.

    Args:
        run: the folder, whose names are those to publish; the card shows its figures and links to its files.
        repo_id: where it will be published; without it the snippets load from the current folder.
        revision: the branch that it will be published to, unless that is the main one.
        author: the name in the citation; by default the owner in `repo_id`.
        base_card: what the base says of itself.
        license: of the weights; by default the base's, if they are made of its own and it names one.
        cast_to: the weights' dtype, if it is another than the one that they were measured in.
    """
    context = card_context(run, repo_id=repo_id, author=author) | {"cast_to": cast_to, "revision": revision}
    context |= licensing(context["settings"]["init"], license, (base_card or BaseCard()).license)
    context["architecture"] = base_card and base_card.model_type
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    body = environment.get_template("model_card.md.jinja").render(context)
    card = f"---\n{card_data(context, run.scores).to_yaml()}\n---\n\n{body}"
    check_card(card, run.folder)
    with written_whole(run.folder) as scratch:
        (scratch / REPOCARD_NAME).write_text(card, encoding="utf-8", newline="\n")
    return run.folder / REPOCARD_NAME


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
    prose = re.sub(r"^(`{3,}).*?^\1$", "", card, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)", prose)
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
    names = {
        "fvu_ordinary": "FVU on ordinary tokens",
        "fvu": "FVU",
        "variance_explained": "Variance explained",
        "jacobian_cosine": "Jacobian cosine",
    }
    families = dict.fromkeys(filter(None, [context["config"].model_type, base["family"], context["architecture"]]))
    return ModelCardData(
        base_model=base["name"] if base["url"] else None,
        datasets=[context["fitted_on"]["name"]] if context["fitted_on"]["url"] else None,
        library_name="transformers",
        tags=["mechanistic-interpretability", "transcoding", "bilinear", *families, "mlp"],
        **context["license"],
        model_name=context["slug"],
        eval_results=[
            EvalResult(
                **source, metric_type=score, metric_name=f"{name} ({mean}, {kind})", metric_value=round(mean_score, 6)
            )
            for score, name in names.items()
            if (mean_score := scores.mean(score)) is not None
        ],
    )


def licensing(init: str | None, license: str | None, of_base: dict[str, str]) -> dict[str, Any]:
    """The license of the weights, and whether they are made of the base's own, as the closed form is."""
    derived = init != "random"
    named = {"license": license} if license else of_base if derived else {}
    return {"license": named, "derived": derived, "base_license": of_base.get("license")}


def card_context(run: Run, *, repo_id: str | None, author: str | None) -> dict[str, Any]:
    """Everything that the template prints."""
    scores, layers, repository = run.scores, run.layers, run.folder
    example = 3 if 3 in layers else layers[0]
    config = run.config(example)
    settings = defaultdict(lambda: None, run.recipe_settings | run.settings(example))  # None: not recorded
    base = described_base(config.base_model or settings["base"]) | {"revision": config.base_revision}
    fitted_on = described_text(settings["dataset"])
    joint = settings["joint"] or {}
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
        "text": described_text(scores.dataset),
        "scores": scores,
        "settled_steps": min(files.SETTLED_STEPS, longest),
        "settings": settings,
        "fit": defaultdict(lambda: None, settings.get("fit") or {}),
        "kept_starts": []
        if joint
        else [n for n in layers if (run.settings(n).get("fit") or {}).get("kept") == "start"],
        "joint": defaultdict(lambda: None, joint),
        "before_and_after": before_and_after(joint) if "before" in joint else None,
        "joint_remarks": finish_remarks(joint) if "before" in joint else [],
        "tables": tables,
        "figures": figures,
        "pages": {n: f"{PAGES}/{page_name(n)}" for n in layers if (repository / PAGES / page_name(n)).is_file()},
        "tree": "\n".join([".", *repository_tree(repository, layers)]),
        "has_history": longest > 0,
        "checkpoint": next((path.name for path in sorted((repository / f"layer_{example}").glob("*.pt"))), None),
        "findings": findings(scores),
        "distrust": [*distrust(scores)],
        "predecessor": f"[{PREDECESSOR}]({HUB}/{PREDECESSOR})",
        "statistics": STATISTICS,
        "files": files,
        "figures_folder": FIGURES,
    }


def before_and_after(joint: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the table of a set before and after its joint finish."""
    cells = [
        [name, *(format(joint[name][score], form) for score, (_, form) in COLUMNS.items())]
        for name in STATES
        if name in joint
    ]
    return [["joint finish", *(heading for heading, _ in COLUMNS.values())], *cells]


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
    if (repository / PAGES).is_dir():
        entries[f"{PAGES}/"] = "a page a layer, to open in a browser"
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
