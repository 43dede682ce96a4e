"""An optimizer whose state is split among the ranks of a node, and replicated between nodes.

Every member has the whole model; each keeps the optimizer's state of some parameters only, and updates these. Between
nodes the split is the same, so what a dead rank kept, another node still has: that is what the others go on from.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from chaos_mpi.elastic.current import current_session
from chaos_mpi.elastic.digest import tensor_bytes
from chaos_mpi.elastic.exchanges import AllGather
from chaos_mpi.elastic.session import Session
from chaos_mpi.errors import ConfigError, RecoveryError
from chaos_mpi.membership import host_of


class ShardedOptimizer(torch.optim.Optimizer):
    """Runs ``optimizer_class`` on this member's parts of the parameters, and gives every member all results.

    To be used with gradients that are equal at all members, as those of
    :class:`chaos_mpi.torch.DistributedDataParallel` and :func:`chaos_mpi.torch.elastic_hook` are, and an optimizer that
    treats each parameter by itself (SGD, AdamW; not LBFGS, nor those that look at norms over all). Then the parameters
    are, bit for bit, those that the plain optimizer gives.

    Each :meth:`step` begins with a look at who is there and what everyone keeps. Where a node lacks a part, since a
    rank has died or joined, another node hands it over; what only a rank has that leaves, it hands over before. It is
    not in a TrainingState (pass ``optimizer={}``): it differs between members, and a rank that joins gets its part at
    its first step. It is saved with ``torch.distributed.checkpoint``, to which each rank gives its :meth:`state_dict`;
    before it is loaded from there, :meth:`allocate` makes what it is loaded into. The learning-rate factor of a batch
    policy does not reach it.

    Args:
        params: parameters, or groups of them, as for any optimizer; the same at every member.
        optimizer_class: the optimizer.
        parts: into how many parts to split them; default: the number of members of the largest node.
        node_of: the node of a member id; default: its host.
        session: default: the open session.
        defaults: arguments of ``optimizer_class``.

    Raises:
        ConfigError: ``parts`` is not positive.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer_class: type[torch.optim.Optimizer],
        *,
        parts: int | None = None,
        node_of: Callable[[str], str] | None = None,
        session: Session | None = None,
        **defaults: Any,
    ) -> None:
        self._session = session if session is not None else current_session()
        self._is_chosen = parts is not None
        self._node_of = node_of if node_of is not None else host_of
        whole = optimizer_class(params, **defaults)  # knows all settings; it never gets a state
        super().__init__(whole.param_groups, whole.defaults)
        if parts is None:
            parts = max(Counter(map(self._node_of, self._session.members)).values())
        if parts < 1:
            raise ConfigError(f"parts is {parts}; it must be positive")
        self._class, self._class_defaults = optimizer_class, defaults
        self._flat = [param for group in self.param_groups for param in group["params"]]
        self._parts = self._split(parts)
        self._kept: dict[int, torch.optim.Optimizer] = {}
        self._is_shared_out = False  # at all members at once; some of them may keep nothing
        self._session.on_leave(self._keep_what_leaves)

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the parts whose state this member keeps."""
        return tuple(sorted(self._kept))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters at all members; called by all of them.

        Raises:
            RecoveryError: all members that kept a part of the state have died.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        keepers = self._redistribute()
        self._pass_settings_on()
        for part in self._kept.values():
            part.step()
        self._share(keepers)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which are split along with the others; before the first step, at all members.

        Raises:
            ConfigError: there is state already.
        """
        is_made = hasattr(self, "_kept")
        if is_made and self._is_shared_out:
            raise ConfigError(
                "the parts of the optimizer's state are kept already: add parameters before the first step"
            )
        super().add_param_group(param_group)
        if is_made:
            self._flat = [param for group in self.param_groups for param in group["params"]]
            self._parts = self._split(len(self._parts))

    def state_dict(self) -> dict[str, Any]:
        """The state of the parts that this member keeps, by ``part`` and number.

        ``torch.distributed.checkpoint`` saves those of all members only where ``torch.distributed`` is initialised
        (``init_process_group("chaos")``).
        """
        self._pass_settings_on()
        return {f"part{number}": part.state_dict() for number, part in sorted(self._kept.items())}

    def allocate(self) -> None:
        """Make the state of this member's parts, for values that are loaded into it. Called by all members.

        ``torch.distributed.checkpoint`` loads what it is given places for, and a state is there after a step only::

            optimizer.allocate()
            state = {"optimizer": optimizer.state_dict()}
            dcp.load(state, checkpoint_id=folder)
            optimizer.load_state_dict(state["optimizer"])

        The parameters stay as they are, and gradients are gone afterwards.
        """
        self._redistribute()
        for part in self._kept.values():
            before = [(param, param.detach().clone(), param.grad) for g in part.param_groups for param in g["params"]]
            for param, _, _ in before:
                param.grad = torch.zeros_like(param) if param.requires_grad else None  # a frozen one never gets a state
            part.step()
            with torch.no_grad():
                for param, value, _ in before:
                    param.copy_(value)
                    param.grad = None

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep exactly these parts of a state that was made with the same number of parts."""
        numbers = {int(name.removeprefix("part")): state for name, state in state_dict.items()}
        if not all(0 <= number < len(self._parts) for number in numbers):
            raise ConfigError(f"the state has parts {sorted(numbers)}, and the optimizer {len(self._parts)} of them")
        self._is_shared_out = True
        self._kept = {number: self._made(number) for number in numbers}
        for number, state in numbers.items():
            self._kept[number].load_state_dict(state)
            self._adopt_settings(state)

    # -- who keeps what ------------------------------------------------------------------------------

    def _redistribute(self) -> dict[int, list[str]]:
        """Have every node keep all parts; the members that keep each part, the same at every member."""
        self._is_shared_out = True
        while True:
            mine_now = [len(self._parts), int(self._is_chosen), *self._kept]
            rows, members = self._session.gather_with_contributors(mine_now)
            self._split_as_others(rows)
            kept = {member: set(row[2:]) for member, row in zip(members, rows, strict=True)}
            wanted = assigned({member: self._node_of(member) for member in members}, len(self._parts))
            if not any(kept.values()):  # before the first step
                self._kept = {number: self._made(number) for number in wanted[self._session.member]}
                return _keepers(wanted)
            keepers = _keepers(kept)
            self._refuse_lost(keepers, range(len(self._parts)))
            missing = sorted({n for member in members for n in wanted[member] if n not in kept[member]})
            if not missing:
                mine = wanted[self._session.member]
                self._kept = {number: part for number, part in self._kept.items() if number in mine}
                return _keepers(wanted)
            self._hand_over(missing, keepers, wanted[self._session.member])

    def _keep_what_leaves(self, leaving: tuple[str, ...]) -> None:
        """Have those who stay get the parts that only ``leaving`` keep. Called by all of them."""
        while True:
            rows, members = self._session.gather_with_contributors(
                [len(self._parts), int(self._is_chosen), *self._kept]
            )
            self._split_as_others(rows)
            kept = {member: row[2:] for member, row in zip(members, rows, strict=True)}
            staying = {member: self._node_of(member) for member in members if member not in leaving}
            leave = only_with(kept, leaving)
            if not leave or not staying:
                return
            wanted = assigned(staying, len(self._parts))
            self._hand_over(leave, _keepers(kept), wanted.get(self._session.member, ()))

    def _split_as_others(self, rows: Sequence[Sequence[int]]) -> None:
        """One that joined has seen other nodes than those that were there from the start."""
        number = next((row[0] for row in rows if len(row) > 2), rows[0][0])
        if any(row[0] != number and (row[1] or len(row) > 2) for row in rows):
            raise ConfigError(f"ranks split the optimizer into different numbers of parts: {[row[0] for row in rows]}")
        if number != len(self._parts):
            self._parts = self._split(number)

    def _split(self, parts: int) -> list[list[int]]:
        return split([param.nbytes for param in self._flat], parts)

    def _hand_over(self, missing: Sequence[int], keepers: Mapping[int, Sequence[str]], mine: Sequence[int]) -> None:
        self._pass_settings_on()
        is_new = not self._kept
        given = {n: self._kept[n].state_dict() for n in missing if keepers[n][0] == self._session.member}
        buffer = io.BytesIO()
        if given:
            torch.save(given, buffer)
        for data in self._gathered("optimizer state", buffer.getvalue()).values():
            if not data:
                continue
            for number, state in torch.load(io.BytesIO(data), weights_only=True).items():
                if number in mine and number not in self._kept:
                    self._kept[number] = self._made(number)
                    self._kept[number].load_state_dict(state)
                if is_new:
                    self._adopt_settings(state)

    def _share(self, keepers: Mapping[int, Sequence[str]]) -> None:
        """Give all members the updated parameters: of each part, the first member that keeps it does."""
        waiting = list(range(len(self._parts)))
        while waiting:
            here = set(self._session.members)
            self._refuse_lost({n: [m for m in keepers[n] if m in here] for n in waiting}, waiting)
            # A member may learn of a death one call later than another: then both give the same bits.
            given = [n for n in waiting if next(m for m in keepers[n] if m in here) == self._session.member]
            header = torch.tensor(given, dtype=torch.int64, device="cpu")
            tensors = [self._flat[i].detach() for n in given for i in self._parts[n]]
            data = b"".join([len(given).to_bytes(8, "little"), tensor_bytes(header), *map(tensor_bytes, tensors)])
            for source in self._gathered("updated parameters", data).values():
                self._take(source, waiting)

    def _take(self, data: bytes, waiting: list[int]) -> None:
        count = int.from_bytes(data[:8], "little")
        offset = 8 + 8 * count
        for i in range(count):
            number = int.from_bytes(data[8 + 8 * i : 16 + 8 * i], "little")
            for index in self._parts[number]:
                param = self._flat[index]
                if number in waiting and number not in self._kept and param.nbytes:
                    flat = torch.frombuffer(bytearray(data[offset : offset + param.nbytes]), dtype=param.dtype)
                    with torch.no_grad():
                        param.copy_(flat.view(param.shape))
                offset += param.nbytes
            if number in waiting:
                waiting.remove(number)

    def _gathered(self, call: str, data: bytes) -> dict[str, bytes]:
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else nothing
        operation = AllGather(call, mine)
        self._session.execute(operation)
        operation.finish()
        chunks = torch.split(operation.result, operation.lengths)
        return {m: chunk.numpy().tobytes() for m, chunk in zip(operation.contributors, chunks, strict=True)}

    def _refuse_lost(self, keepers: Mapping[int, Sequence[str]], numbers: Iterable[int]) -> None:
        lost = [number for number in numbers if not keepers.get(number)]
        if lost:
            raise RecoveryError(
                f"all ranks that kept parts {lost} of the optimizer's state have died, at step {self._session.step}: "
                "with one node, or the same rank of each node gone, there is no replica. Go on from a checkpoint"
            )

    # -- one part ------------------------------------------------------------------------------------

    def _made(self, number: int) -> torch.optim.Optimizer:
        chosen = {id(self._flat[index]) for index in self._parts[number]}
        groups = [
            {
                **{k: v for k, v in group.items() if k != "params"},
                "params": [p for p in group["params"] if id(p) in chosen],
            }
            for group in self.param_groups
        ]
        return self._class(groups, **self._class_defaults)

    def _adopt_settings(self, state: Mapping[str, Any]) -> None:
        """Take learning rate and so on from the state of a part."""
        for group, mine in zip(state["param_groups"], self.param_groups, strict=True):
            mine.update({name: value for name, value in group.items() if name != "params"})

    def _pass_settings_on(self) -> None:
        """Have the parts go by the present learning rate and so on; a scheduler may have changed them since."""
        for part in self._kept.values():
            for group, mine in zip(part.param_groups, self.param_groups, strict=True):
                group.update({name: value for name, value in mine.items() if name != "params"})


def split(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Split things of these sizes into parts that are about equally large: their indices, in order."""
    chosen: list[list[int]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        smallest = totals.index(min(totals))
        chosen[smallest].append(index)
        totals[smallest] += sizes[index]
    return [sorted(part) for part in chosen]


def assigned(node_of: Mapping[str, str], parts: int) -> dict[str, list[int]]:
    """Which parts each member is to keep: every node all of them, shared out among its members in order."""
    by_node: dict[str, list[str]] = {}
    for member, node in node_of.items():
        by_node.setdefault(node, []).append(member)
    wanted: dict[str, list[int]] = {member: [] for member in node_of}
    for members in by_node.values():
        for number in range(parts):
            wanted[members[number % len(members)]].append(number)
    return wanted


def only_with(kept: Mapping[str, Iterable[int]], leaving: Iterable[str]) -> list[int]:
    """The parts that some of ``leaving`` keep, and nobody else does."""
    leaving = set(leaving)
    return sorted(number for number, members in _keepers(kept).items() if leaving.issuperset(members))


def _keepers(kept: Mapping[str, Iterable[int]]) -> dict[int, list[str]]:
    keepers: dict[int, list[str]] = {}
    for member, numbers in kept.items():
        for number in numbers:
            keepers.setdefault(number, []).append(member)
    return keepers
