"""Shares the samples of a dataset out to the ranks, and anew when ranks have come or gone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch.utils.data

from chaos_mpi.horovod.torch.job import job


class ElasticSampler(torch.utils.data.Sampler[int]):
    """Gives each rank its part of the samples that are left in the epoch.

    It is to be part of the :class:`TorchState`; ``record_batch`` is to be called after each step, and ``set_epoch`` at
    the end of each epoch. Then every sample of an epoch is trained on once, whoever joins, leaves or dies, but for two
    cases: to make the ranks' parts equal, the last batches may repeat a few samples; and what a rank that died still
    had to do is shared out at the next ``commit`` or ``check_host_updates``, so not if the epoch ends before that.

    Args:
        dataset: of constant length.
        shuffle: whether each epoch has another order.
        seed: of the order; the same at every rank.

    Attributes:
        epoch: the present one.
        processed_indices: samples that are done in this epoch, by all ranks, as far as this rank knows.
    """

    def __init__(self, dataset: Any, shuffle: bool = True, seed: int = 0) -> None:
        self.dataset, self.shuffle, self.seed = dataset, shuffle, seed
        self.epoch = 0
        self._begin_with(())
        self._step = self._recorded = 0
        self.reset()

    @property
    def processed_num(self) -> int:
        """The number of samples that are done in this epoch."""
        return len(self.processed_indices)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; to be called at the end of the one before it, so that an unfinished one can go on."""
        self.epoch = epoch
        self._begin_with(())
        self.reset()

    def record_batch(self, batch_idx: int, batch_size: int) -> None:
        """The step on the next batch is finished, at all ranks.

        Args:
            batch_idx: not needed, as with Horovod: scripts count from where they went on, or from 1. Calls are counted.
            batch_size: samples in the batch of one rank.
        """
        here = job()
        session = here.session
        stepped, self._step = session.step != self._step, session.step
        # Whose gradients are in the step: the others' samples are still to be trained on.
        done = session.last_contributors if stepped else here.members
        begin, self._recorded = self._recorded, self._recorded + batch_size
        for place, member in enumerate(self._members):
            if member in done:
                first, stop = (place + count * self.num_replicas for count in (begin, self._recorded))
                batch = self._dealt[first : stop : self.num_replicas]
                self._in_order += [index for index in batch if index not in self.processed_indices]
                self.processed_indices.update(batch)

    def reset(self) -> None:
        """Share the samples that are left out to the ranks that are there now."""
        here = job()
        self._members = here.members
        self._step, self._recorded = here.session.step, 0
        self.num_replicas, self.rank = len(here.members), here.rank
        self.remaining_indices = [index for index in self._order() if index not in self.processed_indices]
        self.num_samples = -(-len(self.remaining_indices) // self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas
        self._dealt = list(self.remaining_indices)
        while len(self._dealt) < self.total_size:
            self._dealt += self.remaining_indices[: self.total_size - len(self._dealt)]

    def state_dict(self) -> dict[str, Any]:
        """Where in the epoch the job is."""
        return {
            "epoch": self.epoch,
            "processed_indices": sorted(self.processed_indices),
            "processed_num": self.processed_num,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, with the ranks that are there now. A state of Horovod's own says how many are done."""
        self.epoch = state_dict["epoch"]
        done = state_dict.get("processed_indices")
        self._begin_with(done if done is not None else self._order()[: state_dict["processed_num"]])
        self.reset()

    def mark(self) -> tuple[int, list[int], int]:
        """Where in the epoch the job is, for :meth:`go_back`; whatever the dataset's length, it takes no time."""
        return self.epoch, self._in_order, len(self._in_order)

    def go_back(self, mark: tuple[int, list[int], int]) -> None:
        """Go on from there, with the ranks that are there now."""
        self.epoch, in_order, count = mark
        self._begin_with(in_order[:count])
        self.reset()

    def _begin_with(self, done: Iterable[int]) -> None:
        self._in_order = list(done)  # marks hold it: it only grows, and is replaced
        self.processed_indices = set(self._in_order)

    def _order(self) -> list[int]:
        """All samples, in the order of the epoch."""
        order = list(range(len(self.dataset)))
        if self.shuffle:
            random.Random(self.seed + self.epoch).shuffle(order)  # noqa: S311
        return order

    def __iter__(self) -> Iterator[int]:
        self._recorded = 0  # the same samples again, if nothing was shared out anew
        return iter(self._part_of(self.rank))

    def __len__(self) -> int:
        return self.num_samples

    def _part_of(self, place: int) -> list[int]:
        return self._dealt[place :: self.num_replicas]


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the states of all ranks say together: of the latest epoch, all samples that any knows to be done."""
    epoch = max(state["epoch"] for state in states)
    done = {index for state in states if state["epoch"] == epoch for index in state["processed_indices"]}
    return {"epoch": epoch, "processed_indices": sorted(done), "processed_num": len(done)}
