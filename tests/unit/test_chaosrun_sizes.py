"""How chaosrun works out how many ranks to start, and what it refuses, without starting anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos_mpi.cli.chaosrun import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where chaosrun is called, with a script to run."""
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The words of the line that it would run."""
    main(["--dry-run", *arguments, "train.py"], standalone_mode=False)
    return capsys.readouterr().out.split()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line by which it refuses."""
    with pytest.raises(SystemExit) as caught:
        dry_run(capsys, *arguments)
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    return said.err.removeprefix("chaosrun: ").rstrip("\n")


def size(line: list[str]) -> int:
    return int(line[line.index("-n") + 1])


def test_one_rank_if_nothing_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert size(dry_run(capsys)) == 1


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [([], 3), (["--max-ranks", "2"], 2), (["--min-ranks", "3"], 3), (["-n", "2"], 2), (["-n", "5"], 5)],
)
def test_the_slots_that_are_here(
    arguments: list[str], ranks: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "hosts").write_text("localhost:2\nno-such-machine.example:8\n127.0.0.1:1\n")
    line = dry_run(capsys, "--hosts-from", "hosts", *arguments)
    assert size(line) == ranks
    assert f"CHAOS_HOSTS_FROM={folder / 'hosts'}" in line
    assert "CHAOS_HOSTS_FROM" in line[line.index("-n") :], "it is not handed to the ranks"


def test_a_script_and_the_other_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "discover").write_text("#!/bin/sh\necho localhost:4\n")
    (folder / "discover").chmod(0o755)
    line = dry_run(
        capsys,
        "--hosts-from",
        "discover",
        "--scale-policy",
        "manual",
        "--discovery-interval",
        "2.5",
        "--max-ranks",
        "9",
    )
    assert size(line) == 4
    for setting in ("CHAOS_SCALE_POLICY=manual", "CHAOS_DISCOVERY_INTERVAL_S=2.5", "CHAOS_MAX_RANKS=9"):
        assert setting in line
        assert setting.partition("=")[0] in line[line.index("-n") :], "it is not handed to the ranks"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hosts-from", "missing"], "there is no file missing"),
        (["--hosts-from", "wrong"], "wrong, line 2: 'beta' is not of the form host:slots"),
        (["--hosts-from", "wrong", "-n", "2"], "wrong, line 2: 'beta' is not of the form host:slots"),
        (["--hosts-from", "broken"], "the discovery script broken failed with status 1: no zone"),
        (["--hosts-from", "hosts", "--min-ranks", "3"], "hosts has 2 slots on this machine; 3 are needed to start"),
        (["--hosts-from", "far"], "far has 0 slots on this machine; 1 are needed to start"),
        (["--hosts-from", "hosts", "--min-ranks", "3", "--max-ranks", "2"], "--min-ranks 3 is more than --max-ranks 2"),
        (["--hosts-from", "hosts", "-n", "2", "--min-ranks", "3"], "--min-ranks 3 is more than -n 2"),
        (["--hosts-from", "hosts", "-n", "3", "--max-ranks", "2"], "--max-ranks 2 is less than -n 3"),
        (["--min-ranks", "2"], "--min-ranks 2 is more than -n 1"),
        (["--scale-policy", "available"], "--scale-policy available needs --hosts-from"),
        (["--scale-policy", "larger"], "Invalid value for '--scale-policy': 'larger' is not one of"),
        (["--hosts-from", "hosts", "--discovery-interval", "0"], "Invalid value for '--discovery-interval'"),
    ],
)
def test_what_is_refused(arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "hosts").write_text("localhost:2\n")
    (folder / "far").write_text("no-such-machine.example:2\n")
    (folder / "wrong").write_text("localhost:2\nbeta\n")
    (folder / "broken").write_text("#!/bin/sh\necho no zone >&2\nexit 1\n")
    (folder / "broken").chmod(0o755)
    assert refusal(capsys, *arguments).startswith(words)


@pytest.mark.parametrize("seconds", ["nan", "inf", "-inf", "0", "-1", "soon"])
@pytest.mark.parametrize("option", ["--timeout", "--discovery-interval"])
def test_times_that_are_none(option: str, seconds: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, option, seconds).startswith(f"Invalid value for '{option}'")
