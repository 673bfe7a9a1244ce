"""What a base says of itself: the license that a set derived from its weights comes under, and its architecture."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.constants import REPOCARD_NAME

from bilinear_tc.train.base import base_location
from bilinear_tc.train.errors import one_line
from bilinear_tc.train.files import read_json
from bilinear_tc.train.run import Run
from bilinear_tc.upload.names import published_base, recorded_base

PLAIN = {"license": r"[a-z0-9][a-z0-9.+-]*", "license_name": r"[\w.+-]+", "license_link": r"https://[\w./%#?=&~+-]+"}


@dataclass(frozen=True)
class BaseCard:
    """What is known of a base.

    Attributes:
        license: its card's metadata on it: `license`, and of one that the Hub does not list also `license_name` and
            `license_link`; empty if it names none.
        model_type: its configuration's, such as gpt_neox.
    """

    license: dict[str, str] = field(default_factory=dict)
    model_type: str | None = None


def read_base_card(run: Run, base_model: str | None, *, offline: bool) -> BaseCard:
    """What lies beside the weights of a run's base, or on the Hub; what cannot be read is said, and counts as not told.

    `base_model` is the Hub id of a base that lay in a folder; `offline` asks no network.
    """
    recorded, published = recorded_base(run), published_base(run, base_model)
    if published is None:
        return BaseCard()

    def find(name: str) -> Path:
        there = Path(base_location(recorded or published), name)
        place: dict[str, Any] = {"revision": run.config(run.layers[0]).base_revision, "local_files_only": offline}
        return there if there.is_file() else Path(hf_hub_download(published, name, **place))

    license: dict[str, str] = {}
    model_type = None
    try:
        model_type = read_json(find("config.json")).get("model_type")
        told = ModelCard.load(find(REPOCARD_NAME), ignore_metadata_errors=True).data.to_dict()
        plain = {name: told[name] for name, form in PLAIN.items() if re.fullmatch(form, str(told.get(name, "")))}
        license = plain if "license" in plain else {}
    except Exception as error:  # no such file, no access to it, no network, or a damaged one
        print(f"what {published} says of itself could not all be read: {one_line(error, most=160)}")
    return BaseCard(license, model_type if re.fullmatch(r"[\w.-]+", str(model_type)) else None)
