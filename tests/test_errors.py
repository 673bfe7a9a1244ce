"""How a script ends: in one sentence for the user, or with a traceback and the word that it is a bug."""

from __future__ import annotations

from pathlib import Path

import pytest

from bilinear_tc.train import errors
from bilinear_tc.train.errors import ElsewhereError, Interrupted, NotFiniteError, StorageError, UserError

ROOT = Path(__file__).resolve().parent.parent


def ended(error: BaseException) -> int:
    """The exit status of a script whose main function raises this."""

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_status:
        errors.command_line(main)
    return int(exit_status.value.code or 0)


@pytest.mark.parametrize("kind", [UserError, StorageError, NotFiniteError, Interrupted])
def test_an_expected_error_is_one_sentence(kind, capsys) -> None:
    assert ended(kind("expected this, got that; do so")) == 1
    assert capsys.readouterr().err == "error: expected this, got that; do so\n"


@pytest.mark.parametrize("kind", [ValueError, KeyError, OSError, RuntimeError, AssertionError])
def test_a_bug_keeps_its_traceback_and_says_where_to_report_it(kind, capsys) -> None:
    assert ended(kind("no sentence for a user")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert "    raise error" in lines
    assert lines[-2].startswith(kind.__name__)
    assert lines[-1].startswith("error: this is a bug in bilinear-tc")
    assert lines[-1].endswith(errors.REPORT)


def test_bugs_are_reported_where_the_package_says() -> None:
    assert f'Issues = "{errors.REPORT}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()


def test_the_traceback_of_an_expected_error_can_be_asked_for(monkeypatch, capsys) -> None:
    monkeypatch.setenv("BILINEAR_TC_TRACEBACK", "1")
    assert ended(UserError("a sentence")) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert printed.endswith("error: a sentence\n")


def test_a_process_that_stops_for_another_says_nothing(capsys) -> None:
    assert ended(ElsewhereError("the main process has failed")) == 1
    assert capsys.readouterr().err == ""


def test_an_interrupt_has_its_own_status_and_other_processes_say_which_they_are(monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "2")
    assert ended(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "error (process 2): interrupted\n"


@pytest.mark.parametrize(
    ("message", "line"), [("a\n  b\tc.", "a b c"), ("", "ValueError"), ("x" * 500, "x" * 400 + " …")]
)
def test_a_librarys_message_becomes_one_line(message: str, line: str) -> None:
    assert errors.one_line(ValueError(message)) == line
