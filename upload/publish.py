"""Publishes a run as a Hub repository, in one commit: `python upload/publish.py RUN --repo_id you/name`."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModel, HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from bilinear_tc.modeling_bilinear_tc import BilinearTC
from bilinear_tc.train.errors import UserError, command_line, one_line
from bilinear_tc.train.files import locked, sha256_of
from bilinear_tc.train.run import WEIGHTS, Run
from bilinear_tc.upload.base_card import PLAIN, read_base_card
from bilinear_tc.upload.hub import Changes, HubRepository, HubUnreachable, State
from bilinear_tc.upload.local_files import LocalFile, list_files
from bilinear_tc.upload.names import is_hub_id
from bilinear_tc.upload.others import ask, layers_in, losses, own_card, shortened, with_kept_card
from bilinear_tc.upload.reading import read_set
from bilinear_tc.upload.repository import DTYPES, build_repository, check_publishable, load_layer

FOLDER = "repository"


@dataclass
class Publication:
    """What to publish, where and how."""

    repo_id: str = field(default="", metadata={"help": "The Hub repository, as you/name."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    revision: str = field(default="main", metadata={"help": "The branch to publish to; created if it is missing."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of changing the branch."})
    tag: str | None = field(default=None, metadata={"help": "A tag for the published commit."})
    message: str | None = field(default=None, metadata={"help": "The commit's message."})
    author: str | None = field(default=None, metadata={"help": "The name in the card's citation."})
    base_model: str | None = field(default=None, metadata={"help": "The Hub id of a base that lay in a folder."})
    license: str | None = field(
        default=None,
        metadata={
            "help": "The license of the weights, as the Hub spells it. Default: the base's, whose weights the set "
            "starts from; none if it starts from noise, or the base's card names none."
        },
    )
    card: str | None = field(
        default=None, metadata={"help": "A card of your own to publish in place of the written one."}
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Let go what others put there: cards edited by hand, foreign files, layers that this run lacks."
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Only write RUN/repository and list what publishing it would change."}
    )
    allow_partial: bool = field(
        default=False, metadata={"help": "Publish although layers of the recipe are missing or not fitted to the end."}
    )
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Type of the published weights; by default as in the run."}
    )
    with_pt: bool = field(default=False, metadata={"help": "Add each layer's checkpoint in the earlier .pt layout."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that lies beside the base, as --with_pages needs of some bases."}
    )
    with_pages: bool = field(
        default=False,
        metadata={
            "help": "Add a page a layer, of its strongest units and where in held-out text they are highest and "
            "lowest, at the cost of a pass of the base over that. upload/explore.py writes pages of what you ask for."
        },
    )

    def __post_init__(self) -> None:
        """Refuses impossible values.

        Raises:
            UserError: in one sentence.
        """
        try:
            validate_repo_id(self.repo_id)
            if "/" not in self.repo_id:
                raise HFValidationError("it names no owner")
        except HFValidationError as error:
            raise UserError(f"--repo_id must read like you/name, got {self.repo_id!r}: {one_line(error)}") from error
        if self.base_model is not None and (not is_hub_id(self.base_model) or "/" not in self.base_model):
            raise UserError(f"--base_model must be a Hub id that reads like owner/name, got {self.base_model!r}")
        if self.license is not None and not re.fullmatch(PLAIN["license"], self.license):
            raise UserError(f"--license must read as the Hub spells it, such as apache-2.0, got {self.license!r}")
        if self.save_dtype not in (None, *DTYPES):
            raise UserError(f"--save_dtype must be one of {', '.join(DTYPES)}, got {self.save_dtype!r}")
        if self.create_pr and self.tag:
            raise UserError("--tag cannot be given with --create_pr: tag the commit once the pull request is merged")


def publish(run: Run, settings: Publication) -> State | None:
    """Publishes a run, reads it back and prints where it is; a dry run only writes the folder and lists the changes.

    Returns:
        The commit that holds the set, None from a dry run.

    Raises:
        UserError: the run is not fit to publish, its folder cannot be written, or the Hub refused or does not hold
            what was sent.
    """
    if settings.with_pages and run.recipe.eval_split is None:
        raise UserError(
            "--with_pages reads held-out text, and the run names none: run the fit's command again with an "
            "--eval_split, which measures the set too, or leave --with_pages out"
        )
    keep_layers = settings.allow_partial and not settings.overwrite
    hub = HubRepository(
        settings.repo_id, settings.revision, keep_layers=keep_layers, attempts=1 if settings.dry_run else 5
    )
    offline = settings.dry_run and not hub.answers()
    check_publishable(run, settings.base_model, allow_partial=settings.allow_partial, offline=offline)
    if not settings.dry_run:
        hub.check_token()
    read = None
    if settings.with_pages:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        held_out = dataclasses.replace(
            run.recipe,
            layers=None,
            dtype="float32",
            trust_remote_code=settings.trust_remote_code,  # a set of somebody else's must not say so
        )
        read = read_set(run, ["top"], held_out, device)
    folder = build_repository(
        run,
        run.folder / FOLDER,
        repo_id=settings.repo_id,
        revision=None if settings.revision == "main" else settings.revision,
        author=settings.author,
        base_model=settings.base_model,
        base_card=read_base_card(run, settings.base_model, offline=offline),
        license=settings.license,
        card=own_card(run.folder / FOLDER, settings.card, overwrite=settings.overwrite),
        save_dtype=settings.save_dtype,
        with_pt=settings.with_pt,
        read=read,
    )
    local = list_files(folder)
    print(f"{folder}: {counted(len(local), 'file')}, {readable_size(sum(file.size for file in local.values()))}")
    if settings.dry_run:
        show_plan(hub, local, overwrite=settings.overwrite)
        return None
    return send(hub, settings, run, local)


def send(hub: HubRepository, settings: Publication, run: Run, local: Mapping[str, LocalFile]) -> State:
    """Makes the Hub hold the set, reads it back, tags it and prints where it is."""
    parent = hub.ensure(private=settings.private)
    remote = hub.files(parent)
    local = with_kept_card(hub, local, remote, parent, settings.overwrite)
    if gone := losses(hub, local, remote):
        ask(gone, "name another --repo_id", overwrite=settings.overwrite)
    if hub.keep_layers and (others := layers_in(remote) - layers_in(local)):
        print(f"left as it was on the Hub: {shortened(sorted(others))}")
    state = bring_up_to_date(hub, settings, run, local, parent, hub.changes(local, remote))
    verify(hub, state.commit, local, run, settings.save_dtype)
    if settings.tag:
        hub.tag(settings.tag, state.commit, settings.message)
    print(f"{state.url}\n{load_line(settings, state, run.layers[0])}")
    return state


def bring_up_to_date(
    hub: HubRepository, settings: Publication, run: Run, local: Mapping[str, LocalFile], parent: str, changes: Changes
) -> State:
    """Makes the Hub hold the set, unless it does already."""
    state = None if changes else hub.state(parent)
    if changes and settings.create_pr:
        state = hub.find_pull_request(local, parent)
    if state:
        print(f"{settings.repo_id} holds this set already, at {state.commit[:12]}: nothing was uploaded")
        return state
    if settings.tag and settings.tag in hub.tags():
        raise UserError(f"{settings.repo_id} has a tag {settings.tag} already: choose another with --tag")
    message = settings.message or f"Publish {counted(len(run.layers), 'bilinear transcoder')}"
    state = hub.publish(local, changes, parent=parent, message=message, create_pr=settings.create_pr)
    print(f"published as {state.commit[:12]}: {summary(changes)}")
    return state


def show_plan(hub: HubRepository, local: Mapping[str, LocalFile], *, overwrite: bool = False) -> None:
    """Lists the files with their sizes and, if the Hub can be asked, what publishing them would change."""
    marks: dict[str, str] = {}
    removed: list[str] = []
    try:
        head = hub.head() or hub.head("main")  # where a new branch starts
        remote = hub.files(head) if head else {}
        local = with_kept_card(hub, local, remote, head or "", overwrite)
    except HubUnreachable as error:
        outcome = f"the files were not compared with {hub.repo_id} on the Hub: {error}"
    else:
        changes = hub.changes(local, remote)
        listed = {"=": changes.kept, "+": changes.added, "~": changes.replaced}
        marks = {path: mark for mark, paths in listed.items() for path in paths}
        removed = changes.removed
        outcome = f"publishing to {hub.repo_id} means {summary(changes)}"
        if gone := losses(hub, local, remote):
            outcome += f"; it would {gone}, which needs --overwrite"
    for path, file in local.items():
        print(f"{marks.get(path, ' ')} {readable_size(file.size):>9}  {path}")
    for path in removed:
        print(f"- {'':>9}  {path}")
    print(f"dry run, nothing was sent; {outcome}")


def verify(hub: HubRepository, commit: str, local: Mapping[str, LocalFile], run: Run, save_dtype: str | None) -> None:
    """Reads the set back from the Hub at one commit: sizes and hashes of all files, and every layer as users load it.

    The weights of the first layer are fetched. Those of the others, which the Hub holds by the same hash, are linked to
    the local ones where a download would put them, so that a set of gigabytes does not travel twice.

    UserError if the Hub holds something else than what was sent, or a layer does not load.
    """
    remote = hub.files(commit)
    changes = hub.changes(local, remote)
    wrong = changes.added + changes.replaced + changes.removed
    with tempfile.TemporaryDirectory() as cache:
        small = [path for path in changes.kept if not remote[path].large]
        snapshot = Path(
            hub.ask(
                lambda: hub.api.snapshot_download(hub.repo_id, revision=commit, cache_dir=cache, allow_patterns=small)
            )
        )
        wrong += [path for path in small if sha256_of(snapshot / path) != local[path].sha256]
        if wrong:
            raise UserError(
                f"{hub.repo_id} at {commit[:12]} does not hold {', '.join(sorted(wrong))} as they were sent: "
                "run the command again"
            )
        for layer in run.layers:
            weights = f"layer_{layer}/{WEIGHTS}"
            if layer != run.layers[0] and remote[weights].large:
                (snapshot / weights).symlink_to(local[weights].path.resolve())
            published = load_published(hub, commit, layer, cache)
            kept = load_layer(run, layer, DTYPES[save_dtype] if save_dtype else None)
            if not same_outputs(published.to(kept.dtype), kept):
                raise UserError(
                    f"layer_{layer} of {hub.repo_id} at {commit[:12]} gives other outputs than the run's: "
                    "run the command again, and report it if it stays so"
                )
    print(f"read back {counted(len(local), 'file')}; every layer loads, and gives the run's outputs")


def load_published(hub: HubRepository, commit: str, layer: int, cache: str) -> Any:
    """A layer as users load it, code included."""
    place = {"subfolder": f"layer_{layer}", "revision": commit, "cache_dir": cache}
    try:
        return hub.ask(lambda: AutoModel.from_pretrained(hub.repo_id, trust_remote_code=True, **place))
    except UserError:
        raise
    except Exception as error:  # what its users would see
        raise UserError(
            f"layer_{layer} of {hub.repo_id} is published at {commit[:12]}, but does not load: {one_line(error)}"
        ) from error


@torch.no_grad()
def same_outputs(one: BilinearTC, other: BilinearTC) -> bool:
    """Whether two transcoders give the same outputs, bit for bit, on inputs of the scale that they were fitted on.

    On other inputs half precision may overflow; if it does so in both alike, NaN counts as equal to NaN.
    """
    noise = torch.randn(64, other.config.n_inputs, generator=torch.Generator().manual_seed(0))
    x = other.input_mean + other.input_std * noise
    return bool(torch.isclose(one(x), other(x), rtol=0, atol=0, equal_nan=True).all())


def load_line(settings: Publication, state: State, layer: int) -> str:
    """The line that loads a layer."""
    revision = settings.tag or state.revision
    at = "" if revision == "main" else f', revision="{revision}"'
    return f'AutoModel.from_pretrained("{settings.repo_id}", subfolder="layer_{layer}"{at}, trust_remote_code=True)'


def summary(changes: Changes) -> str:
    """How many files are new, changed, removed and unchanged."""
    parts = {"new": changes.added, "changed": changes.replaced, "removed": changes.removed, "unchanged": changes.kept}
    return ", ".join(f"{len(paths)} {word}" for word, paths in parts.items())


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def readable_size(size: float) -> str:
    """A size in bytes, in decimal units as the Hub shows them."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def main() -> None:
    parser = HfArgumentParser(
        cast(Any, Publication), allow_abbrev=False, description="Publishes a run as a Hub repository."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run, as train/fit.py writes it")
    settings, rest = parser.parse_args_into_dataclasses()
    disable_progress_bar()  # transformers' bars, one a layer; the uploads keep theirs
    run = Run.in_folder(rest.run)
    with locked(run.folder):
        publish(run, settings)


if __name__ == "__main__":
    command_line(main)
