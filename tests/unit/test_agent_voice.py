"""What is told of the witness: that it is not heard, and that it is again."""

from __future__ import annotations

from chaos_mpi.agent.contacts import Contact
from chaos_mpi.agent.voice import OUT, REPLACED, SILENT, UP, Voice
from chaos_mpi.monitor.cluster import ClusterView, Node, Timing
from chaos_mpi.monitor.reachability import Diagnosis, Hearing, pair

ME, OTHER, WITNESS = "a:1", "b:1", "w:9"
LIMIT_S = 0.5


class Watch:
    """What the agent beside a rank knows, with a clock that the test moves."""

    def __init__(self) -> None:
        self.me, self.now_s = ME, 100.0
        nodes = tuple(map(Node, (ME, OTHER, WITNESS)))
        self.view: ClusterView | None = ClusterView(0, nodes, witness=Node(WITNESS))
        self.hearing = Hearing(Node(ME), nodes, Timing(limit_s=LIMIT_S), self.now_s)
        self.contacts = {name: contact(name, f"10.0.0.{number}") for number, name in enumerate((ME, OTHER, WITNESS))}
        self.deaf = False

    @property
    def witness(self) -> str | None:
        return WITNESS if self.view is not None and self.view.witness is not None else None

    def contact(self, member: str) -> Contact | None:
        return self.contacts.get(member)

    def diagnosis(self, limit_s: float) -> Diagnosis | None:
        return None if self.deaf else self.hearing.diagnosis(self.now_s, limit_s)

    def run(self, seconds: float, *heard: str) -> None:
        self.now_s += seconds
        for name in heard:
            self.hearing.heard(Node(name), self.now_s, (), self.now_s)

    def change(self, *members: str, witness: str | None) -> None:
        assert self.view is not None
        nodes = tuple(map(Node, members))
        self.view = ClusterView(self.view.epoch + 1, nodes, witness=Node(witness) if witness else None)
        self.hearing.change_members(nodes, self.now_s)


def contact(name: str, address: str) -> Contact:
    return Contact(name, name[0], (address,), 1, "key")


class Told:
    """A voice, and what it says."""

    def __init__(self) -> None:
        self.watch, self.news = Watch(), list[dict[str, str]]()
        self.voice = Voice(self.watch, Timing(limit_s=LIMIT_S), self.news.append)

    def states(self) -> list[str]:
        self.voice.look()
        assert all((fields["witness"], fields["host"]) == (WITNESS, "w") for fields in self.news)
        return [fields["state"] for fields in self.news]


def test_a_witness_that_is_not_heard_for_a_while() -> None:
    told = Told()
    assert told.states() == []
    told.watch.run(LIMIT_S + 0.1, OTHER)
    assert told.states() == [SILENT] == told.states()
    told.watch.run(0.1, WITNESS)
    assert told.states() == [SILENT, UP] == told.states()


def test_a_witness_that_others_hear() -> None:
    told = Told()
    told.watch.run(LIMIT_S + 0.1, OTHER)
    diagnosis = told.watch.diagnosis(LIMIT_S)
    assert diagnosis is not None
    cut = Diagnosis(frozenset(map(Node, (ME, OTHER, WITNESS))), frozenset(),
                    frozenset({pair(Node(ME), Node(WITNESS))}), frozenset())  # fmt: skip
    told.watch.diagnosis = lambda limit_s: cut  # type: ignore[method-assign]
    assert told.states() == [SILENT]


def test_a_witness_that_is_voted_out() -> None:
    told = Told()
    told.states()
    told.watch.run(LIMIT_S + 0.1, OTHER)
    told.watch.change(ME, OTHER, witness=None)
    assert told.states() == [OUT] == told.states()


def test_a_witness_whose_host_has_a_rank() -> None:
    told = Told()
    told.states()
    told.watch.contacts["w:10"] = contact("w:10", told.watch.contacts[WITNESS].addresses[0])
    told.watch.change(ME, OTHER, WITNESS, "w:10", witness=WITNESS)
    told.watch.run(LIMIT_S + 0.1, OTHER, "w:10")
    assert told.states() == [REPLACED]
    del told.watch.contacts[WITNESS]
    told.watch.change(ME, OTHER, "w:10", witness=None)
    assert told.states() == [REPLACED]


def test_nothing_is_told_where_there_is_none() -> None:
    told = Told()
    told.watch.change(ME, OTHER, witness=None)
    assert told.states() == []
    told.watch.deaf = True
    assert told.states() == []
