"""The cluster monitor: who is alive, who is connected how well, and what follows from it. Pure: no I/O, no clock."""
