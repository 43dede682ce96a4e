"""Settings of a session: arguments of :func:`chaos_mpi.init`, else ``CHAOS_*`` environment variables, else defaults."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from chaos_mpi.autoscale.policy import POLICIES
from chaos_mpi.errors import ConfigError
from chaos_mpi.membership import Limits

JOIN_POLICIES = ("auto", "overlap", "blocking")
BATCH_POLICIES = ("keep_global_batch", "linear", "sqrt", "none")
SCALE_POLICIES = tuple(POLICIES)
LOG_LEVELS = ("debug", "info", "warning", "error")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a session is run with.

    Attributes:
        min_ranks: the job stops, with its state saved, when fewer members are left.
        batch_policy: what a change of size does to batch size and learning rate
            (``keep_global_batch``, ``linear``, ``sqrt`` or ``none``).
        timeout_s: longest wait for other members, seconds.
        checkpoint_dir: directory of disk checkpoints, or None for none.
        checkpoint_every: steps between two checkpoints.
        resume: go on from the newest checkpoint in ``checkpoint_dir`` if there is one.
        event_log: path of the event log; ``%h`` and ``%m`` stand for host and member. None for none.
        max_ranks: most members that may be in the job, or None for no limit.
        join_policy: whether the members train on while a newcomer gets the state (``overlap``), wait for it
            (``blocking``), or do what fits the state (``auto``).
        hosts_from: file with lines ``host:slots``, or program that prints them: the machines that there are, which may
            change while the job runs. None for none.
        scale_policy: what the size of the job follows (``available``, the slots that there are, or ``manual``, requests
            only); None for ``available`` with ``hosts_from`` and ``manual`` without.
        restarts: how often within an hour a rank that crashed is started again on the same host, in a job on several
            hosts. Nothing is with the scale policy ``available``, which fills free slots anyway.
        discovery_interval_s: time between two looks at ``hosts_from``, seconds.
        join_timeout_s: longest time from the start of a newcomer's process until it can take the state, seconds.
        run_dir: private directory that ``chaosrun`` made for this job, or None.
        resume_from: name of a state that is kept on the hosts, to go on from; None for none.
        awaits_state: whether that state is still to come, from a job that runs under another launcher.
        log_level: level of this package's log (``debug`` to ``error``), or None to leave logging to the script.
    """

    min_ranks: int = 1
    batch_policy: str = "keep_global_batch"
    timeout_s: float = 300.0
    checkpoint_dir: Path | None = None
    checkpoint_every: int = 100
    resume: bool = False
    event_log: str | None = None
    max_ranks: int | None = None
    join_timeout_s: float = 120.0
    join_policy: str = "auto"
    hosts_from: Path | None = None
    scale_policy: str | None = None
    discovery_interval_s: float = 1.0
    restarts: int = 3
    run_dir: Path | None = None
    resume_from: str | None = None
    awaits_state: bool = False
    log_level: str | None = None

    def __post_init__(self) -> None:
        if self.min_ranks < 1:
            raise ConfigError(f"min_ranks is {self.min_ranks}; it must be at least 1")
        if self.max_ranks is not None and self.max_ranks < self.min_ranks:
            raise ConfigError(f"max_ranks is {self.max_ranks}, less than min_ranks, which is {self.min_ranks}")
        if not 0 < self.join_timeout_s < float("inf"):
            raise ConfigError(f"join_timeout_s is {self.join_timeout_s}; it must be a positive number of seconds")
        if self.join_policy not in JOIN_POLICIES:
            raise ConfigError(f"join_policy is {self.join_policy!r}; choose one of {', '.join(JOIN_POLICIES)}")
        if self.scale_policy is not None and self.scale_policy not in SCALE_POLICIES:
            raise ConfigError(f"scale_policy is {self.scale_policy!r}; choose one of {', '.join(SCALE_POLICIES)}")
        if self.scale_policy == "available" and self.hosts_from is None:
            raise ConfigError("the scale policy available needs a list of hosts (hosts_from, or --hosts-from)")
        if self.restarts < 0:
            raise ConfigError(f"restarts is {self.restarts}; it is a number of restarts an hour, 0 for none")
        if not 0 < self.discovery_interval_s < float("inf"):
            raise ConfigError(f"discovery_interval_s is {self.discovery_interval_s}; it must be a positive number")
        if self.batch_policy not in BATCH_POLICIES:
            raise ConfigError(f"batch_policy is {self.batch_policy!r}; choose one of {', '.join(BATCH_POLICIES)}")
        if not 0 < self.timeout_s < float("inf"):
            raise ConfigError(f"timeout_s is {self.timeout_s}; it must be a positive number of seconds")
        if self.checkpoint_every < 1:
            raise ConfigError(f"checkpoint_every is {self.checkpoint_every}; it must be at least 1 step")
        if self.log_level is not None and self.log_level.lower() not in LOG_LEVELS:
            raise ConfigError(f"the log level is {self.log_level!r}; choose one of {', '.join(LOG_LEVELS)}")
        if self.resume and self.checkpoint_dir is None:
            raise ConfigError("resume needs a checkpoint directory (checkpoint_dir, or --checkpoint-dir)")

    @property
    def policy_name(self) -> str:
        """The scale policy in force."""
        return self.scale_policy or ("available" if self.hosts_from is not None else "manual")

    @property
    def limits(self) -> Limits:
        """What requests to change the size of the job are held to."""
        restarts = 0 if self.policy_name == "available" else self.restarts
        return Limits(self.min_ranks, self.max_ranks, restarts)

    @property
    def guest_limit_s(self) -> float:
        """How long a newcomer may say nothing when it is its turn; members may be waiting for it meanwhile."""
        return min(self.timeout_s, self.join_timeout_s)


def load_settings(
    *,
    min_ranks: int | None = None,
    batch_policy: str | None = None,
    timeout_s: float | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool | None = None,
    event_log: str | None = None,
    max_ranks: int | None = None,
    join_timeout_s: float | None = None,
    join_policy: str | None = None,
    hosts_from: str | os.PathLike[str] | None = None,
    scale_policy: str | None = None,
    discovery_interval_s: float | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """Settings from arguments; those that are None come from the environment, then from the defaults.

    Raises:
        ConfigError: a value cannot be used; the message names the argument or the variable.
    """

    def choose(given: T | None, variable: str, convert: Callable[[str], T], default: T) -> T:
        if given is not None:
            return given
        text = environ.get(variable, "")
        if not text:
            return default
        try:
            return convert(text)
        except ValueError as error:
            raise ConfigError(f"the environment variable {variable} is {text!r}: {error}") from error

    directory = checkpoint_dir if checkpoint_dir is not None else environ.get("CHAOS_CHECKPOINT_DIR") or None
    run_dir = environ.get("CHAOS_RUN_DIR") or None
    hosts = hosts_from if hosts_from is not None else environ.get("CHAOS_HOSTS_FROM") or None
    return Settings(
        min_ranks=choose(min_ranks, "CHAOS_MIN_RANKS", int, 1),
        batch_policy=choose(batch_policy, "CHAOS_BATCH_POLICY", str, "keep_global_batch"),
        timeout_s=choose(timeout_s, "CHAOS_TIMEOUT_S", float, 300.0),
        checkpoint_dir=Path(directory) if directory is not None else None,
        checkpoint_every=choose(checkpoint_every, "CHAOS_CHECKPOINT_EVERY", int, 100),
        resume=choose(resume, "CHAOS_RESUME", _flag, False),
        event_log=event_log if event_log is not None else environ.get("CHAOS_EVENT_LOG") or None,
        max_ranks=choose(max_ranks, "CHAOS_MAX_RANKS", int, None),
        join_timeout_s=choose(join_timeout_s, "CHAOS_JOIN_TIMEOUT_S", float, 120.0),
        join_policy=choose(join_policy, "CHAOS_JOIN_POLICY", str, "auto"),
        hosts_from=Path(hosts).absolute() if hosts is not None else None,
        scale_policy=choose(scale_policy, "CHAOS_SCALE_POLICY", str, None),
        discovery_interval_s=choose(discovery_interval_s, "CHAOS_DISCOVERY_INTERVAL_S", float, 1.0),
        restarts=choose(None, "CHAOS_RESTARTS", int, 3),
        run_dir=Path(run_dir) if run_dir is not None else None,
        resume_from=environ.get("CHAOS_RESUME_FROM") or None,
        awaits_state=bool(environ.get("CHAOS_TAKEOVER")),
        log_level=environ.get("CHAOS_LOG_LEVEL") or None,
    )


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("expected 0 or 1")
