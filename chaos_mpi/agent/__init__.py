"""How the ranks of a job run on several hosts.

``mpirun`` starts each as a local *proxy*, which has the rank started where it is to run. ``proxy`` runs beside
``mpirun``; ``supervisor`` beside the rank, started by the proxy over ssh, or directly for a rank on the same host.
All that goes between the two, the rank's PMIx connection included, goes over the standard streams of the supervisor
(:mod:`chaos_mpi.agent.frames`), so no port is opened to the network for it, and anything that runs a command on
another host can take the place of ssh. Where the nodes are to watch each other, the supervisors also talk among
themselves (:mod:`chaos_mpi.agent.watch`), authenticated and encrypted, with keys that went over these streams. Without
torch and without MPI.
"""
