"""How a newcomer gets the training state: it pulls byte ranges from several members in parallel.

:mod:`.layout` numbers the bytes of a state, :mod:`.source` is a member that serves them, :mod:`.puller` the newcomer
that fetches and checks them. None of them knows MPI: they move pieces of memory over a :class:`~.layout.Transport`.
"""
