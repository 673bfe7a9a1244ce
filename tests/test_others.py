"""What others put into a repository folder or onto the Hub stays, or goes only when --overwrite says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hub_server import HubServer
from publishing import Publisher
from tiny_run import write_tiny_run

from bilinear_tc.upload.local_files import list_files
from bilinear_tc.upload.stamp import stamped, writer_of

REPO = "tester/set"
MINE = "---\nlicense: mit\n---\n\n# Mine\n\nWords of my own.\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_tiny_run(tmp_path / "run")


def on_hub(hub: HubServer, path: str) -> str:
    return hub.store.path(hub.files(REPO)[path]).read_text()


def test_a_card_tells_who_wrote_it() -> None:
    card = stamped("# Title\n\nWords.\n", "generated")
    assert writer_of(card) == writer_of(card.replace("\n", "\r\n")) == "generated"
    assert writer_of(card.replace("Words", "Other words")) == writer_of(f"{card}\nMore.") == "edited"
    assert writer_of(MINE) == "edited"
    assert writer_of(stamped(MINE, "own")) == "own"
    assert stamped(stamped(MINE, "own"), "own") == stamped(MINE, "own")
    assert writer_of("---\nlicense: mit\n---\n") == writer_of("") == "generated"


@pytest.mark.slow
def test_a_card_edited_in_the_folder_is_published_and_stays(hub: HubServer, publisher: Publisher, run: Path) -> None:
    readme = run / "repository" / "README.md"
    assert publisher.command(run, "--repo_id", REPO).returncode == 0
    generated = readme.read_text()
    readme.write_text(generated.replace("## Limits", "## My own limits"))
    for _ in range(2):  # the second time it is somebody's own card, as published
        done = publisher.command(run, "--repo_id", REPO)
        assert f"{readme} was written by hand, and is kept" in done.stdout, done.output
        assert "## My own limits" in on_hub(hub, "README.md")
    readme.write_text(generated.replace("## Limits", "## My other limits"))
    refused = publisher.command(run, "--repo_id", REPO, "--card", str(run / "recipe.yaml"))
    assert f"error: publishing would replace {readme}, which was written by hand: move it" in refused.stderr
    anew = publisher.command(run, "--repo_id", REPO, "--overwrite")
    assert f"--overwrite: publishing will replace {readme}, which was written by hand" in anew.stdout
    assert on_hub(hub, "README.md") == generated


@pytest.mark.slow
def test_a_card_edited_on_the_hub_is_kept_unless_it_may_go(hub: HubServer, publisher: Publisher, run: Path) -> None:
    assert publisher.command(run, "--repo_id", REPO).returncode == 0
    generated = on_hub(hub, "README.md")
    edited = generated.replace("## Limits", "## Limits, by hand")
    hub.put(REPO, {"README.md": edited.encode()})
    write_tiny_run(run, seed=3)
    kept = publisher.command(run, "--repo_id", REPO)
    assert "the card of tester/set was written by hand, and is kept (--overwrite replaces it)" in kept.stdout
    assert on_hub(hub, "README.md") == edited

    (run / "repository" / "README.md").write_text(MINE)  # edited on both sides
    before = len(hub.requests)
    refused = publisher.command(run, "--repo_id", REPO)
    assert refused.stderr == (
        "error: publishing would replace the card of tester/set, which was edited there: make one of the two, or add "
        "--overwrite\n"
    )
    assert not [request for request in hub.requests[before:] if "commit" in request]
    (run / "mine.md").write_text(MINE)
    replaced = publisher.command(run, "--repo_id", REPO, "--card", str(run / "mine.md"), "--overwrite")
    assert "--overwrite: publishing will replace the card of tester/set, which was edited there" in replaced.stdout
    assert on_hub(hub, "README.md").startswith(MINE)


@pytest.mark.slow
def test_a_card_of_ones_own_is_published_and_outlives_a_run_that_has_none(
    hub: HubServer, publisher: Publisher, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.md").write_text(MINE)
    assert publisher.command(run, "--repo_id", REPO, "--card", str(tmp_path / "mine.md")).returncode == 0
    assert on_hub(hub, "README.md").startswith(MINE)
    (tmp_path / "mine.md").write_text(MINE + "\nMore.\n")
    assert publisher.command(run, "--repo_id", REPO, "--card", str(tmp_path / "mine.md")).returncode == 0
    assert "More." in on_hub(hub, "README.md")
    other = write_tiny_run(tmp_path / "other", seed=3)
    assert publisher.command(other, "--repo_id", REPO).returncode == 0
    assert "More." in on_hub(hub, "README.md")
    refused = publisher.command(run, "--repo_id", REPO, "--card", str(tmp_path / "none.md"))
    assert refused.stderr.startswith("error: --card must name a text file in UTF-8, got "), refused.stderr


def test_a_folder_that_publishing_did_not_write_is_not_destroyed(
    hub: HubServer, publisher: Publisher, run: Path
) -> None:
    (run / "repository" / ".git").mkdir(parents=True)
    mine = [run / "repository" / ".git" / "HEAD", run / "repository" / "thesis.tex"]
    for path in mine:
        path.write_text("mine")
    refused = publisher.command(run, "--repo_id", REPO, "--dry_run")
    assert refused.stderr == (
        f"error: publishing would delete .git/HEAD, thesis.tex in {run}/repository: move what you need, or add "
        "--overwrite\n"
    )
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    anew = publisher.command(run, "--repo_id", REPO, "--dry_run", "--overwrite")
    assert f"publishing will delete .git/HEAD, thesis.tex in {run}/repository" in anew.stdout
    assert not mine[1].exists()


@pytest.mark.slow
def test_a_repository_of_something_else_keeps_what_it_holds(hub: HubServer, publisher: Publisher, run: Path) -> None:
    theirs = {"README.md": MINE.encode(), "recipe.yaml": b"eggs: 3\n", "evaluation.json": b"{}"}
    hub.put(REPO, theirs)
    before = hub.files(REPO)
    refused = publisher.command(run, "--repo_id", REPO)
    assert "publishing would replace evaluation.json, recipe.yaml of tester/set: name another" in refused.stderr
    assert hub.files(REPO) == before
    plan = publisher.command(run, "--repo_id", REPO, "--dry_run")
    assert "it would replace evaluation.json, recipe.yaml of tester/set, which needs --overwrite" in plan.stdout
    del theirs["recipe.yaml"], theirs["evaluation.json"]
    hub.repos.clear()
    hub.put(REPO, theirs)
    assert publisher.command(run, "--repo_id", REPO).returncode == 0
    assert on_hub(hub, "README.md") == MINE


@pytest.mark.slow
def test_a_partial_publication_leaves_the_other_layers(
    hub: HubServer, publisher: Publisher, run: Path, tmp_path: Path
) -> None:
    full = write_tiny_run(tmp_path / "full", layers=(0, 1, 2))
    assert publisher.command(full, "--repo_id", REPO).returncode == 0
    others = {path: sha for path, sha in hub.files(REPO).items() if path.startswith("layer_2/")}
    write_tiny_run(run, seed=7)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "layers": "0-2"}))
    done = publisher.command(run, "--repo_id", REPO, "--allow_partial")
    assert done.returncode == 0, done.output
    assert "left as it was on the Hub: layer_2\n" in done.stdout
    assert {path: sha for path, sha in hub.files(REPO).items() if path.startswith("layer_2/")} == others
    local = {path: file.sha256 for path, file in list_files(run / "repository").items()}
    assert local.items() <= hub.files(REPO).items()
    assert "nothing was uploaded" in publisher.command(run, "--repo_id", REPO, "--allow_partial").stdout
    gone = publisher.command(run, "--repo_id", REPO, "--allow_partial", "--overwrite")
    assert "--overwrite: publishing will remove layer_2 of tester/set" in gone.stdout
    assert not [path for path in hub.files(REPO) if path.startswith("layer_2/")]
