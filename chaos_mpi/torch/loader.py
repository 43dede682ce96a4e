"""A data loader whose workers may fetch ahead without losing count of what the training loop has seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self, TypeVar

import torch.multiprocessing
import torch.utils.data

from chaos_mpi.elastic.sampler import ElasticSampler
from chaos_mpi.errors import ConfigError
from chaos_mpi.torch.workers import SurvivingInit, sigterm_held_off

T_co = TypeVar("T_co", covariant=True)


class DataLoader(torch.utils.data.DataLoader[T_co]):
    """torch's ``DataLoader``, exact with a :class:`chaos_mpi.ElasticSampler` for any number of workers.

    With ``batch_sampler=ElasticSampler(...)`` a batch counts as taken when the training loop gets it, not
    when a worker is told to fetch it, and batches made of samples that a dead rank gave back at the end of an
    epoch come within the same ``for`` loop. With any other sampler it is torch's loader. Takes the same
    arguments. Its workers outlive a SIGTERM that is sent to all processes, so that the rank can end in good order.

    Raises:
        ConfigError: ``in_order=False`` with an ElasticSampler: batches out of order cannot be counted.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.num_workers > 0:
            self.worker_init_fn = SurvivingInit(self.worker_init_fn)
        self._elastic: ElasticSampler | None = None
        if isinstance(self.batch_sampler, ElasticSampler):
            if not getattr(self, "in_order", True):
                raise ConfigError("a DataLoader over an ElasticSampler must keep its batches in order: in_order=True")
            self._elastic = self.batch_sampler
            self._elastic.take_explicitly()

    def __iter__(self) -> Any:  # torch promises one of its private iterators
        if self._elastic is None:
            return self.fetch()
        return _CountedBatches(self, self._elastic)

    def fetch(self) -> Iterator[Any]:
        """torch's own iterator over what the sampler issues from now on."""
        if self.num_workers == 0:
            return super().__iter__()
        processes: Any = self.multiprocessing_context or torch.multiprocessing
        with sigterm_held_off(processes.get_start_method()):
            return super().__iter__()


class _CountedBatches(Iterator[Any]):
    """One pass of the training loop: tells the sampler of every batch that the loop gets."""

    def __init__(self, loader: DataLoader[Any], sampler: ElasticSampler) -> None:
        self._loader = loader
        self._sampler = sampler
        self._batches: Iterator[Any] | None = loader.fetch()
        self._generation = sampler.generation

    def __iter__(self) -> Self:
        return self

    def __len__(self) -> int:
        return len(self._sampler)

    def __next__(self) -> Any:
        while self._batches is not None:
            if self._sampler.generation != self._generation:
                raise RuntimeError(
                    "this iteration over the DataLoader is over: another was begun, or the epoch changed"
                )
            try:
                batch = next(self._batches)
            except StopIteration:
                # Samples that came back after the workers had run dry are still this epoch's.
                self._batches = None
                if self._sampler.has_more:
                    start = self._sampler.loop_start
                    self._sampler.loop_goes_on = True
                    try:
                        self._batches = self._loader.fetch()
                    finally:
                        self._sampler.loop_goes_on = False
                    self._sampler.loop_start = start  # it is still the same loop to the user
                    self._generation = self._sampler.generation
                continue
            self._sampler.take()
            return batch
        if self._sampler.generation == self._generation:
            self._sampler.finish()
        raise StopIteration
