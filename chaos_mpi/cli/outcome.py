"""How a job ended, judged from the records its ranks left in the job's private directory.

``mpirun``'s own exit status is not the judge: it is non-zero whenever a rank was killed, whatever the others achieved.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_mpi.agent.home import CRASH, LOST, TOLD
from chaos_mpi.agent.jsonfiles import JsonFiles
from chaos_mpi.agent.marks import namespace, runs

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 3
#: The job goes on without this launcher: mpirun is gone, and ranks on several hosts train on, or it has moved.
EXIT_GOES_ON = 4
#: From here on an exit status is that of a process that a signal has ended.
_SIGNALLED = 128

Record = Mapping[str, Any]
#: In the order of the attributes of :class:`Records`.
_KINDS = ("starting", "member", "outcome", "ended", CRASH, "connected", LOST, "leaving", TOLD)


@dataclass(frozen=True, slots=True)
class Records:
    """What the ranks wrote so far; each mapping is from process id to record.

    Attributes:
        starting: ranks that are about to start MPI.
        members: ranks that joined the job.
        outcomes: ranks that came to an end they could still write down.
        ended: proxies of newcomers on other hosts, at their end, however that came about.
        crashes: ranks that crashed, as the agents beside them saw it, also where these could not write anything down.
        connected: ranks that have started MPI; they may have to find out first who of the others is alive.
        lost: proxies whose connections with the hosts of their ranks broke.
        leaving: ranks whose script is at its end, and whose process is about to be.
        told: proxies that have been told to end their rank, and know that its host has heard of it.
    """

    starting: Mapping[int, Record]
    members: Mapping[int, Record]
    outcomes: Mapping[int, Record]
    ended: Mapping[int, Record] = field(default_factory=dict)
    crashes: Mapping[int, Record] = field(default_factory=dict)
    connected: Mapping[int, Record] = field(default_factory=dict)
    lost: Mapping[int, Record] = field(default_factory=dict)
    leaving: Mapping[int, Record] = field(default_factory=dict)
    told: Mapping[int, Record] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Exit status of the job, and one line for the person who started it (or an empty one)."""

    status: int
    message: str = ""


class RecordReader:
    """Reads the records of a job again and again, each only once.

    Args:
        run_dir: the job's private directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._files = run_dir, JsonFiles()

    def read(self) -> Records:
        """All that are there now; what cannot be read is left out."""
        found: dict[str, dict[int, Record]] = {kind: {} for kind in _KINDS}
        for path in sorted(self._run_dir.glob("*-*.json")):
            kind, _, pid = path.stem.rpartition("-")
            if kind in found and pid.isdigit() and isinstance(record := self._files.read(path), dict):
                found[kind][int(pid)] = record
        return Records(*(found[kind] for kind in _KINDS))


def read_records(run_dir: Path) -> Records:
    """All records in a job's private directory; what cannot be read is left out."""
    return RecordReader(run_dir).read()


def lives(pid: int, record: Record) -> bool:
    """Whether the process that wrote a record still runs; of one whose number means nothing here only mpirun knows."""
    if record.get("namespace", here := namespace()) != here:
        return True
    return runs(pid, record.get("started"))


def judge(records: Records, mpirun_status: int, *, ranks: int = 1, gave_up: bool = False) -> Verdict:
    """The outcome of a job that has ended by itself.

    Args:
        records: what the ranks wrote.
        mpirun_status: ``mpirun``'s exit status, negative for a signal.
        ranks: how many the job was started with.
        gave_up: Open MPI has said that it ends the job because of an error that the script does not handle.
    """
    outcomes = list(records.outcomes.values())
    by_kind = {
        kind: [record for record in outcomes if record.get("outcome") == kind]
        for kind in ("finished", "stopped", "failed", "failed afterwards", "crashed", "cut off", "moved")
    }
    if by_kind["stopped"]:
        return Verdict(EXIT_STOPPED, _first_message(by_kind["stopped"]) or "the job stopped before the end")
    if by_kind["failed"]:
        return Verdict(EXIT_FAILED, _first_message(by_kind["failed"]) or "the job failed")
    if by_kind["failed afterwards"]:
        return Verdict(EXIT_FAILED, _first_message(by_kind["failed afterwards"]))
    if by_kind["moved"]:
        return Verdict(EXIT_GOES_ON, _first_message(by_kind["moved"]))
    crashed = by_kind["crashed"]
    speechless = {pid: record for pid, record in records.crashes.items() if pid not in records.outcomes}
    if by_kind["finished"]:
        ended = set(records.starting) <= set(records.members) <= set(records.outcomes)
        spawned = records.ended or any(record.get("joined") for record in records.members.values())
        if not crashed and ended and not spawned and 0 < mpirun_status < _SIGNALLED:
            # Nobody died on the way, so it is the status of a rank that has finished. Where ranks were spawned, mpirun
            # was seen to return 1 although all of them had ended with 0.
            return Verdict(
                EXIT_FAILED, f"training finished, but the script failed after it: a rank exited with {mpirun_status}"
            )
        if not crashed and not speechless:
            return Verdict(EXIT_FINISHED)
        return Verdict(EXIT_FINISHED, _crashes(records, crashed, speechless))
    unsure = (records.lost.keys() & records.members.keys()) - records.outcomes.keys() - records.crashes.keys()
    if unsure:
        hosts = ", ".join(sorted({str(records.lost[pid].get("host")) for pid in unsure}))
        return Verdict(
            EXIT_GOES_ON,
            f"the connections with {hosts} were lost, and the ranks there may train on without this launcher: look "
            "there with 'chaosctl status' before you start it anew; 'chaosctl takeover' gives it another launcher",
        )
    if by_kind["cut off"]:
        return Verdict(EXIT_STOPPED, f"no part of the job has a majority: {_first_message(by_kind['cut off'])}")
    if crashed:
        return Verdict(EXIT_FAILED, f"training did not finish: {_first_message(crashed)}")
    if records.members:
        return Verdict(
            EXIT_FAILED,
            f"training did not finish: all {len(records.members)} ranks died (mpirun {describe_status(mpirun_status)})",
        )
    what = "no rank had joined the job yet" if records.starting else "no rank opened a chaos_mpi session"
    if mpirun_status != 0:
        status = mpirun_status if mpirun_status > 0 else 128 - mpirun_status
        return Verdict(status, f"the job failed: mpirun {describe_status(mpirun_status)}, and {what}")
    # mpirun, told that ranks may die, returns 0 whatever becomes of them.
    if gave_up:
        return Verdict(EXIT_FAILED, f"the job failed: a rank died, or MPI failed otherwise, and {what}")
    if records.starting:
        return Verdict(EXIT_FAILED, f"the job failed: {what}")
    if ranks == 1:
        return Verdict(EXIT_FINISHED)
    return Verdict(
        EXIT_FINISHED, f"{what}, so the job was not elastic, and whether all its ranks came to their end is not known"
    )


def _crashes(records: Records, crashed: Sequence[Record], speechless: Mapping[int, Record]) -> str:
    """How many ranks crashed on the way, of all that ever took part; those of lost hosts did not, as far as is known.

    Args:
        records: what the ranks wrote.
        crashed: the outcomes of those that could still say why.
        speechless: what their agents say of the others.
    """
    # A crash in a start counts as well, and so do those that were refused, which never became members.
    everyone = {*records.members, *records.outcomes, *speechless}
    later = sum(bool(record.get("joined")) for record in records.members.values())
    counting = f" ({later} of them joined later)" if later else ""
    first = next(iter(speechless), None)
    how = "" if first is None else f"{speechless[first].get('how')}, host {records.members.get(first, {}).get('host')}"
    return (
        f"training finished, but {len(crashed) + len(speechless)} of {len(everyone)} ranks{counting} crashed on the "
        f"way: {_first_message(crashed) or how}"
    )


def untold(records: Records, hosts: Mapping[int, str]) -> list[str]:
    """The hosts of which it is not known that they have heard that the job is to end: ranks there may train on.

    Args:
        records: what the ranks wrote, and their proxies.
        hosts: those of the proxies that were there when the job was interrupted, by process id.
    """
    heard = records.told.keys() | records.outcomes.keys() | records.crashes.keys()
    return sorted({host for pid, host in hosts.items() if pid in records.members and pid not in heard})


def describe_status(status: int) -> str:
    """An exit status as a clause, for example ``was killed by SIGKILL``."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def _first_message(records: Sequence[Record]) -> str:
    return next((str(record["message"]) for record in records if record.get("message")), "")
