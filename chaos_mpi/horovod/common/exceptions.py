"""The exceptions that Horovod scripts catch."""

from __future__ import annotations


class HorovodInternalError(RuntimeError):
    """A collective call failed: the ranks' calls do not fit together, or a process set has lost a member.

    The death of a rank is not one in a call of all ranks: the others get the result of those that are left.
    """


class HostsUpdatedInterrupt(RuntimeError):
    """Ranks came, left or died: raised by ``state.commit()`` and ``state.check_host_updates()``, at every rank.

    Attributes:
        skip_sync: whether the state is the same everywhere already.
    """

    def __init__(self, skip_sync: bool = False) -> None:
        super().__init__("the ranks of the job have changed")
        self.skip_sync = skip_sync


class HorovodVersionMismatchError(ImportError):
    """Not raised here, where nothing was built for a version of torch: for scripts that catch it.

    Attributes:
        name, version, installed_version: what does not fit.
    """

    def __init__(self, name: str, version: str, installed_version: str) -> None:
        super().__init__(f"{name} is of version {version}, and Horovod was built for {installed_version}")
        self.name, self.version, self.installed_version = name, version, installed_version
