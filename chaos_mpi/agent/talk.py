"""What agents say to each other besides the messages of :mod:`chaos_mpi.monitor.messages`."""

from __future__ import annotations

from typing import Any

#: Kinds of messages. At the beginning: this agent is there, and has or has not heard all. A rank has ended, and may
#: have crashed; that was heard. How are these members reached? So. To one whose proxy has ended, though
#: ``mpirun`` lives: to MPI its rank is dead.
HERE, ENDED, NOTED, WHO, CONTACTS, DISOWNED = "Here", "Ended", "Noted", "Who", "Contacts", "Disowned"


def entries(fields: dict[str, Any], name: str) -> list[Any]:
    """The list of this name in a message.

    Raises:
        ValueError: there is none.
    """
    found = fields.get(name)
    if not isinstance(found, list):
        raise ValueError(f"{fields.get('kind')} without a list of {name}")
    return found
