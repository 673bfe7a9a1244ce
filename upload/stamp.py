"""Whose words a card holds, as its last line tells: this command's, or somebody's own, which are to be kept."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

Writer = Literal["generated", "own", "edited"]

# A card's last line as it was published: whose words it holds, and a hash of them.
STAMP = re.compile(r"\s*<!-- bilinear-tc: (generated|own) card, sha256 ([0-9a-f]{64}) -->\s*\Z")
METADATA = re.compile(r"\A---\n.*?\n---\s*", re.DOTALL)


def stamped(card: str, writer: Writer) -> str:
    """A card that can be told from one that was edited since."""
    body = STAMP.sub("", card).rstrip()
    return f"{body}\n\n<!-- bilinear-tc: {writer} card, sha256 {_hash(body)} -->\n"


def writer_of(card: str) -> Writer:
    """Who wrote a card: "own" is somebody's as it was published, "edited" one that stands nowhere as it was published.

    One without a word below its metadata, as the Hub itself makes it for a new repository, counts as generated.
    """
    stamp, body = STAMP.search(card), STAMP.sub("", card).rstrip()
    if not METADATA.sub("", f"{body}\n").strip():
        return "generated"
    if stamp is None or stamp[2] != _hash(body):
        return "edited"
    return "own" if stamp[1] == "own" else "generated"


def _hash(body: str) -> str:
    """Of the words alone: an editor may change how lines end."""
    return hashlib.sha256(" ".join(body.split()).encode()).hexdigest()
