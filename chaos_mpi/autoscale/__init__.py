"""Autoscaling: which machines there are, and how large the job is to be."""

from chaos_mpi.autoscale.policy import POLICIES, Available, Decision, Manual, ScaleInputs, ScalePolicy, make_policy

__all__ = ["POLICIES", "Available", "Decision", "Manual", "ScaleInputs", "ScalePolicy", "make_policy"]
