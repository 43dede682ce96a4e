"""The training state on its way to a newcomer: its bytes in a line, members that serve them, the newcomer that pulls.

Members and newcomer run in one thread over a network that is simulated: whenever the newcomer looks for something, a
moment passes in which members serve and bytes move. Time is that of the simulation too.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos_mpi.elastic import arrival
from chaos_mpi.elastic.arrival import await_word
from chaos_mpi.errors import JoinError, PeerFailedError, WaitTimeoutError
from chaos_mpi.replication import puller, source
from chaos_mpi.replication.layout import Layout, Piece, Range, checksum, dense
from chaos_mpi.replication.puller import StatePuller
from chaos_mpi.replication.source import StateSource
from chaos_mpi.sharding import Neighbour, fluid_bound_s, plan
from chaos_mpi.sharding.held import share_held, widened
from chaos_mpi.sharding.plan import size

# -- a network in one process ------------------------------------------------------------------------------

#: What passes at each look, seconds.
TICK_S = 1e-4


@dataclass
class Flow:
    """One transfer, from when the first of its two ends is there."""

    sender: int
    receiver: int
    out: Sequence[Piece] | None = None
    into: Sequence[Piece] | None = None
    moved: float = 0.0
    complete: bool = False


@dataclass
class Network:
    """Moves messages and memory between ranks of this process, and stands in for the module ``time`` meanwhile.

    Attributes:
        bytes_per_s: of a link; ``slow`` has other numbers for some senders.
        dies_at: rank by the moment it dies in, counted in calls of anybody's.
        mute: ranks that are alive and do nothing.
        damage: whether the transfer that is complete as this number of all, from this rank, has a wrong byte.
        tells_senders: a message to a dead rank is refused, else it is lost.
        tells_receivers: to receive from a dead rank is refused, else it fails later.
        loses_mail: what a dead rank had sent is lost, else it is still delivered.
    """

    bytes_per_s: float = 1e9
    slow: Mapping[int, float] = field(default_factory=dict)
    dies_at: Mapping[int, int] = field(default_factory=dict)
    mute: frozenset[int] = frozenset()
    damage: Callable[[int, int], bool] = lambda number, sender: False
    tells_senders: bool = True
    tells_receivers: bool = False
    loses_mail: bool = False
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.members: dict[int, StateSource] = {}
        self.dead: set[int] = set()
        self.moment = 0
        self.completed = 0
        self._mail: dict[tuple[int, int], deque[str]] = {}
        self._flows: dict[tuple[int, int, int], Flow] = {}
        self._moving = False

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pass_time(seconds)

    def happen(self) -> None:
        """A moment in which somebody may die."""
        self.moment += 1
        if (rank := self.dies_at.get(self.moment)) is not None:
            self.kill(rank)

    def kill(self, rank: int) -> None:
        self.dead.add(rank)
        if self.loses_mail:
            for (sender, _), mail in self._mail.items():
                if sender == rank:
                    mail.clear()

    def mail(self, sender: int, receiver: int) -> deque[str]:
        return self._mail.setdefault((sender, receiver), deque())

    def flow(self, sender: int, receiver: int, number: int) -> Flow:
        return self._flows.setdefault((sender, receiver, number), Flow(sender, receiver))

    def pass_time(self, seconds: float = TICK_S) -> None:
        """Members serve, and bytes move."""
        if self._moving:
            return
        self._moving = True
        self.now += seconds
        for rank, member in self.members.items():
            if rank not in self.dead | self.mute:
                member.step()
        budgets: dict[int, float] = {}
        for key, flow in list(self._flows.items()):
            if flow.complete or {flow.sender, flow.receiver} & self.dead or flow.out is None or flow.into is None:
                continue
            budget = budgets.get(flow.sender, self.slow.get(flow.sender, self.bytes_per_s) * seconds)
            data = b"".join(ctypes.string_at(*piece) for piece in flow.out)
            step = min(budget, len(data) - flow.moved)
            budgets[flow.sender] = budget - step
            flow.moved += step
            write(flow.into, data[: int(flow.moved)])
            if flow.moved >= len(data):
                flow.complete = True
                self.completed += 1
                if data and self.damage(self.completed, flow.sender):
                    write(flow.into, bytes([data[0] ^ 0x55]))
                del self._flows[key]
        self._moving = False


def write(pieces: Sequence[Piece], data: bytes) -> None:
    """The data into memory, as far as it goes."""
    for address, nbytes in pieces:
        part, data = data[:nbytes], data[nbytes:]
        ctypes.memmove(address, part, len(part))


@dataclass
class End:
    """One end of a transfer."""

    port: Port
    flow: Flow
    other: int

    def done(self) -> bool:
        self.port.look()
        if not self.flow.complete and self.other in self.port.network.dead:
            raise PeerFailedError(f"rank {self.other} is dead")
        return self.flow.complete


@dataclass
class Port:
    """The transport of one rank; time passes when it is ``driving`` and looks for something."""

    network: Network
    rank: int
    driving: bool = False
    gone: set[int] = field(default_factory=set)

    def look(self) -> None:
        self.network.happen()
        if self.driving:
            self.network.pass_time()

    def failed(self) -> list[int]:
        """Ranks that are known here to be dead."""
        return sorted(self.network.dead)

    def send(self, to: int, message: dict[str, Any]) -> None:
        self.network.happen()
        if to in self.network.dead:
            if self.network.tells_senders:
                raise PeerFailedError(f"rank {to} is dead")
            return
        self.network.mail(self.rank, to).append(json.dumps(message))

    def poll(self, source: int) -> dict[str, Any] | None:
        self.look()
        if mail := self.network.mail(source, self.rank):
            message: dict[str, Any] = json.loads(mail.popleft())
            self.gone.update(message.get("dead", ()))
            return message
        if source in self.network.dead or source in self.gone:
            raise PeerFailedError(f"rank {source} is dead")
        return None

    def send_data(self, to: int, number: int, pieces: Sequence[Piece]) -> End:
        self.network.happen()
        flow = self.network.flow(self.rank, to, number)
        flow.out = pieces
        return End(self, flow, to)

    def receive_data(self, source: int, number: int, pieces: Sequence[Piece]) -> End:
        self.network.happen()
        if source in self.network.dead and self.network.tells_receivers:
            raise PeerFailedError(f"rank {source} is dead")
        flow = self.network.flow(source, self.rank, number)
        flow.into = pieces
        return End(self, flow, source)


@dataclass
class Newcomer:
    """A rank that pulls from members 0, 1, ..., all of which hold the same state."""

    network: Network
    state: dict[str, torch.Tensor]
    members: int
    limit_s: float = 5.0
    told: list[tuple[int, int, dict[int, float]]] = field(default_factory=list)
    bandwidths: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rank = self.members
        self.layout = Layout.of(self.state)
        self.tensors = self.layout.allocate({})
        for tensor in self.tensors.values():
            if tensor.numel():
                ctypes.memset(tensor.data_ptr(), 0xA5, tensor.nbytes)
        for rank in range(self.members):
            copies = {name: tensor.clone(memory_format=torch.preserve_format) for name, tensor in self.state.items()}
            port = Port(self.network, rank)
            self.network.members[rank] = StateSource(port, [self.rank], self.layout, copies, {"hello": rank})
        self.port = Port(self.network, self.rank, driving=True)
        neighbours = {
            rank: Neighbour(f"m{rank}", self.bandwidths.get(rank, 1e9), shard_cost_s=1e-7)
            for rank in range(self.members)
        }
        self.puller = StatePuller(
            self.port, neighbours, self.layout, self.tensors, self.limit_s, lambda *told: self.told.append(told)
        )

    @property
    def everything(self) -> list[Range]:
        return [(0, self.layout.total_bytes)]

    def has_it_all(self) -> bool:
        return all(bytes_of(self.tensors[name]) == bytes_of(tensor) for name, tensor in self.state.items())


@contextlib.contextmanager
def simulated(network: Network, shards: Sequence[int] = (64, 128, 256), checks: int = 1000) -> Iterator[None]:
    """Within, replication goes by the clock of the network, with shards small enough for a small state to have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(puller, "time", network)
        patch.setattr(source, "time", network)
        patch.setattr(arrival, "time", network)
        patch.setattr(puller, "SHARD_SIZES", tuple(shards))
        patch.setattr(puller, "CHECK_BYTES", checks)
        yield


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a dense tensor in the order of its memory."""
    if not tensor.numel():
        return b""
    flat = torch.as_strided(tensor.detach(), (tensor.numel(),), (1,)).clone()
    return flat.view(torch.uint8).numpy().tobytes()


def noise(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def small_state() -> dict[str, torch.Tensor]:
    """Some 8 kB in tensors of many kinds."""
    image = noise(4 * 3 * 5 * 7).view(4, 3, 5, 7).contiguous(memory_format=torch.channels_last)
    return {
        "weights": noise(4000, 1).view(torch.float32).view(25, 40),
        "half": noise(2000, 2).view(torch.bfloat16),
        "image": image,
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 7),
        "mask": noise(301, 3) > 100,
        "rest": noise(1300, 4),
    }


# -- the bytes in a line -----------------------------------------------------------------------------------

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


@st.composite
def some_tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Dense tensors: of no dimension, empty, in the channels-last format, with extents of one."""
    tensors = {}
    for index in range(draw(st.integers(0, 6))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        numel = torch.Size(shape).numel()
        flat = noise(numel * dtype.itemsize, index)
        tensor = (flat > 100 if dtype is torch.bool else flat.view(dtype)).view(shape)
        if len(shape) == 4 and draw(st.booleans()):
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        tensors[draw(st.sampled_from("abcdef")) + str(index)] = tensor
    return tensors


def read(pieces: Sequence[Piece]) -> bytes:
    return b"".join(ctypes.string_at(*piece) for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), tensors=some_tensors())
def test_pieces_of_any_ranges_are_the_bytes_of_the_tensors_in_the_order_of_their_names(
    data: st.DataObject, tensors: dict[str, torch.Tensor]
) -> None:
    layout = Layout.of(tensors)
    flat = b"".join(bytes_of(tensors[name]) for name in sorted(tensors))
    assert layout.total_bytes == len(flat)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(flat)), max_size=8)))
    for start, stop in itertools.pairwise([0, *cuts, len(flat)]):
        pieces = layout.pieces(tensors, start, stop)
        assert read(pieces) == flat[start:stop]
        assert all(nbytes for _, nbytes in pieces)
    halves = [piece for span in itertools.pairwise([0, *cuts, len(flat)]) for piece in layout.pieces(tensors, *span)]
    assert checksum(halves) == checksum(layout.pieces(tensors, 0, len(flat)))


@settings(max_examples=100, deadline=None)
@given(tensors=some_tensors())
def test_a_layout_as_json_makes_tensors_of_the_same_kind(tensors: dict[str, torch.Tensor]) -> None:
    layout = Layout.of(tensors)
    again = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    assert again.digest() == layout.digest()
    made = again.allocate({})
    assert Layout.of(made) == layout
    write(again.pieces(made, 0, again.total_bytes), read(layout.pieces(tensors, 0, layout.total_bytes)))
    for name, tensor in tensors.items():
        assert bytes_of(made[name]) == bytes_of(tensor)
        assert (made[name].dtype, made[name].shape) == (tensor.dtype, tensor.shape)


@settings(max_examples=100, deadline=None)
@given(tensors=some_tensors(), wanted=st.lists(st.booleans(), min_size=6, max_size=6))
def test_ranges_of_chosen_entries(tensors: dict[str, torch.Tensor], wanted: list[bool]) -> None:
    layout = Layout.of(tensors)
    chosen = wanted[: len(layout.entries)]
    ranges = layout.ranges(chosen)
    covered = [byte for start, stop in ranges for byte in range(start, stop)]
    expected = [
        byte
        for e, use in zip(layout.entries, chosen, strict=True)
        if use
        for byte in range(e.offset, e.offset + e.nbytes)
    ]
    assert covered == expected
    assert all(before[1] < after[0] for before, after in itertools.pairwise(ranges))


def test_the_digest_is_of_the_geometry_and_not_of_values() -> None:
    state = small_state()
    digest = Layout.of(state).digest()
    assert Layout.of({name: torch.zeros_like(t) for name, t in state.items()}).digest() == digest
    others = [
        {**state, "rest": noise(1301)},
        {**state, "weights": state["weights"].view(40, 25)},
        {**state, "weights": state["weights"].view(torch.int32)},
        {**state, "image": state["image"].contiguous()},
        {name + "!": tensor for name, tensor in state.items()},
    ]
    assert len({digest, *(Layout.of(other).digest() for other in others)}) == 6


def test_bytes_outside_of_the_state_are_refused() -> None:
    layout = Layout.of({"a": torch.zeros(3)})
    for span in ((-1, 2), (0, 13), (8, 4), (13, 13)):
        with pytest.raises(ValueError, match="not in a state of 12 bytes"):
            layout.pieces({"a": torch.zeros(3)}, *span)
    assert layout.pieces({"a": torch.zeros(3)}, 12, 12) == []
    assert Layout.of({}).total_bytes == 0
    with pytest.raises(ValueError, match="longer"):
        layout.ranges([True, True])


@pytest.mark.parametrize(
    ("live", "reused"),
    [
        (torch.zeros(4, 2, 3, 3).contiguous(memory_format=torch.channels_last), True),
        (torch.zeros(4, 2, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_(), True),
        (torch.zeros(4, 2, 3, 3), False),
        (torch.zeros(4, 2, 3, 3, dtype=torch.int32).contiguous(memory_format=torch.channels_last), False),
        (torch.zeros(4, 2, 9), False),
        (torch.zeros(1, 2, 3, 3).expand(4, 2, 3, 3), False),
    ],
)
def test_memory_is_reused_only_where_it_is_laid_out_alike(live: torch.Tensor, reused: bool) -> None:
    state = {"image": torch.ones(4, 2, 3, 3).contiguous(memory_format=torch.channels_last), "b": torch.ones(2)}
    made = Layout.of(state).allocate({"image": live, "b": torch.ones(3), "unused": torch.ones(2)})
    assert list(made) == ["b", "image"]
    assert (made["image"] is live) == reused
    assert (made["image"].shape, made["image"].stride()) == ((4, 2, 3, 3), (18, 1, 6, 2))
    assert made["b"].shape == (2,)


def test_dense_copies_only_what_has_gaps() -> None:
    base = torch.arange(24.0).view(2, 3, 4)
    image = torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for tensor in (base, base[1], torch.tensor(1.0), image, torch.empty(0, 3), base.clone().requires_grad_()):
        assert dense(tensor).data_ptr() == tensor.data_ptr()
        assert not dense(tensor).requires_grad
    video = torch.arange(120.0).view(1, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    for tensor in (base.transpose(0, 2), base[:, ::2], base[:, :, 1], torch.ones(1).expand(5), image[:, :2], video):
        copy = dense(tensor)
        assert copy.data_ptr() != tensor.data_ptr()
        assert torch.equal(copy, tensor)
        assert read(Layout.of({"t": copy}).pieces({"t": copy}, 0, copy.nbytes)) == copy.numpy().tobytes()


# -- fetching ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [1, 2, 3, 4])
def test_everything_arrives_bit_for_bit(members: int) -> None:
    network = Network()
    guest = Newcomer(network, small_state(), members)
    with simulated(network):
        fetched = guest.puller.fetch(guest.everything)
        assert guest.has_it_all()
        assert sum(fetched.sources.values()) == guest.layout.total_bytes
        assert fetched.sources == {rank: member.sent_bytes[guest.rank] for rank, member in network.members.items()}
        assert set(fetched.sources) == set(range(members))
        assert fetched.seconds > 0
        assert guest.puller.verify(guest.everything) == 0
        assert guest.puller.alive == list(range(members))


def test_only_what_is_asked_for_is_touched() -> None:
    network = Network()
    guest = Newcomer(network, small_state(), 3)
    ranges = [(10, 700), (1500, 1501), (4000, 6000)]
    flat = read(guest.layout.pieces(network.members[0]._tensors, 0, guest.layout.total_bytes))
    expected = bytearray(b"\xa5" * len(flat))
    for start, stop in ranges:
        expected[start:stop] = flat[start:stop]
    with simulated(network):
        fetched = guest.puller.fetch(ranges)
        assert sum(fetched.sources.values()) == 690 + 1 + 2000
        assert read(guest.layout.pieces(guest.tensors, 0, len(flat))) == bytes(expected)
        assert guest.puller.verify(ranges) == 0
        assert guest.puller.fetch([]).sources == {}


def test_two_newcomers_are_served_at_once() -> None:
    network = Network()
    state, layout = small_state(), Layout.of(small_state())
    members = [StateSource(Port(network, rank), [2, 3], layout, state, {}) for rank in range(2)]
    network.members.update(enumerate(members))
    neighbours = {rank: Neighbour(f"m{rank}", 1e9) for rank in range(2)}
    with simulated(network):
        for rank in (2, 3):
            tensors = layout.allocate({})
            pulling = StatePuller(Port(network, rank, driving=True), neighbours, layout, tensors, 5.0)
            pulling.fetch([(0, layout.total_bytes)])
            assert all(bytes_of(tensors[name]) == bytes_of(tensor) for name, tensor in state.items())
    assert [sum(member.sent_bytes[rank] for member in members) for rank in (2, 3)] == [layout.total_bytes] * 2


@settings(max_examples=100, deadline=None)
@given(
    members=st.integers(2, 4),
    deaths=st.dictionaries(st.integers(1, 700), st.integers(0, 3), max_size=3),
    tells_senders=st.booleans(),
    loses_mail=st.booleans(),
)
def test_members_may_die_at_any_moment_if_one_lives(
    members: int, deaths: dict[int, int], tells_senders: bool, loses_mail: bool
) -> None:
    survivor = members - 1
    network = Network(
        2e6,
        dies_at={moment: rank for moment, rank in deaths.items() if rank < survivor},
        tells_senders=tells_senders,
        loses_mail=loses_mail,
    )
    guest = Newcomer(network, small_state(), members)
    with simulated(network):
        fetched = guest.puller.fetch(guest.everything)
        assert guest.has_it_all()
        assert sum(fetched.sources.values()) == guest.layout.total_bytes
        assert guest.puller.verify(guest.everything) == 0
        assert survivor in guest.puller.alive


def test_what_a_dead_member_owed_is_counted_as_moved() -> None:
    network = Network(2e6)
    guest = Newcomer(network, small_state(), 2)
    network.damage = lambda number, sender: network.kill(0) or False  # with the first shard that is complete
    with simulated(network):
        fetched = guest.puller.fetch(guest.everything)
    assert guest.has_it_all()
    assert fetched.moved_shards > 0
    assert fetched.sources[1] > guest.layout.total_bytes / 2
    assert guest.puller.alive == [1]


@settings(max_examples=60, deadline=None)
@given(members=st.integers(1, 3), data=st.data())
def test_nothing_is_left_when_all_members_die(members: int, data: st.DataObject) -> None:
    moments = data.draw(st.lists(st.integers(1, 120), min_size=members, max_size=members, unique=True))
    network = Network(2e6, dies_at=dict(zip(moments, range(members), strict=True)))
    guest = Newcomer(network, small_state(), members)
    with simulated(network), pytest.raises(JoinError, match="all members that had the training state died"):
        guest.puller.fetch(guest.everything)


def test_shards_move_from_a_slow_member_to_others() -> None:
    network = Network(2e6, slow={1: 1e5})
    guest = Newcomer(network, small_state(), 3)
    with simulated(network):
        fetched = guest.puller.fetch(guest.everything)
    assert guest.has_it_all()
    assert fetched.moved_shards > 0
    # With its share of a third it alone would have taken this long.
    assert fetched.seconds < guest.layout.total_bytes / 3 / 1e5
    assert fetched.sources[1] < min(fetched.sources[0], fetched.sources[2])


@settings(max_examples=6, deadline=None)
@given(rates=st.lists(st.integers(1, 10), min_size=2, max_size=4))
def test_unequal_links_of_which_nothing_is_known_are_all_used_to_the_end(rates: list[int]) -> None:
    network = Network(slow={rank: rate * 4e3 for rank, rate in enumerate(rates)})
    guest = Newcomer(network, {"all": noise(16_000)}, len(rates))
    with simulated(network, shards=[64 << power for power in range(8)]):
        fetched = guest.puller.fetch(guest.everything)
    assert guest.has_it_all()
    bound_s = fluid_bound_s(16_000, [Neighbour(f"{rank}", rate * 4e3) for rank, rate in enumerate(rates)])
    # To look once at everything takes up to 50 ticks here.
    assert fetched.seconds < 1.15 * bound_s + 50 * TICK_S


def test_the_plan_follows_what_is_known_of_the_links() -> None:
    network = Network(1e5, slow={0: 3e5})
    guest = Newcomer(network, small_state(), 2, bandwidths={0: 3e5, 1: 1e5})
    with simulated(network):
        fetched = guest.puller.fetch(guest.everything)
    assert guest.has_it_all()
    assert 2 < fetched.sources[0] / fetched.sources[1] < 4


def planned_by(guest: Newcomer, rates: Sequence[float]) -> tuple[dict[int, list[Range]], dict[int, Range]]:
    """What each member is to send if its link is as fast as that, and what it holds; it refuses everything else."""
    neighbours = [Neighbour(f"{rank}", rate) for rank, rate in enumerate(rates)]
    assignment = plan(guest.layout.total_bytes, neighbours, shard_sizes=[64]).assignment
    held = {int(name): span for name, span in widened(assignment).items()}
    for rank, member in guest.network.members.items():
        pieces = member._pieces

        def checked(span: Sequence[int], rank: int = rank, pieces: Callable[..., list[Piece]] = pieces) -> list[Piece]:
            assert held[rank][0] <= span[0]
            assert span[1] <= held[rank][1]
            return pieces(span)

        member._pieces = checked
    return {int(name): list(runs) for name, runs in assignment.items()}, held


@settings(max_examples=6, deadline=None)
@given(links=st.lists(st.tuples(st.integers(1, 10), st.floats(0.6, 1.0)), min_size=2, max_size=4))
def test_members_are_asked_only_for_what_they_hold_and_help_each_other_out(links: list[tuple[int, float]]) -> None:
    """Links are up to 40 % slower than they seemed."""
    assumed = {rank: seemed * 4e3 for rank, (seemed, _) in enumerate(links)}
    real = {rank: seemed * 4e3 * factor for rank, (seemed, factor) in enumerate(links)}
    guest = Newcomer(Network(slow=real), {"all": noise(16_000)}, len(links), bandwidths=assumed)
    shards, held = planned_by(guest, list(assumed.values()))
    with simulated(guest.network, shards=[64 << power for power in range(8)]):
        fetched = guest.puller.fetch_planned(shards, held)
    assert guest.has_it_all()
    neighbours = [Neighbour(f"{rank}", rate) for rank, rate in real.items() if rank in held]
    best = share_held(guest.everything, neighbours, {str(rank): span for rank, span in held.items()})
    best_s = max(n.finish_s(size(best[n.name]), 0) for n in neighbours if n.name in best)
    assert fetched.seconds < 1.1 * best_s + 50 * TICK_S


def test_a_link_that_is_half_as_fast_as_it_seemed_delays_nothing() -> None:
    real = {0: 2e4, 1: 1e4, 2: 2e4, 3: 2e4}
    guest = Newcomer(Network(slow=real), {"all": noise(40_000)}, 4)
    shards, held = planned_by(guest, [2e4] * 4)
    with simulated(guest.network, shards=[64 << power for power in range(8)]):
        fetched = guest.puller.fetch_planned(shards, held)
    assert guest.has_it_all()
    assert fetched.moved_shards > 0
    # By the plan alone it would be 1.75 times as long as possible.
    assert fetched.seconds < 1.15 * 40_000 / sum(real.values())


@pytest.mark.parametrize("moment", [1, 40, 200])
def test_what_a_member_alone_held_is_lost_with_it(moment: int) -> None:
    guest = Newcomer(Network(2e4, dies_at={moment: 1}), {"all": noise(16_000)}, 3)
    shards, held = planned_by(guest, [2e4] * 3)
    with simulated(guest.network), pytest.raises(PeerFailedError, match="had a part of the cut"):
        guest.puller.fetch_planned(shards, held)
    assert guest.puller.alive == [0, 2]


def test_progress_is_told_about_twice_a_second() -> None:
    network = Network(1.5e3)
    guest = Newcomer(network, small_state(), 2)
    with simulated(network):
        seconds = guest.puller.fetch(guest.everything).seconds
    assert seconds > 2
    assert abs(len(guest.told) - seconds * 2) <= 2
    received = [got for got, _, _ in guest.told]
    assert received == sorted(received)
    assert {wanted for _, wanted, _ in guest.told} == {guest.layout.total_bytes}
    assert all(set(rates) == {0, 1} for _, _, rates in guest.told)


# -- checking ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", [1, 5, 20])
def test_damage_on_the_way_is_found_and_mended(damaged: int) -> None:
    network = Network(damage=lambda number, sender: number == damaged)
    guest = Newcomer(network, small_state(), 3)
    with simulated(network):
        guest.puller.fetch(guest.everything)
        assert not guest.has_it_all()
        again = guest.puller.verify(guest.everything)
        assert 0 < again <= 1000
        assert guest.has_it_all()
        assert guest.puller.verify(guest.everything) == 0


@pytest.mark.parametrize("members", [1, 2, 3])
def test_damage_that_comes_back_is_an_error(members: int) -> None:
    network = Network(damage=lambda number, sender: True)
    guest = Newcomer(network, small_state(), members)
    with simulated(network):
        guest.puller.fetch(guest.everything)
        with pytest.raises(JoinError, match="differ between members, or are damaged on the way"):
            guest.puller.verify(guest.everything)


@settings(max_examples=60, deadline=None)
@given(
    deaths=st.dictionaries(st.integers(1, 60), st.integers(0, 1), max_size=2), tells=st.booleans(), loses=st.booleans()
)
def test_members_may_die_while_the_state_is_checked(deaths: dict[int, int], tells: bool, loses: bool) -> None:
    network = Network(tells_senders=tells, loses_mail=loses)
    guest = Newcomer(network, small_state(), 3)
    with simulated(network):
        guest.puller.fetch(guest.everything)
        guest.tensors["rest"][7] ^= 1
        network.dies_at = {network.moment + moment: rank for moment, rank in deaths.items()}
        assert 0 < guest.puller.verify(guest.everything) <= 1000
        assert guest.has_it_all()


def test_a_state_that_nobody_can_check_any_more_is_not_used() -> None:
    network = Network()
    guest = Newcomer(network, small_state(), 2)
    with simulated(network):
        guest.puller.fetch(guest.everything)
        network.dies_at = {network.moment + 3: 0, network.moment + 4: 1}
        with pytest.raises(JoinError, match="died before this rank had checked it"):
            guest.puller.verify(guest.everything)


# -- limits ------------------------------------------------------------------------------------------------


def test_the_newcomer_waits_for_bytes_and_checksums_no_longer_than_its_limit() -> None:
    network = Network(mute=frozenset({0, 1}))
    guest = Newcomer(network, small_state(), 2, limit_s=3)
    with simulated(network):
        begun = network.now
        with pytest.raises(WaitTimeoutError, match="waited 3 s for bytes of the training state"):
            guest.puller.fetch(guest.everything)
        assert 3 < network.now - begun < 3.1
        begun = network.now
        with pytest.raises(WaitTimeoutError, match="waited 3 s for checksums of the training state"):
            guest.puller.verify(guest.everything)
        assert 3 < network.now - begun < 3.1


def test_a_link_that_goes_on_moving_is_waited_for() -> None:
    network = Network(4e3)
    guest = Newcomer(network, small_state(), 1, limit_s=0.5)
    with simulated(network):
        assert guest.puller.fetch(guest.everything).seconds > 1.5
    assert guest.has_it_all()


# -- the side of the members -------------------------------------------------------------------------------


def member_with(network: Network, *guests: int) -> tuple[StateSource, dict[str, torch.Tensor], Layout]:
    """A member that drives the time itself."""
    state = {"a": noise(100, 1), "b": noise(50, 2)}
    layout = Layout.of(state)
    return StateSource(Port(network, 0, driving=True), guests, layout, state, {"step": 7}), state, layout


def test_a_member_answers_and_ends_when_all_guests_have_what_they_need() -> None:
    network = Network()
    member, state, layout = member_with(network, 1, 2)
    guests = [Port(network, rank) for rank in (1, 2)]
    target = {"a": torch.zeros(100, dtype=torch.uint8), "b": torch.zeros(50, dtype=torch.uint8)}
    incoming = guests[0].receive_data(0, 5, layout.pieces(target, 90, 110))
    for message in ({"invitation": True}, {"sum": [3, 120], "number": 4}, {"get": [90, 110], "number": 5}):
        guests[0].send(0, message)
    guests[0].send(0, {"received": True})
    guests[1].send(0, {"received": True})
    with simulated(network):
        member.serve(10.0, lambda: "nobody")
    assert guests[0].poll(0) == {"step": 7}
    assert guests[0].poll(0) == {"sum": checksum(layout.pieces(state, 3, 120)), "number": 4}
    assert guests[0].poll(0) is None
    assert incoming.done()
    assert torch.equal(target["a"][90:], state["a"][90:])
    assert torch.equal(target["b"][:10], state["b"][:10])
    assert (member.lost, member.sent_bytes) == (set(), {1: 20, 2: 0})


def test_a_member_waits_for_guests_no_longer_than_its_limit() -> None:
    network = Network()
    member, _, _ = member_with(network, 1)
    with simulated(network), pytest.raises(WaitTimeoutError, match="waited 20 s for the guest"):
        member.serve(20.0, lambda: "the guest")
    assert 20 < network.now - 1000 < 21


@pytest.mark.parametrize("moment", ["before it asks", "while bytes move", "before an answer"])
def test_guests_that_die_are_counted_as_lost_and_others_served(moment: str) -> None:
    network = Network(1e4)
    member, _, layout = member_with(network, 1, 2)
    doomed, other = Port(network, 1), Port(network, 2)
    target = layout.allocate({})
    if moment == "before it asks":
        network.kill(1)
    elif moment == "while bytes move":
        for number, span in enumerate(((0, 100), (100, 150))):
            doomed.receive_data(0, number, layout.pieces(target, *span))
            doomed.send(0, {"get": list(span), "number": number})
        network.dies_at = {network.moment + 30: 1}
    else:
        doomed.send(0, {"invitation": True})
        network.kill(1)
    other_target = layout.allocate({})
    other.receive_data(0, 0, layout.pieces(other_target, 0, 150))
    other.send(0, {"get": [0, 150], "number": 0})
    other.send(0, {"received": True})
    with simulated(network):
        member.serve(10.0, lambda: "the guests")
    assert member.lost == {1}
    assert torch.equal(other_target["a"], noise(100, 1))
    assert torch.equal(other_target["b"], noise(50, 2))
    member.conclude(False)
    said = [message for message in iter(lambda: other.poll(0), None) if "complete" in message]
    assert said == [{"complete": False}]


def test_newcomers_take_the_word_of_the_first_member_that_says_it() -> None:
    network = Network()
    newcomer, *members = (Port(network, rank) for rank in range(4))
    network.kill(1)
    members[1].send(0, {"dead": [1]})
    members[2].send(0, {"complete": False})
    assert await_word(newcomer, [1, 2, 3], "complete", 5.0, "their word") is False  # type: ignore[arg-type]


def test_newcomers_learn_that_nobody_is_left_to_say_a_word() -> None:
    network = Network()
    newcomer, *members = (Port(network, rank) for rank in range(4))
    network.kill(1)
    members[0].send(0, {"dead": [3]})
    members[1].send(0, {"dead": [1, 3]})
    members[1].send(0, {"dead": [2]})
    assert await_word(newcomer, [1, 2, 3], "complete", 5.0, "their word") is None  # type: ignore[arg-type]


def test_newcomers_wait_for_a_word_no_longer_than_their_limit() -> None:
    network = Network()
    newcomer = Port(network, 0, driving=True)
    with simulated(network), pytest.raises(WaitTimeoutError, match="waited 5 s for their word"):
        await_word(newcomer, [1, 2], "complete", 5.0, "their word")  # type: ignore[arg-type]
    assert 5 < network.now - 1000 < 6
