"""What others put into a repository folder or onto the Hub: it is kept, or goes only by --overwrite, which says so."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub.constants import REPOCARD_NAME

from bilinear_tc.train.errors import UserError, one_line
from bilinear_tc.train.run import CODE_FILES
from bilinear_tc.upload.hub import HubRepository, RemoteFile
from bilinear_tc.upload.local_files import LocalFile, hash_file
from bilinear_tc.upload.repository import LAYOUT
from bilinear_tc.upload.stamp import writer_of


def own_card(folder: Path, file: str | None, *, overwrite: bool) -> str | None:
    """The card to publish in place of a generated one: `file`, or one in the repository folder that somebody edited.

    Raises:
        UserError: `file` cannot be read, or the folder holds files that no publication puts there, and none may go.
    """
    there = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    foreign = sorted(name for path in there if not LAYOUT.fullmatch(name := path.relative_to(folder).as_posix()))
    if foreign:
        ask(f"delete {shortened(foreign)} in {folder}", "move what you need", overwrite=overwrite)
    readme = folder / REPOCARD_NAME
    try:
        card = None if file is None else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--card must name a text file in UTF-8, got {file}: {one_line(error)}") from error
    before = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    writer = writer_of(before)
    if writer == "generated" or card == before:
        return card
    if card is None and not overwrite:
        print(f"{readme} was written by hand, and is kept (--overwrite has it written anew)")
        return before
    if writer == "edited" or overwrite:
        ask(f"replace {readme}, which was written by hand", "move it elsewhere", overwrite=overwrite)
    return card


def with_kept_card(
    hub: HubRepository, local: Mapping[str, LocalFile], remote: Mapping[str, RemoteFile], commit: str, overwrite: bool
) -> Mapping[str, LocalFile]:
    """The set, with the Hub's card in place of the folder's if somebody wrote it there and it may not go."""
    if REPOCARD_NAME not in hub.changes(local, remote).replaced:
        return local
    with tempfile.TemporaryDirectory() as cache:
        kept = hash_file(hub.fetch(REPOCARD_NAME, commit, cache))  # it is there already, so that nothing is sent of it
        writer = writer_of(kept.path.read_text(encoding="utf-8", errors="replace"))
    here = writer_of(local[REPOCARD_NAME].path.read_text(encoding="utf-8"))
    if writer == "generated" or writer == here == "own":
        return local
    if here == "own" or overwrite:
        ask(f"replace the card of {hub.repo_id}, which was edited there", "make one of the two", overwrite=overwrite)
        return local
    print(f"the card of {hub.repo_id} was written by hand, and is kept (--overwrite replaces it)")
    return {**local, REPOCARD_NAME: kept}


def losses(hub: HubRepository, local: Mapping[str, LocalFile], remote: Mapping[str, RemoteFile]) -> str | None:
    """What a publication would take from the Hub beyond an update of the layers that it holds, None if nothing."""
    changes = hub.changes(local, remote)
    replaced = [] if CODE_FILES[1] in remote else [path for path in changes.replaced if path != REPOCARD_NAME]
    layers = layers_in(changes.removed) - layers_in(local)
    removed = sorted(layers) if CODE_FILES[1] in remote else changes.removed
    parts = [f"{verb} {shortened(names)}" for verb, names in (("replace", replaced), ("remove", removed)) if names]
    return f"{' and '.join(parts)} of {hub.repo_id}" if parts else None


def ask(losses: str, otherwise: str, *, overwrite: bool) -> None:
    """Says what goes; UserError, with what to do otherwise, unless it may."""
    if not overwrite:
        raise UserError(f"publishing would {losses}: {otherwise}, or add --overwrite")
    print(f"--overwrite: publishing will {losses}")


def layers_in(paths: Iterable[str]) -> set[str]:
    return {path.split("/")[0] for path in paths if path.startswith("layer_")}


def shortened(names: list[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
