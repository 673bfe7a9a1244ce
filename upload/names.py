"""What a publication calls the base and the text: Hub ids with their links, names of files; never a path from here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from bilinear_tc.train.base import REPOSITORY_ROOT, base_location
from bilinear_tc.train.errors import UserError
from bilinear_tc.train.run import Run
from bilinear_tc.train.text.documents import PYTHON_STDLIB

HUB = "https://huggingface.co"
SHIPPED = "train/quickstart"  # the base that every clone holds
PYTHON_STDLIB_NAME = "the Python standard library's source"
FILE = re.compile(r"\.(txt|jsonl?|zst|gz|parquet|py|csv)$|[*,]")


def published_base(run: Run, base_model: str | None) -> str | None:
    """The base's Hub id, or where it lies in every clone; None if the run does not name its base.

    UserError if it is a folder of this machine alone, and `base_model`, the Hub id to give it, is None.
    """
    name = recorded_base(run)
    if base_model or name is None:
        return base_model
    if Path(base_location(name)).resolve() == (REPOSITORY_ROOT / SHIPPED).resolve():
        return SHIPPED
    if base_location(name) != name or Path(name).exists() or not is_hub_id(name):
        raise UserError(f"the base {name} is a folder, which readers do not have: name its Hub id with --base_model")
    return name


def recorded_base(run: Run) -> str | None:
    """The base as the fit was given it."""
    return run.config(run.layers[0]).base_model or run.recipe_settings.get("base")


def renamed(content: dict[str, Any], base: str | None) -> dict[str, Any]:
    """Settings, a configuration or an evaluation as it is published: without a path of this machine."""
    words = {key: value for key, value in content.items() if isinstance(value, str)}
    names: dict[str, Any] = {key: base for key in ("base", "base_model") if content.get(key) is None or key in words}
    if isinstance(content.get("base"), dict):  # an evaluation's, with its loss
        names["base"] = content["base"] | {"model": base}
    if dataset := words.get("dataset"):
        names["dataset"] = text_name(dataset)
    names |= {key: split_name(words[key], dataset) for key in ("split", "eval_split") if key in words}
    return {key: names.get(key, value) for key, value in content.items() if key not in ("output_dir", "from_run")}


def text_name(dataset: str) -> str:
    """A Hub id, or the names of local files; that of a folder ends in a slash."""
    if not is_local_text(dataset):
        return dataset
    names = ",".join(last_part(part) for part in dataset.split(","))
    return names if FILE.search(names) else f"{names}/"


def split_name(split: str, dataset: str | None) -> str:
    """A split's name, a file's path in a data set on the Hub, or the name of a local file."""
    elsewhere = re.match(r"[/\\~.]|\w:", split) or Path(split).exists()
    return last_part(split) if elsewhere or (dataset and is_local_text(dataset)) else split


def is_local_text(dataset: str) -> bool:
    return dataset != PYTHON_STDLIB and bool(not is_hub_id(dataset) or FILE.search(dataset) or Path(dataset).exists())


def described_base(name: str | None) -> dict[str, Any]:
    """How the card names the base, which is as `published_base` says; `family` is its id's name without its size."""
    on_hub = name not in (None, SHIPPED)
    local = "ships with the package bilinear-tc" if name else "not recorded"
    base = described(name or "an unnamed base", f"{HUB}/{name}" if on_hub else None, local)
    family = re.split(r"-\d", base["short"], maxsplit=1)[0].lower() if on_hub else None
    return base | {"family": family}


def described_text(dataset: str | None) -> dict[str, Any]:
    """How the card names a text source: a Hub id with its link, or the name of local files without one."""
    if dataset is None:
        return {"name": "unnamed text", "link": "unnamed text", "url": None, "slug": "unnamed"}
    if dataset == PYTHON_STDLIB:
        return {"name": PYTHON_STDLIB_NAME, "link": PYTHON_STDLIB_NAME, "url": None, "slug": dataset}
    if not is_local_text(dataset):
        return {**described(dataset, f"{HUB}/datasets/{dataset}", ""), "slug": dataset}
    text = described(text_name(dataset), None, "local files")
    return {**text, "name": text["short"], "slug": re.sub(r"[^\w.-]+", "-", text["short"]).strip("-.") or "local"}


def described(name: str, url: str | None, local: str) -> dict[str, Any]:
    """What has a page on the Hub by its id and a link to it, anything else by its own name alone."""
    short = last_part(name)
    return {"name": name, "short": short, "url": url, "link": f"[{name}]({url})" if url else f"`{short}` ({local})"}


def last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
