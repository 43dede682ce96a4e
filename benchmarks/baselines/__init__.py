"""How other systems add a worker, on the engine of chaos_mpi: what differs is the strategy and nothing else.

:mod:`.loop` is the training loop that all of them share, :mod:`.strategies` how each moves the state,
:mod:`.storage` the shared storage of the one that goes through a checkpoint.
"""
