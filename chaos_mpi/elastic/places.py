"""Where in its loop a training script is: at which forward passes a newcomer's loop, or a resumed one, can begin."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from chaos_mpi.elastic.learning_rate import StepHooks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from chaos_mpi.elastic.attached import AttachedSamplers

#: After so many gradient steps without a place at which all gradients were applied, the script is taken for one that
#: updates its parameters in another way. Gradients of fewer passes may be accumulated.
UNAPPLIED_LIMIT = 32
#: After so many steps of one model in a row, it is taken for the only one that is trained.
ALONE_STEPS = 100


@dataclass(slots=True)
class Turns:
    """With which model a loop begins that trains several, where no sampler tells: the one that it began with.

    Attributes:
        first: its number, from 1; 0 before the first call.
        others: whether others have been trained since it was called last.
        last: the model of the last finished step.
        in_a_row: steps of that model since one of another.
    """

    first: int = 0
    others: bool = False
    last: int = 0
    in_a_row: int = 0

    def stepped(self, model: int) -> None:
        """A gradient step of this model is finished."""
        self.in_a_row = self.in_a_row + 1 if model == self.last else 1
        self.last = model
        self.others |= model != self.first

    def begin(self, model: int) -> bool:
        """This model is called; whether the loop begins anew here."""
        anew = not self.first or (model == self.first and self.others) or self.in_a_row >= ALONE_STEPS
        if anew:
            self.first = model
        if model == self.first:
            self.others = False
        return anew


class Places:
    """The places between two rounds of the training loop. All members come to the same ones.

    Args:
        samplers: those of the session.
    """

    def __init__(self, samplers: AttachedSamplers) -> None:
        self._samplers = samplers
        self._turns = Turns()
        self._hooks: list[StepHooks] = []
        self._unapplied = 0
        self._waited = 0  # gradient steps since the last place without gradients that were not applied

    def watch(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Gradients are applied by one of these; the loop is to begin."""
        self._turns = Turns()  # what was called before is no part of it
        self._hooks += [StepHooks(optimizer, lambda: None, self._applied) for optimizer in optimizers]

    def stepped(self, model: int) -> None:
        """A gradient step is finished.

        Args:
            model: number of the model, from 1; 0 if its gradients were applied before.
        """
        self._turns.stepped(model)
        if self._hooks and model:
            self._unapplied += 1
            self._waited += 1

    def begin(self, model: int, models: int) -> bool:
        """A model is called: whether a round begins here, so that a newcomer's loop would be at this place, too.

        None does between two steps on the same batch (of two models in turn, or in a closure), nor between gradients
        that are accumulated, of which a newcomer would have only the rest.

        Args:
            model: its number, from 1; 0 if it has none.
            models: how many have one.
        """
        anew = self._turns.begin(model) if model and models > 1 else True
        is_applied = not self._unapplied or self._waited >= UNAPPLIED_LIMIT
        is_place = is_applied and (self._samplers.at_round_start() if len(self._samplers) else anew)
        if is_place and not self._unapplied:
            self._waited = 0
        return is_place

    def to_json(self) -> dict[str, Any]:
        """What a newcomer needs to come to the same places from here on."""
        return {"turns": asdict(self._turns), "unapplied": self._unapplied, "waited": self._waited}

    def take_over(self, values: Mapping[str, Any]) -> None:
        """Be where the member was that gave these."""
        self._turns = Turns(**values["turns"])
        self._unapplied, self._waited = int(values["unapplied"]), int(values["waited"])

    def _applied(self) -> None:
        self._unapplied = 0
