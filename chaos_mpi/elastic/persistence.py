"""Keeping the training state safe: compared at the start, resumed, written while training goes on, saved at the end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chaos_mpi.elastic import checkpoint, kept
from chaos_mpi.elastic.awaited import AwaitedState
from chaos_mpi.elastic.learning_rate import ScaledRate, unscaled
from chaos_mpi.elastic.resuming import kept_state, newest_checkpoint
from chaos_mpi.elastic.rng import capture_rng, of_rank, restore_rng
from chaos_mpi.elastic.scaling import lr_factor
from chaos_mpi.elastic.signature import with_groups_of
from chaos_mpi.elastic.state import TrainingState, first_difference
from chaos_mpi.errors import ChaosError, CheckpointError, ConfigError, MismatchError
from chaos_mpi.replication.devices import await_devices
from chaos_mpi.replication.tree import Packed, pack, unpack

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import Session

log = logging.getLogger("chaos_mpi.elastic")

#: Longest wait at the end of a job for the checkpoint that is being written.
FLUSH_LIMIT_S = 120.0
#: A checkpoint that is due waits for so many steps at most for a round of the training loop to begin.
LONGEST_WAIT_STEPS = 200


class Persistence:
    """Takes care of the training state of one session. Rank 0 writes; whoever is rank 0 at the time.

    Attributes:
        awaited: the state to go on from, where that is still to come.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._settings = session.settings
        self._state: TrainingState | None = None
        self._has_begun = False
        self._scaled: list[ScaledRate] = []
        self._writer: checkpoint.CheckpointWriter | None = None
        self._saved_step = -1
        self._due_since: int | None = None  # the step at which a checkpoint became due that is not written yet
        #: The random number generators: where they were at the last boundary, of every rank at the last checkpoint, and
        #: where they are to go on from at the next boundary.
        self._rng: dict[str, Any] | None = None
        self._rng_of_ranks: list[dict[str, Any]] | None = None
        self._rng_to_take: Mapping[str, Any] | None = None
        self._made_as: dict[str, Any] = {}
        self.awaited = AwaitedState()

    @property
    def has_state(self) -> bool:
        """Whether there is a state to take charge of."""
        return self._state is not None

    def attach(self, state: TrainingState, *, newcomer: bool) -> None:
        """Compare the state between ranks, apply the learning-rate rule, and resume if asked to.

        Args:
            state: to take charge of.
            newcomer: this rank is to get the state from members of a running job, so there is nothing to resume.

        Raises:
            ConfigError: a state is attached already, it holds what can be neither saved nor sent, or the checkpoint
                directory holds another run.
            MismatchError: the state differs between ranks; names the first difference.
            CheckpointError: the checkpoint to resume from does not fit, or rank 0 cannot write to the directory.
        """
        if self._state is not None:
            raise ConfigError("this session has a TrainingState already; name everything in one")
        try:
            pack(state.capture(), clone=False)
        except CheckpointError as error:
            raise ConfigError(f"the TrainingState cannot be kept: {error}") from error
        self._refuse_differences(state)
        for optimizer in state.optimizers():
            self._scaled.append(ScaledRate(optimizer, self._lr_factor))
        self._state = state
        self._made_as = state.signature()
        if not newcomer:
            directory = self._settings.checkpoint_dir
            if directory is not None:
                self._refuse_unwritable(directory)
            if self._settings.resume_from is not None:
                name = self._settings.resume_from
                self._restore(state, kept_state(self._session, name, self.awaited), "the memory of the hosts")
                if self._settings.event_log is not None:
                    self._session.emit("resumed", params_digest=self.digest())
                kept.remove(name)
            elif directory is not None and (found := newest_checkpoint(self._session, directory)) is not None:
                self._restore(state, found, str(directory))
        self._has_begun = True

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of the training state; none without one."""
        return self._state.optimizers() if self._state is not None else []

    def signature(self) -> dict[str, Any]:
        """What a newcomer has to be made of that is to get this state now."""
        assert self._state is not None
        return with_groups_of(self._state.signature(), self._made_as)

    def digest(self) -> str:
        """Digest over models and optimizers of this member, as far as members are alike; empty without a state."""
        if self._state is None:
            return ""
        return self._state.digest(optimizers=not self._session.optimizers_differ)

    def at_boundary(self, before: int) -> None:
        """Steps were finished: note whether a checkpoint has become due.

        Args:
            before: the number of steps that were finished at the boundary before this one.
        """
        every = self._settings.checkpoint_every
        if self._due_since is None and self._session.step // every > before // every:
            self._due_since = self._session.step
        self._note_rng()

    def write(self, *, final: bool, at_place: bool) -> None:
        """Hand a copy of the state to the writer if a checkpoint is due, or this is the end; called by all members.

        Args:
            final: training is over.
            at_place: a loop that is resumed begins at such a place as this. Elsewhere in it, as between the steps of
                two models, the rest of the round would be missing; so what is due waits, though not for ever.
        """
        directory, step, due_since = self._settings.checkpoint_dir, self._session.step, self._due_since
        is_due = due_since is not None and (at_place or step - due_since >= LONGEST_WAIT_STEPS)
        if at_place or final or is_due:
            self._note_rng()  # a newcomer, or who resumes, goes on from here
        if not (final or is_due):
            return
        self._due_since = None
        if self._state is None or directory is None:
            return
        if self._state.keeps_rng:
            self._rng_of_ranks = self._session.gather(self._rng)
        if self._session.rank != 0 or step == self._saved_step:
            return
        try:
            if self._writer is None:
                self._writer = checkpoint.CheckpointWriter(directory)
            self._writer.submit(step, self._packed(clone=not final))
            self._saved_step = step
        except CheckpointError as error:  # training is worth more than this checkpoint
            log.error("there is no checkpoint of step %d: %s (host %s)", step, error, self._session.host)

    def _note_rng(self) -> None:
        if self._state is not None and self._state.keeps_rng:
            self._rng = capture_rng()

    def take_rng(self, state: Mapping[str, Any] | None) -> None:
        """Go on from these states of the random number generators at the next boundary.

        Not before: members were there when the states were captured, and what is drawn on the way there is drawn once
        more by a rank that was started since, to load its first batch.
        """
        self._rng_to_take = state

    def at_forward(self) -> None:
        """Before the model is called, and before anything that :meth:`at_boundary` does."""
        if self._rng_to_take is not None:
            restore_rng(self._rng_to_take)
            self._rng_to_take = None

    def close(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self._writer is not None:
            if not self._writer.close(FLUSH_LIMIT_S):
                log.error("the last checkpoint took over %.0f s to write, and is not waited for", FLUSH_LIMIT_S)
            elif self._writer.last_error is not None:
                log.error("the last checkpoint was not written: %s", self._writer.last_error)

    def save_emergency(self, rng_of_ranks: list[dict[str, Any]] | None = None) -> str:
        """Write the state at once, and say where, or why not.

        Args:
            rng_of_ranks: states of the random number generators, where the other ranks could still be asked.
        """
        if self._state is None:
            return "No state was saved, because the script names none (chaos_mpi.TrainingState)."
        if not self._has_begun:
            return "No state was saved: there is none yet that is not where it was to be taken from."
        directory = self._settings.checkpoint_dir or Path.cwd() / "chaos-state"
        step = self._session.step
        path = checkpoint.checkpoint_path(directory, step)
        agent = self._session.agent
        if agent is not None:  # it may have told this rank to stop, and kills those that do not
            agent.saving(self._settings.timeout_s)
        try:
            if self._settings.checkpoint_dir is None:
                directory = checkpoint.unused_directory(directory)
                path = checkpoint.checkpoint_path(directory, step)
            if self._writer is not None:
                self._writer.flush(FLUSH_LIMIT_S)
            self._rng_of_ranks = rng_of_ranks or ([self._rng] if self._rng is not None else None)
            checkpoint.save_now(path, step, self._packed(clone=False))
        except (ChaosError, OSError) as error:
            return f"The state could NOT be saved to {path}: {error}."
        finally:
            if agent is not None:
                agent.saving(0.0)
        return f"The state is saved in {path}; go on with --checkpoint-dir {directory} --resume."

    def save_on_request(self, rng_of_ranks: list[dict[str, Any]] | None = None) -> str:
        """The same, if a checkpoint directory was chosen: nobody expects files anywhere after a plain stop."""
        if self._settings.checkpoint_dir is None:
            return "No state was saved, because there is no checkpoint directory (--checkpoint-dir)."
        return self.save_emergency(rng_of_ranks)

    def save_together(self) -> str:
        """The same, called by all members, at a boundary: rank 0 writes, and an empty text is returned at others."""
        told = self._settings.checkpoint_dir is not None and self._state is not None and self._state.keeps_rng
        rng_of_ranks = self._session.gather(self._rng, "stop: random numbers") if told else None
        return self.save_on_request(rng_of_ranks) if self._session.rank == 0 else ""

    def keep(self, name: str) -> str:
        """Have each host keep the state in its memory; called by all members, at a boundary.

        Returns:
            Why no host could; empty if any has it.
        """
        session = self._session
        if self._state is None:
            return "the script names no training state (chaos_mpi.TrainingState)"
        if self._state.keeps_rng:
            self._rng_of_ranks = session.gather(self._rng)
        place, problem = "", ""
        if session.member in kept.keepers(session.members):
            step = session.step
            try:
                packed = self._packed(clone=False)
                path = kept.keep(
                    name,
                    packed.nbytes,
                    lambda here: checkpoint.save_now(checkpoint.checkpoint_path(here, step), step, packed),
                )
                place = str(path)
            except CheckpointError as error:
                problem = f"{session.host}: {error}"
        words = session.gather([place, problem])
        problems = "; ".join(problem for _, problem in words if problem)
        if any(place for place, _ in words):
            if problems and session.rank == 0:
                log.warning("other hosts will send the state to where it is not kept: %s", problems)
            return ""
        kept.remove(name)
        return problems or "the members that were to keep the state have died"

    def pack_with(self, samplers: list[dict[str, Any]]) -> Packed:
        """The state, with live tensors, and what the samplers hand over."""
        assert self._state is not None
        with unscaled(self._scaled):
            return pack({"state": self._state.capture(), "samplers": samplers, "rng": self._rng}, clone=False)

    def loose_tensors(self) -> dict[str, torch.Tensor]:
        """The live tensors that may differ between members, by name; none if they cannot be sent.

        They are those of models and extras that are no parameters. What optimizers keep is the same everywhere, but
        for :attr:`~chaos_mpi.elastic.changes.ChangingSession.optimizers_differ`; a digest of it takes its time.
        """
        assert self._state is not None
        parameters = {parameter.data_ptr() for parameter in self._state.parameters()}
        try:
            tensors = self.pack_with([]).tensors
        except CheckpointError:
            return {}
        parts: tuple[str, ...] = ("state.model.", "state.extras.")
        if self._session.optimizers_differ:
            parts += ("state.optimizer.",)
        return {n: t for n, t in tensors.items() if n.startswith(parts) and t.data_ptr() not in parameters}

    def _packed(self, *, clone: bool) -> Packed:
        assert self._state is not None
        await_devices(tensor for _, tensor in self._state.named_tensors())  # others may read them
        with unscaled(self._scaled):
            tree = {"state": self._state.capture(), "session": self._progress(), "rng": self._rng_of_ranks}
            return pack(tree, clone=clone)

    def _progress(self) -> dict[str, int]:
        # The first size goes along: batch size and learning rate are relative to it, also after a resume.
        return {"step": self._session.step, "initial_size": self._session.initial_size}

    def _lr_factor(self) -> float:
        # The contributors of the finished step, not the view: they are the same everywhere, while a member
        # may learn of a death one step later than another.
        session = self._session
        if session.awaits_entry:  # it repeats the members' steps, with the rates that they had
            return 1.0
        return lr_factor(session.batch_policy, session.initial_size, session.gradient_contributors)

    def _refuse_differences(self, state: TrainingState) -> None:
        signatures = self._session.gather(state.signature())
        for rank, signature in enumerate(signatures[1:], start=1):
            difference = first_difference(signatures[0], signature)
            if difference is not None:
                # Not before all have the same signatures: the others would take this rank for dead, and go on.
                self._session.barrier()
                raise MismatchError(
                    f"the training state differs between rank 0 (here) and rank {rank} (there): {difference}"
                )

    def _refuse_unwritable(self, directory: Path) -> None:
        """Refuse a directory that rank 0 cannot write to; say where those could not that may take its place."""
        session, problem = self._session, ""
        try:
            checkpoint.make_writable(directory)
        except CheckpointError as error:
            problem = f"{error} (host {session.host})"
        problems = session.gather(problem)
        if problems[0]:
            session.barrier()  # see _refuse_differences
            raise CheckpointError(problems[0])
        if session.rank == 0 and (others := sorted(set(filter(None, problems)))):
            log.warning("no checkpoints will be written if these take the place of rank 0: %s", "; ".join(others))

    def _restore(self, state: TrainingState, packed: Packed, source: str) -> None:
        session = self._session
        tree = unpack(packed)
        before, session.initial_size = session.initial_size, int(tree["session"]["initial_size"])  # samplers go by it
        try:
            state.restore(tree["state"])
        except BaseException:
            session.initial_size = before
            raise
        session.resumed(tree["session"]["step"], tree["session"]["initial_size"])
        self._saved_step = session.step
        if state.keeps_rng and tree.get("rng"):
            self.take_rng(of_rank(tree["rng"], session.rank))
        elif state.keeps_rng and session.rank == 0:
            log.warning("the checkpoint holds no random number generators; they start anew")
        if session.rank == 0:
            log.warning("resumed from step %d in %s", session.step, source)
