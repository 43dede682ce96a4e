"""A newcomer repeats what the members do to their parameters while they train on, and comes to the same bits.

Members and newcomer are threads, each with a model of its own, over a network in this process.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from chaos_mpi.elastic import catchup
from chaos_mpi.elastic.arrival import UNUSABLE_LINK_BYTES_PER_S, known_rates
from chaos_mpi.elastic.catchup import not_repeated, planned
from chaos_mpi.elastic.learning_rate import ScaledRate, StepHooks, unscaled
from chaos_mpi.elastic.overlap import merged, overlaps
from chaos_mpi.errors import PeerFailedError
from chaos_mpi.membership import Join
from chaos_mpi.replication import recording, replaying
from chaos_mpi.replication.layout import Layout, Piece, dense
from chaos_mpi.replication.puller import StatePuller
from chaos_mpi.replication.recording import RecordingSource
from chaos_mpi.replication.replaying import Follower, FollowError, measure_links
from chaos_mpi.replication.steps import Cut, Snapshot, can_follow, slice_of
from chaos_mpi.replication.tree import Packed, pack, unpack
from chaos_mpi.sharding import Neighbour

LIMIT_S = 8.0
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small state comes from several members."""
    monkeypatch.setattr(catchup, "SHARD_SIZES", (64, 128, 256))


# -- a network between threads -----------------------------------------------------------------------------


@dataclass
class Network:
    """Messages and memory go from thread to thread; a rank that is dead is dead for all."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    mail: dict[tuple[int, int], deque[str]] = field(default_factory=dict)
    flows: dict[tuple[int, int, int], dict[str, Any]] = field(default_factory=dict)
    dead: set[int] = field(default_factory=set)
    slow_s: Mapping[int, float] = field(default_factory=dict)


@dataclass
class End:
    network: Network
    flow: dict[str, Any]
    other: int

    def done(self) -> bool:
        with self.network.lock:
            parties = {self.other, self.flow.get("sender")}
            if {"out", "into"} <= set(self.flow) and not self.flow.get("done") and not parties & self.network.dead:
                now = time.monotonic()
                if now >= self.flow.setdefault("due", now + self.network.slow_s.get(self.flow["sender"], 0.0)):
                    data = b"".join(ctypes.string_at(*piece) for piece in self.flow["out"])
                    for address, nbytes in self.flow["into"]:
                        ctypes.memmove(address, data[:nbytes], nbytes)
                        data = data[nbytes:]
                    assert not data, "the two ends of a transfer have different sizes"
                    self.flow["done"] = True
            if not self.flow.get("done") and self.other in self.network.dead:
                raise PeerFailedError(f"rank {self.other} is dead")
            return bool(self.flow.get("done"))


@dataclass
class Port:
    network: Network
    rank: int

    def failed(self) -> list[int]:
        return sorted(self.network.dead)

    def send(self, to: int, message: dict[str, Any]) -> None:
        if to in self.network.dead:
            raise PeerFailedError(f"rank {to} is dead")
        with self.network.lock:
            if self.rank in self.network.dead:
                return
            self.network.mail.setdefault((self.rank, to), deque()).append(json.dumps(message))

    def poll(self, source: int) -> dict[str, Any] | None:
        with self.network.lock:
            mail = self.network.mail.get((source, self.rank))
            if mail:
                message: dict[str, Any] = json.loads(mail.popleft())
                return message
        if source in self.network.dead:
            raise PeerFailedError(f"rank {source} is dead")
        return None

    def send_data(self, to: int, number: int, pieces: Sequence[Piece]) -> End:
        return self._end(self.rank, to, number, {"out": list(pieces), "sender": self.rank}, to)

    def receive_data(self, source: int, number: int, pieces: Sequence[Piece]) -> End:
        return self._end(source, self.rank, number, {"into": list(pieces)}, source)

    def _end(self, sender: int, receiver: int, number: int, known: dict[str, Any], other: int) -> End:
        with self.network.lock:
            flow = self.network.flows.setdefault((sender, receiver, number), {})
            if flow.get("done"):
                flow.clear()
            flow.update(known)
        return End(self.network, flow, other)


# -- members and a newcomer --------------------------------------------------------------------------------

Build = Callable[[nn.Module], list[torch.optim.Optimizer]]


class Decaying(torch.optim.SGD):
    """Extends the step of another optimizer, and torch calls the hooks of both."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(1 - 0.1 * group["lr"])


def decaying(model: nn.Module) -> list[torch.optim.Optimizer]:
    torch.optim.SGD(model.parameters(), lr=0.1)
    return [Decaying(model.parameters(), lr=0.1, momentum=0.9)]


def transposed(model: nn.Module) -> list[torch.optim.Optimizer]:
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()
    return [torch.optim.AdamW(model.parameters(), lr=0.01)]


OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda m: [torch.optim.SGD(m.parameters(), lr=0.1)],
    "momentum": lambda m: [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)],
    "adamw": lambda m: [torch.optim.AdamW(m.parameters(), lr=0.01, amsgrad=True)],
    "rprop": lambda m: [torch.optim.Rprop(m.parameters(), lr=0.01)],
    "numpy": lambda m: [torch.optim.SGD(m.parameters(), lr=np.float32(0.1), momentum=0.9)],  # type: ignore[arg-type]
    "decaying": decaying,
    "transposed": transposed,
    "two, in turn": lambda m: [
        torch.optim.Adam(m[0].parameters(), lr=0.01),  # type: ignore[index]
        torch.optim.SGD([{"params": m[2].parameters()}, {"params": m[4].parameters(), "lr": 0.3}], lr=0.1),  # type: ignore[index]
    ],
}


def build_model() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 2))


def state_of(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Packed:
    return pack({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}, clone=False)


def train(model: nn.Sequential, optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
    """One step of any member: all have the same gradients. Every third one reaches no parameter of the last layer."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
    out = model[:4](x) if step % 3 == 2 else model(x)
    out.square().sum().backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.5)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= 0.99
        optimizer.step()
        optimizer.zero_grad()


class Member:
    """Trains, and serves the newcomers, whose ranks come after those of all members."""

    def __init__(
        self, network: Network, rank: int, members: int, build: Build, guests: int = 1, limit_s: float = LIMIT_S
    ) -> None:
        self.rank, self.members = rank, members
        self.model = build_model()
        self.optimizers = build(self.model)
        self.step = 0
        for _ in range(3):
            self.train()
        self.ready, self.caught_up = threading.Event(), threading.Event()
        layout, tensors, _ = self.state()
        invitation = {"layout": layout.to_json()}
        self.source = RecordingSource(
            Port(network, rank), range(members, members + guests), layout, tensors, invitation, limit_s,
            ready=self.ready.set, caught_up=self.caught_up.set,
        )  # fmt: skip
        self.source.start()

    def train(self) -> None:
        train(self.model, self.optimizers, self.step)
        self.step += 1

    def state(self) -> tuple[Layout, dict[str, torch.Tensor], str]:
        packed = state_of(self.model, self.optimizers)
        tensors = {name: dense(tensor) for name, tensor in packed.tensors.items()}
        return Layout.of(tensors), tensors, packed.skeleton

    def cut(self) -> None:
        layout, tensors, skeleton = self.state()
        names = {rank: f"m{rank}" for rank in range(self.members)}
        ranges = [
            span
            for rates in self.source.rates.values()
            for span in planned(layout.total_bytes, names, rates).assignment.get(f"m{self.rank}", ())
        ]
        invitation = {"layout": layout.to_json(), "skeleton": skeleton, "sources": list(names)}
        self.source.cut(Cut(layout, tensors, merged(ranges), self.rank, self.members, invitation))
        for number, optimizer in enumerate(self.optimizers):
            StepHooks(optimizer, self._recorder(number, optimizer), lambda: None)

    def _recorder(self, number: int, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def record() -> None:
            self.source.record(number, optimizer)

        return record

    def stop(self) -> None:
        layout, tensors, skeleton = self.state()
        self.source.stop_training(layout, tensors, {"layout": layout.to_json(), "skeleton": skeleton})
        self.source.serve(LIMIT_S, lambda: "the newcomers")


class Newcomer:
    """Catches up with members 0, 1, ..."""

    def __init__(self, network: Network, rank: int, members: int, build: Build) -> None:
        self.port, self.sources = Port(network, rank), list(range(members))
        self.model = build_model()
        for parameter in self.model.parameters():
            parameter.data.fill_(9.0)
        self.optimizers = build(self.model)
        self.follower = Follower(self.port, self.sources, self.optimizers, LIMIT_S)

    def measure(self, known: Mapping[int, float] | None = None) -> Mapping[int, float]:
        rates = known or measure_links(self.port, self.sources, 1000, LIMIT_S)
        for rank in self.sources:
            self.port.send(rank, {"rates": dict(rates)})
        return rates

    def take_cut(self, rates: Mapping[int, float]) -> None:
        limit = time.monotonic() + LIMIT_S
        while (message := self.port.poll(0)) is None or "cut" not in message:
            assert time.monotonic() < limit, "no word of the cut"
            time.sleep(0.001)
        cut = message["cut"]
        layout = Layout.from_json(cut["layout"])
        tensors = layout.allocate(state_of(self.model, self.optimizers).tensors)
        names = {rank: f"m{rank}" for rank in self.sources}
        shards = planned(layout.total_bytes, names, rates).shards()
        neighbours = {rank: Neighbour(name, 1e9) for rank, name in names.items()}
        StatePuller(self.port, neighbours, layout, tensors, LIMIT_S).fetch_planned(
            {rank: shards[name] for rank, name in names.items() if name in shards}
        )
        tree = unpack(Packed(cut["skeleton"], tensors))
        self.model.load_state_dict(tree["model"])
        for optimizer, state in zip(self.optimizers, tree["optimizers"], strict=True):
            optimizer.load_state_dict(copy.deepcopy(state))

    def finish(self) -> None:
        for rank in self.sources:
            if rank not in self.port.network.dead:
                self.port.send(rank, {"received": True})


def bits(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, bytes]:
    tensors = state_of(model, optimizers).tensors
    return {name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def in_thread(work: Callable[[], None], errors: list[BaseException]) -> threading.Thread:
    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def join_all(threads: Sequence[threading.Thread], errors: list[BaseException]) -> None:
    for thread in threads:
        thread.join(LIMIT_S * 2)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def train_until(members: Sequence[Member], event: Callable[[Member], threading.Event], least: int = 0) -> None:
    """All members train in step until one of them is told something."""
    limit = time.monotonic() + LIMIT_S
    steps = 0
    while steps < least or not any(event(member).is_set() for member in members):
        for member in members:
            member.train()
        steps += 1
        assert time.monotonic() < limit, "the newcomers do not catch up"
        time.sleep(0.002)


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.replace(", ", "-").replace(" ", "-"))
@pytest.mark.parametrize("guests", [1, 2])
def test_newcomers_come_to_the_same_bits(kind: str, guests: int) -> None:
    network, build = Network(), OPTIMIZERS[kind]
    members = [Member(network, rank, 3, build, guests) for rank in range(3)]
    newcomers = [Newcomer(network, 3 + i, 3, build) for i in range(guests)]
    errors: list[BaseException] = []

    def come(newcomer: Newcomer) -> None:
        newcomer.take_cut(newcomer.measure())
        newcomer.follower.follow()
        newcomer.follower.await_stop()
        newcomer.finish()

    threads = [in_thread(lambda n=newcomer: come(n), errors) for newcomer in newcomers]  # type: ignore[misc]
    train_until(members, lambda m: m.ready)
    for member in members:
        assert member.source.await_rates(LIMIT_S)
        member.cut()
    train_until(members, lambda m: m.caught_up, least=5)
    threads += [in_thread(member.stop, errors) for member in members]
    join_all(threads, errors)
    for newcomer in newcomers:
        assert newcomer.follower.repeated == (members[0].step - 3 - _before_cut(members[0])) * len(newcomer.optimizers)
        assert bits(newcomer.model, newcomer.optimizers) == bits(members[0].model, members[0].optimizers)


def with_the_cut(kind: str) -> tuple[list[Member], Newcomer]:
    """Two members, and a newcomer that has fetched the cut from them."""
    network, build = Network(), OPTIMIZERS[kind]
    members = [Member(network, rank, 2, build) for rank in range(2)]
    newcomer = Newcomer(network, 2, 2, build)
    rates = newcomer.measure()
    for member in members:
        assert member.source.await_rates(LIMIT_S)
        member.cut()
    newcomer.take_cut(rates)
    return members, newcomer


def _before_cut(member: Member) -> int:
    """Steps made between the start and the cut, from what was recorded since."""
    return member.step - 3 - len(member.source._steps) // len(member.optimizers)


def test_what_is_not_recorded_any_more_ends_the_following(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "KEPT_BYTES", 1000)
    monkeypatch.setattr(recording, "KEPT_SHARE", 0.0)
    members, newcomer = with_the_cut("momentum")
    for _ in range(8):
        for member in members:
            member.train()
    with pytest.raises(FollowError, match="keep no more"):
        newcomer.follower.follow()
    for member in members:
        member.source.abandon()


@pytest.mark.parametrize("when", ["before the cut", "while it follows"])
def test_the_death_of_a_member_ends_the_following(when: str) -> None:
    network, build = Network(), OPTIMIZERS["momentum"]
    members = [Member(network, rank, 2, build) for rank in range(2)]
    newcomer = Newcomer(network, 2, 2, build)
    rates = newcomer.measure({0: 1e9, 1: 1e9})
    for member in members:
        assert member.source.await_rates(LIMIT_S)
        member.cut()
        member.train()
    if when == "before the cut":
        network.dead.add(1)
        with pytest.raises(PeerFailedError):
            newcomer.take_cut(rates)
    else:
        newcomer.take_cut(rates)
        network.dead.add(1)
        with pytest.raises(FollowError, match="died"):
            newcomer.follower.follow()
    newcomer.follower.say_near()
    assert members[0].caught_up.wait(LIMIT_S), "the members are to stop for a newcomer that cannot follow"
    errors: list[BaseException] = []
    thread = in_thread(members[0].stop, errors)
    assert newcomer.follower.await_stop() is not None
    newcomer.finish()
    join_all([thread], errors)
    members[1].source.abandon()


def test_a_newcomer_that_never_gets_nearer_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaying, "PATIENCE_STEPS", 5)
    network, build = Network(), OPTIMIZERS["sgd"]
    member = Member(network, 0, 1, build)
    newcomer = Newcomer(network, 1, 1, build)
    rates = newcomer.measure()
    assert member.source.await_rates(LIMIT_S)
    member.cut()
    newcomer.take_cut(rates)
    for _ in range(20):
        member.train()
    apply = newcomer.follower._apply

    def slowly(*args: Any) -> None:
        apply(*args)
        for _ in range(2):  # the member makes two steps while the newcomer repeats one
            member.train()

    monkeypatch.setattr(newcomer.follower, "_apply", slowly)
    with pytest.raises(FollowError, match="fell behind"):
        newcomer.follower.follow()
    member.source.abandon()


def test_a_guest_that_dies_keeps_nobody_waiting() -> None:
    network = Network()
    member = Member(network, 0, 1, OPTIMIZERS["sgd"])
    network.dead.add(1)
    assert member.caught_up.wait(LIMIT_S)
    assert member.source.await_rates(LIMIT_S)
    member.stop()
    assert member.source.lost == {1}


@pytest.mark.parametrize("when", ["before it has measured", "while it follows"])
def test_a_guest_that_hangs_keeps_nobody_waiting(when: str) -> None:
    network = Network()
    member = Member(network, 0, 1, OPTIMIZERS["sgd"], limit_s=0.5)
    if when == "while it follows":
        newcomer = Newcomer(network, 1, 1, OPTIMIZERS["sgd"])
        rates = newcomer.measure()
        assert member.ready.wait(LIMIT_S)
        member.cut()
        newcomer.take_cut(rates)
    assert member.caught_up.wait(LIMIT_S), "the members are to go on without it"
    assert member.source.silent == member.source.lost == {1}
    member.source.abandon()


def test_a_guest_that_waits_for_the_members_is_not_silent() -> None:
    network = Network()
    member = Member(network, 0, 1, OPTIMIZERS["sgd"], limit_s=0.5)
    newcomer = Newcomer(network, 1, 1, OPTIMIZERS["sgd"])
    rates = newcomer.measure()
    assert member.ready.wait(LIMIT_S)
    assert not member.caught_up.wait(1.5), "it was ready, and the members had not fixed the cut"
    member.cut()
    newcomer.take_cut(rates)
    errors: list[BaseException] = []
    thread = in_thread(newcomer.follower.follow, errors)
    assert member.caught_up.wait(LIMIT_S)
    assert not member.source.silent
    member.source.stop_training(*member.state()[:2], {})
    join_all([thread], errors)


def test_members_that_stopped_keeping_at_different_steps_end_the_following() -> None:
    members, newcomer = with_the_cut("sgd")
    for index in range(6):
        for member in members:
            if index == 3 + member.rank:
                member.source._lost_track = "no more room"
            member.train()
    errors: list[BaseException] = []
    threads = [in_thread(member.stop, errors) for member in members]
    with pytest.raises(FollowError, match="no more room"):
        newcomer.follower.follow()
    newcomer.finish()
    join_all(threads, errors)


def test_members_that_left_are_told_of() -> None:
    members, newcomer = with_the_cut("sgd")
    members[1].source.abandon()
    members[0].source.tell_gone([1])
    with pytest.raises(FollowError, match="died or left"):
        newcomer.follower.follow()
    members[0].source.abandon()


def test_links_are_measured_while_all_are_used() -> None:
    network = Network(slow_s={1: 0.03})
    members = [Member(network, rank, 2, OPTIMIZERS["sgd"]) for rank in range(2)]
    rates = measure_links(Port(network, 2), [0, 1], 100_000, LIMIT_S)
    assert rates[0] > 2 * rates[1] > 0
    for member in members:
        member.source.abandon()


def test_the_learning_rate_is_scaled_once_and_taken_back() -> None:
    model = build_model()
    (optimizer,) = decaying(model)
    used: list[float] = []
    ScaledRate(optimizer, lambda: 3.0)
    StepHooks(optimizer, lambda: used.append(optimizer.param_groups[0]["lr"]), lambda: None)
    for _ in range(2):
        model(torch.randn(2, 6)).sum().backward()
        optimizer.step()
    assert used == [pytest.approx(0.3)] * 2
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_the_learning_rate_after_a_step_that_fails() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.25)
    scaled = ScaledRate(optimizer, lambda: 3.0)
    seen: list[float] = []

    def closure(*, fails: bool) -> float:
        seen.append(optimizer.param_groups[0]["lr"])
        if fails:
            raise ZeroDivisionError
        return 0.0

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: closure(fails=True))
    with unscaled([scaled]):
        assert optimizer.param_groups[0]["lr"] == 0.25
    for _ in range(2):
        optimizer.step(lambda: closure(fails=False))
        assert optimizer.param_groups[0]["lr"] == 0.25
    assert seen == [0.75] * 4


def test_hooks_of_a_step_that_survives_what_it_calls() -> None:
    class Retrying(torch.optim.SGD):
        """Makes two steps of its parent's in each of its own, and one that fails before them."""

        def step(self, closure: Any = None) -> Any:
            with contextlib.suppress(ZeroDivisionError):
                super().step(lambda: 1 / 0)
            super().step()
            return super().step(closure)

    optimizer = Retrying([nn.Parameter(torch.ones(1))], lr=0.25)
    called: list[str] = []
    StepHooks(optimizer, lambda: called.append("before"), lambda: called.append("after"))
    for _ in range(2):
        optimizer.step()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    optimizer.step()
    assert called == ["before", "after"] * 4


# -- small parts -------------------------------------------------------------------------------------------


def test_a_snapshot_keeps_what_was_there() -> None:
    tensors = {"a": torch.arange(40, dtype=torch.int32), "b": torch.arange(30, dtype=torch.uint8)}
    layout = Layout.of(tensors)
    before = b"".join(ctypes.string_at(*piece) for piece in layout.pieces(tensors, 0, layout.total_bytes))
    snapshot = Snapshot([(100, 180), (10, 50)], layout, tensors)
    for tensor in tensors.values():
        tensor.zero_()
    for start, stop in [(10, 50), (20, 21), (100, 180), (150, 180)]:
        assert b"".join(ctypes.string_at(*piece) for piece in snapshot.pieces(start, stop)) == before[start:stop]
    with pytest.raises(ValueError, match="not in this member's copy"):
        snapshot.pieces(40, 60)


def test_slices_cover_everything_once() -> None:
    for total in (0, 1, 7, 100):
        for count in (1, 2, 3, 7):
            spans = [slice_of(total, index, count) for index in range(count)]
            assert [spans[0][0], *(stop for _, stop in spans)] == [*(start for start, _ in spans), total]


def test_overlapping_ranges_are_merged() -> None:
    assert merged([(5, 9), (0, 3), (8, 12), (3, 4), (20, 21)]) == [(0, 4), (5, 12), (20, 21)]
    assert merged([]) == []


def test_what_steps_bring_about_is_told_from_the_rest() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    tensors = state_of(model, [optimizer]).tensors
    layout = Layout.of(tensors)
    lacking, brought = not_repeated(layout, tensors, [optimizer])
    names = {e.name for e in layout.entries if any(start <= e.offset < stop for start, stop in lacking)}
    assert names == {"model.1.running_mean", "model.1.running_var", "model.1.num_batches_tracked"}
    assert sum(stop - start for start, stop in lacking + brought) == layout.total_bytes


class WithTensor(torch.optim.SGD):
    """A hyper-parameter is a tensor."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=torch.tensor(0.1))


def test_members_are_expected_to_send_as_fast_as_the_monitor_knows() -> None:
    def link(a: str, b: str, bytes_per_s: float | None, state: str = "up") -> dict[str, Any]:
        return {"a": a, "b": b, "bytes_per_s": bytes_per_s, "state": state}

    names = {0: "a:1", 1: "b:2", 2: "c:3", 3: "d:4"}
    links = [link("a", "new", 4e6), link("new", "z", 9e9), link("b", "new", 2e7), link("a", "b", 1.0)]
    assert known_rates(links, "new", names) == {0: 4e6, 1: 2e7, 2: 2e7, 3: 2e7}
    cut = [*links, link("c", "new", 3e6, "cut"), link("d", "new", 3e6, "detour")]
    assert known_rates(cut, "new", names) == {0: 4e6, 1: 2e7, 2: UNUSABLE_LINK_BYTES_PER_S, 3: 3e6}
    assert known_rates([link("a", "new", None)], "new", names) == known_rates([], "new", names) == {}
    only_cut = known_rates([link("c", "new", None, "down")], "new", names)
    assert min(only_cut, key=lambda rank: only_cut[rank]) == 2


def test_the_policy_follows_from_what_all_members_know() -> None:
    model = build_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    first, again = Join("j", "", 0, "m"), Join("j", "", 0, "m", attempt=2)
    assert overlaps("overlap", [first], 10, [sgd])
    assert not overlaps("overlap", [first, again], 10, [sgd])
    assert not overlaps("blocking", [first], 1 << 40, [sgd])
    assert not overlaps("auto", [first], 10, [sgd])
    assert overlaps("auto", [first], 1 << 30, [sgd])
    assert not overlaps("overlap", [first], 10, [torch.optim.LBFGS(model.parameters())])
    assert not can_follow([sgd, WithTensor(model.parameters())])


def test_what_is_kept_within_a_closure_has_the_rate_as_it_is() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.25)
    scaled = ScaledRate(optimizer, lambda: 3.0)
    seen = []

    def closure() -> float:
        seen.append(optimizer.param_groups[0]["lr"])
        with unscaled([scaled]):
            seen.append(optimizer.param_groups[0]["lr"])
        seen.append(optimizer.param_groups[0]["lr"])
        return 0.0

    optimizer.step(closure)
    assert seen == [0.75, 0.25, 0.75]
    with unscaled([scaled]):
        assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["lr"] == 0.25
