"""Which metadata of a model card the Hub takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

LICENSES = r"mit|apache-2\.0|bsd-3-clause|cc-by-4\.0|cc-by-sa-4\.0|gpl-3\.0|lgpl-3\.0|unlicense|other|unknown"
REPO_ID = r"([\w.-]+/)?\w[\w.-]*"


def card_errors(metadata: Any) -> Iterator[str]:
    """What the Hub would not take of a model card's metadata."""

    def is_text(value: Any, pattern: str = r".+") -> bool:
        return isinstance(value, str) and re.fullmatch(pattern, value) is not None

    if not isinstance(metadata, dict):
        yield "the metadata must be a mapping"
        return
    if not is_text(metadata.get("license", "mit"), LICENSES):
        yield '"license" must be one of the identifiers that the Hub lists'
    for name, pattern in (("tags", r".+"), ("base_model", REPO_ID), ("datasets", REPO_ID), ("library_name", r"[\w-]+")):
        values = metadata.get(name, [])
        several = values if isinstance(values, list) else [values]
        if isinstance(values, str) and name in ("tags", "datasets"):
            yield f'"{name}" must be an array'
        elif not all(is_text(value, pattern) for value in several):
            yield f'"{name}" must hold {"repository ids" if pattern == REPO_ID else "text"}'
    index = metadata.get("model-index", [])
    try:
        for entry in index:
            good = is_text(entry["name"]) and entry["results"]
            for result in entry["results"]:
                data = result["dataset"]
                good = (
                    good
                    and is_text(result["task"]["type"])
                    and is_text(data["type"], REPO_ID)
                    and is_text(data["name"])
                )
                scores = [(metric["type"], metric["value"]) for metric in result["metrics"]]
                good = good and scores and all(is_text(kind) and value is not None for kind, value in scores)
            if not good:
                yield '"model-index" must hold models with a name and results, each with a task, a dataset and metrics'
    except (KeyError, TypeError) as error:
        yield f'"model-index" is not as it must be: {type(error).__name__} {error}'
