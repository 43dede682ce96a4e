"""A batch sampler that follows the membership: no sample of an epoch is skipped or trained on twice.

Three counters per rank say where it is. Rounds before ``done`` went into finished gradient steps; rounds
before ``taken`` were handed to the training loop; rounds before ``issued`` were handed to the data loader,
whose workers may be ahead of the loop. What a dead rank had beyond ``done`` is shared out anew, and nobody's
issued rounds change. Which samples a round holds is decided in :mod:`chaos_mpi.elastic.partition`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import Sampler

from chaos_mpi.elastic.current import current_session
from chaos_mpi.elastic.handover import change_from_tree, change_to_tree, plan_from_tree, plan_to_tree
from chaos_mpi.elastic.partition import Change, EpochPlan
from chaos_mpi.elastic.rounds import ReadingAhead, Rounds, SamplerSession, Taken, moves, warn
from chaos_mpi.elastic.scaling import member_batches
from chaos_mpi.errors import ConfigError


class ElasticSampler(Sampler[list[int]]):
    """Batches of sample indices for this rank, over an epoch that all members share.

    Use it as ``batch_sampler`` of :class:`chaos_mpi.DataLoader`, which is exact for any ``num_workers``;
    torch's own is exact with ``num_workers=0`` only. A round with fewer samples than members repeats some
    index on the others to keep the ranks in step; the gradient of such a *ghost* round counts nothing.

    Iterating again after a whole epoch begins the next one, with or without :meth:`set_epoch`. After breaking
    out of the loop, iterating again goes on after the last batch that was trained on; ``set_epoch`` with another
    number leaves the rest.

    Args:
        data_source: the dataset, or the number of its samples.
        batch_size: samples per rank and round with the ranks the job started with; see
            :mod:`chaos_mpi.elastic.scaling` for other numbers of ranks.
        shuffle: a new order in each epoch, from ``seed`` and the epoch's number.
        seed: not negative, the same on all ranks.
        drop_last: leave out a last round that would be smaller than the global batch.
        session: the elastic session; the current one if None.

    Raises:
        ConfigError: an argument cannot be used.
        NoSessionError: no session was given, and there is none.
    """

    def __init__(
        self,
        data_source: Sized | int,
        batch_size: int = 1,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        session: SamplerSession | None = None,
    ) -> None:
        length = data_source if isinstance(data_source, int) else len(data_source)
        if length < 0 or batch_size < 1 or seed < 0:
            raise ConfigError(
                "ElasticSampler needs a length and a seed of at least 0 and a batch_size of at least 1, got "
                f"length {length}, seed {seed}, batch_size {batch_size}"
            )
        if session is None:
            session = current_session()
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self._length = length
        self._session = session
        # A lap is one pass over the data. Unlike the epoch's number it only grows, so it tells which rank is
        # ahead even if the user repeats an epoch or goes back to one.
        self._lap = 0
        self._epoch = 0
        self._plan: EpochPlan | None = None  # made when needed: members may still change before the first batch
        self._base = self._done = self._taken = self._issued = 0
        self.loop_start = 0  # the first round of the present loop
        self._ended = False
        self._generation = 0
        self._explicit = False
        self._ever_issued = False
        self._known_index = 0
        self._in_flight: list[Taken] = []
        self._last_is_ghost = False
        self._is_fresh, self._is_present = False, True
        self._backwards = 0
        #: Whether the next iteration belongs to the loop that there is, for :class:`chaos_mpi.DataLoader`.
        self.loop_goes_on = False
        self._warned = False
        self._ahead = ReadingAhead()
        # Per lap, from the present one on: another rank may be a lap ahead when a member dies.
        self._changes: dict[int, list[Change]] = {}
        self._joined_in: int | None = None  # the epoch in which this rank joined, until its loop begins
        self._lengths: list[tuple[int, int]] = []  # of each change in this lap: seen, and the rounds before it
        session.attach_sampler(self)

    # -- for the training script ---------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The number of the present epoch."""
        return self._epoch

    @moves
    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch. Does nothing in the middle of that epoch; once it is complete, repeats it.

        Raises:
            ConfigError: ``epoch`` is negative, or this rank joined in a later one.
        """
        if epoch < 0:
            raise ConfigError(f"an epoch's number is at least 0, got {epoch}")
        if self._joined_in is not None:
            joined_in, self._joined_in = self._joined_in, None
            if epoch < joined_in:
                raise ConfigError(
                    f"this rank joined in epoch {joined_in}, but its loop begins with epoch {epoch}: let the training "
                    "state carry the counter, TrainingState(..., epoch=0), and loop with "
                    "'for state.epoch in range(state.epoch, N)'"
                )
        if epoch != self._epoch or self._is_complete():
            self._next_lap(epoch)

    @moves
    def __iter__(self) -> Iterator[list[int]]:
        if self._is_complete():
            self._next_lap(self._epoch + 1)
        if not (self.loop_goes_on or self._backwards) and self._taken > self._done:
            self._taken = self._done  # what was seen since (next(iter(loader))) was never trained on
            self._in_flight.clear()
        # What a loop that was left had fetched but not seen is handed out again.
        self._issued = self.loop_start = self._taken
        self._generation += 1
        return Rounds(self, self._generation)

    def __len__(self) -> int:
        """The number of batches of the present loop over this epoch, else of the next loop.

        It may change when members die. Asked within one and the same round, all ranks get the same answer,
        even if some ask before and some after a death: a script may decide by it where a step ends.
        """
        if (size := self._session.expected_size) != len(self._session.members):  # this process is not in the job yet
            return self._fresh_plan(self._epoch, list(map(str, range(size))), shuffle=False).rounds
        if self._ended:
            return self._fresh_plan(self._epoch + 1, self._session.members, shuffle=False).rounds
        rounds = self._current_plan().rounds
        for seen, rounds_before in reversed(self._lengths):
            if self._taken > seen:
                break
            rounds = rounds_before
        return rounds - self.loop_start

    def state_dict(self) -> dict[str, Any]:
        """The position after the last finished step: numbers, and an int64 tensor if the order changed."""
        if self._plan is None:
            plan = self._fresh_plan(self._epoch, (self._session.member,), shuffle=False)
            values, remaining = plan.to_state(0)
            values["shuffle"] = int(self.shuffle)
        else:
            values, remaining = self._plan.to_state(self._done)
        state = {name: value for name, value in values.items() if value is not None}
        state["lap"] = self._lap
        if remaining is not None:
            state["remaining"] = torch.tensor(remaining, dtype=torch.int64, device="cpu")
        return state

    @moves
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, possibly of a job with another number of ranks. All ranks must do it.

        The order of the samples is that of the state, so its ``seed`` and ``shuffle`` replace this sampler's.

        Raises:
            ConfigError: the state is of a dataset of another length, or incomplete.
        """
        try:
            if int(state["length"]) != self._length:
                raise ConfigError(
                    f"the sampler's state is of {state['length']} samples, this dataset has {self._length}"
                )
            lap, remaining = int(state["lap"]), state.get("remaining")
            values = {"offset": None, **state}
            # A rank that loads late missed what happened to the others, and makes up for it here.
            missed = [] if self._ever_issued else self._changes.get(lap, [])
            members = missed[0].old if missed else self._session.members
            array = None if remaining is None else torch.as_tensor(remaining, dtype=torch.int64, device="cpu").numpy()
            plan = EpochPlan.from_state(values, array, members, self._sizes(members))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"this is not the state of an ElasticSampler: {error!r}") from error
        self.seed, self.shuffle = plan.seed, plan.shuffle
        self._next_lap(plan.epoch, lap=lap)
        self._base = self._done = self._taken = self._issued = self.loop_start = plan.first_round
        self._in_flight.clear()
        self._backwards = 0
        for change in missed:
            plan = self._changed(plan, change)
        self._plan = plan
        self._changes = {lap: missed} if missed else {}

    # -- for the session and DDP ---------------------------------------------------------------------

    @moves
    def commit(self) -> None:
        """The gradient step that used all rounds taken so far has finished."""
        ahead = len(self._in_flight) - self._backwards
        if not self._explicit and self._backwards and ahead > 1 and not self._warned:
            self._warned = True
            warn(self._session,
                "%d batches were fetched but only %d used: with loader workers, exact accounting of samples through "
                "failures needs chaos_mpi.DataLoader in place of torch.utils.data.DataLoader.",
                len(self._in_flight), self._backwards,
            )  # fmt: skip
        if self._explicit:
            self._ahead.note_step(self._session, self._generation, ahead, self.at_end)
        self._done = self._taken
        self._in_flight.clear()
        self._backwards = 0

    def note_backward(self) -> None:
        """A backward pass was made, whether or not it ends a step."""
        self._backwards += 1

    def report(self) -> dict[str, Any]:
        """Where this rank is, in JSON values, for :meth:`apply_change` on all survivors."""
        return {
            "lap": self._lap,
            "epoch": self._epoch,
            "done": self._done,
            "taken": self._taken,
            "issued": self._issued,
            "ended": self._ended,
        }

    def apply_change(
        self, reports: Sequence[Mapping[str, Any]], old_members: Sequence[str], new_members: Sequence[str]
    ) -> None:
        """The members are now ``new_members``; ``reports`` are those of all survivors of ``old_members``.

        To be called after survivors that were behind have adopted the last finished step and committed it,
        and before the step in flight is repeated. Survivors may be in neighbouring epochs, if some already
        drew the first batches of the next one: the plan of the newest epoch is changed on all of them,
        including those that get there later. Older epochs are past changing: everyone has had all of their
        rounds.
        """
        change = Change.from_reports(reports, old_members, new_members)
        if change.lap < self._lap:
            raise ValueError(f"the reports lack this rank's own: lap {self._lap}, reported {change.lap}")
        if len({r["done"] for r in reports if r["lap"] == change.lap}) > 1:
            warn(
                self._session, "ranks disagree on which samples are trained; some may be lost or repeated: %s", reports
            )
        self._changes.setdefault(change.lap, []).append(change)
        if change.lap == self._lap and self._plan is not None:
            self._plan = self._changed(self._plan, change)
        if change.departed and any(taken.lap < change.lap for taken in self._in_flight):
            warn(
                self._session,
                "samples of an earlier epoch that %s had accumulated and not applied are dropped",
                change.departed,
            )

    def hand_over(self) -> dict[str, Any]:
        """All that a newcomer needs to take part: a tree for :meth:`take_over`."""
        changes = {str(lap): [change_to_tree(c) for c in changes] for lap, changes in self._changes.items()}
        lengths, plan = [list(pair) for pair in self._lengths], plan_to_tree(self._current_plan())
        place = {"lap": self._lap, "done": self._done, "ended": self._ended}
        return {**place, "plan": plan, "changes": changes, "lengths": lengths}

    def take_over(self, tree: Mapping[str, Any]) -> None:
        """Be where the member was that made the tree, with nothing of the epoch taken yet by this one.

        Raises:
            ConfigError: the tree is of a dataset of another length.
        """
        plan = plan_from_tree(tree["plan"])
        if plan.length != self._length:
            raise ConfigError(f"the others train on {plan.length} samples, this dataset has {self._length}")
        self.seed, self.shuffle = plan.seed, plan.shuffle
        self._next_lap(plan.epoch, lap=int(tree["lap"]))
        self._plan = plan
        self._lengths = [(int(seen), int(rounds)) for seen, rounds in tree["lengths"]]
        start = plan.rounds if tree["ended"] else int(tree["done"])  # those that left the loop leave nothing in it
        self._base = self._done = self._taken = self._issued = self.loop_start = start
        self._in_flight.clear()
        self._backwards = 0
        self._joined_in = plan.epoch
        self._changes = {int(lap): [change_from_tree(c) for c in cs] for lap, cs in tree["changes"].items()}

    @property
    def is_fresh(self) -> bool:
        """Whether a batch was taken since :meth:`enter_round`."""
        return self._is_fresh

    def enter_round(self, present: bool) -> None:
        """A forward pass begins, with a batch of this sampler's, or with others'.

        What a loop had last that was left, and another one entered, says nothing of the other one's batches.
        """
        self._is_fresh, self._is_present = False, present

    def ghost_round(self) -> bool:
        """Whether the batch the loop has now is a stand-in whose gradient must count nothing."""
        return self._last_is_ghost and self._is_present

    def step_is_ghost(self) -> bool:
        """Whether there are batches since the last finished step, and all of them are stand-ins."""
        if not self._is_present:
            return False
        if not self._in_flight:
            return self._last_is_ghost  # a second step over the same batch
        return not any(taken.indices for taken in self._in_flight)

    def has_untrained(self) -> bool:
        """Whether the loop has got a round since the last finished step."""
        return self._taken > self._done

    def in_flight(self) -> list[int]:
        """The samples taken since the last finished step."""
        return [index for taken in self._in_flight for index in taken.indices]

    # -- for the loader ------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """A number that changes whenever a new iteration begins or the epoch is left."""
        return self._generation

    @property
    def has_more(self) -> bool:
        """Whether this rank has rounds in this epoch which were not issued yet."""
        return self._issued < self._current_plan().rounds

    @property
    def at_end(self) -> bool:
        """Whether the training loop has got all rounds of this epoch; :meth:`finish` is to follow before any talk."""
        return self._taken >= self._current_plan().rounds

    def take_explicitly(self) -> None:
        """From now on an issued round counts as taken only when :meth:`take` is called for it."""
        self._explicit = True

    @moves
    def take(self) -> None:
        """The training loop gets the batch of the next issued round.

        Raises:
            RuntimeError: no round is issued that was not taken.
        """
        if self._taken >= self._issued:
            raise RuntimeError("take() without an issued batch: the sampler is not iterated by chaos_mpi.DataLoader")
        indices = self._current_plan().assignment(self._taken, self._session.member).tolist()
        self._taken += 1
        self._in_flight.append(Taken(self._lap, indices))
        self._last_is_ghost = not indices
        self._is_fresh = self._is_present = True

    @moves
    def finish(self) -> None:
        """The training loop was told that the epoch is over: what returns to the pool now comes too late."""
        self._ended = True
        self._last_is_ghost = False

    @moves
    def issue(self) -> list[int] | None:
        """The indices of the next round; None when there is none left, or not yet any that returned."""
        plan = self._current_plan()
        if self._issued >= plan.rounds:
            if not self._explicit:
                self.finish()
            return None
        indices: list[int] = plan.assignment(self._issued, self._session.member).tolist()
        self._issued += 1
        self._ever_issued = True
        if indices:
            self._known_index = indices[-1]
        if not self._explicit:
            self.take()
        # A stand-in is as large as BatchNorm needs it to be.
        return indices or [self._known_index] * min(2, self.batch_size)

    # -- plans ---------------------------------------------------------------------------------------

    def _is_complete(self) -> bool:
        """Whether the loop has had the whole epoch here; not so for one that was restored complete."""
        return self._ended or (self._taken > self._base and not self._current_plan().rounds > self._taken)

    def _next_lap(self, epoch: int, lap: int | None = None) -> None:
        self._lap = self._lap + 1 if lap is None else lap
        self._epoch = epoch
        self._plan = None
        self._lengths = []
        self._base = self._done = self._taken = self._issued = self.loop_start = 0
        self._ended = self._last_is_ghost = False
        self._generation += 1
        self._changes = {at: changes for at, changes in self._changes.items() if at >= self._lap}

    def _current_plan(self) -> EpochPlan:
        if self._plan is None:
            changes = self._changes.get(self._lap, [])
            if any(change.epoch != self._epoch for change in changes):
                warn(self._session, "ranks went from one epoch to different ones: %d here, %s", self._epoch, changes)
                changes = []
            members = changes[0].old if changes else self._session.members
            self._plan = self._fresh_plan(self._epoch, members, shuffle=self.shuffle)
            for change in changes:
                self._plan = self._changed(self._plan, change)
        return self._plan

    def _changed(self, plan: EpochPlan, change: Change) -> EpochPlan:
        if change.over:
            if lost := plan.unfinished(change.done, change.departed):
                warn(self._session,
                    "%d samples of epoch %d are dropped: %s had not applied them, and others have left the loop",
                    lost, plan.epoch, change.departed,
                )  # fmt: skip
            return plan
        self._lengths.append((change.seen, plan.rounds))
        return plan.after_change(change.done, change.horizon, change.new, self._sizes(change.new))

    def _fresh_plan(self, epoch: int, members: Sequence[str], *, shuffle: bool) -> EpochPlan:
        return EpochPlan.fresh(
            epoch=epoch,
            seed=self.seed,
            length=self._length,
            members=members,
            sizes=self._sizes(members),
            shuffle=shuffle,
            drop_last=self.drop_last,
        )

    def _sizes(self, members: Sequence[str]) -> tuple[int, ...]:
        session = self._session
        return member_batches(session.batch_policy, self.batch_size, session.initial_size, len(members))
