"""What a change of the number of ranks does to the batch size and the learning rate. Pure functions.

Four rules, chosen by name:

``keep_global_batch``
    The global batch stays what it was at the start; the ranks share it anew. The learning rate is untouched,
    and a step sees as many samples as before, so the course of training is the least disturbed. The default.
``linear``
    Every rank keeps its batch size, so the global batch follows the number of ranks, and the learning rate is
    multiplied by ``n / initial``: the linear scaling rule of Goyal et al., *Accurate, Large Minibatch SGD:
    Training ImageNet in 1 Hour* (arXiv:1706.02677, 2017).
``sqrt``
    The same with ``sqrt(n / initial)``, which keeps the variance of the gradient estimate: Krizhevsky, *One
    weird trick for parallelizing convolutional neural networks* (arXiv:1404.5997, 2014).
``none``
    Every rank keeps its batch size and the learning rate is left alone.
"""

from __future__ import annotations

import math

from chaos_mpi.errors import ConfigError

POLICIES = ("keep_global_batch", "linear", "sqrt", "none")


def check_policy(policy: str) -> str:
    """Return ``policy`` if it is known; raise :class:`ConfigError` naming the choices if it is not."""
    if policy not in POLICIES:
        raise ConfigError(f"unknown batch policy {policy!r}: choose one of {', '.join(POLICIES)}")
    return policy


def member_batches(policy: str, batch_size: int, initial_size: int, n: int) -> tuple[int, ...]:
    """Samples per round for each of ``n`` ranks, in rank order, each at least 1.

    ``batch_size`` is what one rank took when there were ``initial_size`` ranks. ``keep_global_batch`` shares
    ``initial_size * batch_size`` samples as evenly as possible, the remainder going to the lower ranks; with
    more ranks than samples each gets one, so the global batch then grows. All other policies give each
    ``batch_size``. Raises :class:`ConfigError` for an unknown policy or a number below 1.
    """
    check_policy(policy)
    _check_counts(batch_size=batch_size, initial_size=initial_size, n=n)
    if policy != "keep_global_batch":
        return (batch_size,) * n
    base, extra = divmod(batch_size * initial_size, n)
    return tuple(max(1, base + (1 if rank < extra else 0)) for rank in range(n))


def lr_factor(policy: str, initial_size: int, n: int) -> float:
    """What to multiply the learning rate by, now that ``n`` ranks train where ``initial_size`` began.

    1 for ``keep_global_batch`` and ``none``; ``n / initial_size`` for ``linear`` (Goyal et al. 2017);
    ``sqrt(n / initial_size)`` for ``sqrt`` (Krizhevsky 2014). Raises :class:`ConfigError` for an unknown
    policy or a number below 1.
    """
    check_policy(policy)
    _check_counts(initial_size=initial_size, n=n)
    if policy == "linear":
        return n / initial_size
    if policy == "sqrt":
        return math.sqrt(n / initial_size)
    return 1.0


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
