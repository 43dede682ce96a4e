"""The training state that a job goes on from: found in a checkpoint, or in the memory of a host, and given to all."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chaos_mpi.elastic import checkpoint, kept
from chaos_mpi.elastic.awaited import AwaitedState
from chaos_mpi.elastic.lifecycle import write_record
from chaos_mpi.errors import ChaosError, CheckpointError, ConfigError
from chaos_mpi.replication.tree import Packed

if TYPE_CHECKING:
    from chaos_mpi.elastic.session import Session

log = logging.getLogger("chaos_mpi.elastic")

#: The launcher waits for a job that is to be handed over as long as ranks do; to tell of it may take so much longer.
TELLING_LIMIT_S = 30.0
#: So often, and so long one after the other, ranks look for the state of a job that has ended without a word.
_LOOKS, _LOOK_PERIOD_S = 20, 0.5


def newest_checkpoint(session: Session, directory: Path) -> Packed | None:
    """The newest checkpoint that any rank can see, at all of them: the directory need not be shared.

    Called by all members, where the training state is made.

    Returns:
        None if there is no checkpoint.

    Raises:
        ConfigError: there is one, and the job is not to resume.
        CheckpointError: it cannot be read, or who sent it has died.
    """
    mine = checkpoint.list_checkpoints(directory)
    newest = max(session.gather(checkpoint.step_of(mine[-1]) if mine else -1))
    if newest < 0:
        if session.settings.resume and session.rank == 0:
            log.warning("no checkpoint in %s yet; starting from the beginning", directory)
        return None
    if not session.settings.resume:
        raise ConfigError(
            f"{directory} holds checkpoints of an earlier run, up to step {newest}: "
            "add --resume to go on from there, or choose another directory"
        )
    loaded, problem = None, ""
    try:
        loaded = checkpoint.load_latest(directory)
    except CheckpointError as error:
        problem = str(error)
    step = loaded[0] if loaded is not None else -1
    offers = session.gather({"member": session.member, "step": step, "problem": problem})
    best = max(offers, key=lambda offer: offer["step"])
    if best["step"] < 0:
        problems = [offer["problem"] for offer in offers if offer["problem"]]
        raise CheckpointError(problems[0] if problems else f"nothing to load in {directory}")
    return _distribute(session, loaded[1] if loaded is not None else None, best["member"])


def kept_state(session: Session, name: str, awaited: AwaitedState) -> Packed:
    """What the hosts have kept; those that have kept nothing, or something older, get it from others.

    Called by all members, where the training state is made.

    Args:
        session: this member's part in the job.
        name: under which the hosts have kept it.
        awaited: tells when the job that is to go on here has ended, if it has not yet.

    Raises:
        CheckpointError: no host has it, or who sent it has died.
    """
    if session.settings.awaits_state:
        session.barrier()  # all ranks are up
        write_record(session.settings.run_dir, "ready", {})
        awaited.wait(name, session.settings.timeout_s + TELLING_LIMIT_S)
    # If its ranks here have ended without a word, those of other hosts may still be at it.
    for _ in range(_LOOKS if session.settings.awaits_state else 1):
        packed, offer = _kept_under(name)
        offers = session.gather({"member": session.member, **offer})
        best = max(offers, key=lambda offer: offer["step"])
        if best["step"] >= 0:
            break
        time.sleep(_LOOK_PERIOD_S)
    else:
        problem = offers[0]["problem"]
        if session.settings.awaits_state:
            raise CheckpointError(
                f"the job was not handed over: no host has its state ({problem}). It moved to another launcher, "
                "runs on, or is over: see chaosctl status"
            )
        raise CheckpointError(
            f"no host has the state of the job that was to go on here ({problem}); start it without "
            f"{kept.VARIABLE}, from its last checkpoint if it has one (--checkpoint-dir, --resume)"
        )
    lacking = [
        offer["member"] for offer in offers if (offer["step"], offer["digest"]) != (best["step"], best["digest"])
    ]
    if lacking and session.rank == 0:
        log.warning("%s sends the state to %s", best["member"], ", ".join(lacking))
    if lacking or packed is None:
        packed = _distribute(session, packed, best["member"])
    return packed


def _distribute(session: Session, mine: Packed | None, source: str) -> Packed:
    """The packed state of the member ``source``, at every rank."""
    is_source = session.member == source
    layout = None
    if is_source and mine is not None:
        layout = {
            "skeleton": mine.skeleton,
            "tensors": {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in mine.tensors.items()},
        }
    layout = next((row for row in session.gather(layout) if row is not None), None)
    if layout is None:
        raise CheckpointError(f"{source} died while it handed out its checkpoint; start the job again")
    if is_source and mine is not None:
        tensors = mine.tensors
    else:
        tensors = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
            for name, (dtype, shape) in layout["tensors"].items()
        }
    session.share("checkpoint", list(tensors.values()), root=source)
    return Packed(layout["skeleton"], tensors)


def _kept_under(name: str) -> tuple[Packed | None, dict[str, Any]]:
    """The state that is kept on this host, and what the other ranks are told of it."""
    try:
        for place in kept.found(name):
            if (loaded := checkpoint.load_latest(place)) is not None:
                step, packed = loaded
                digest = checkpoint.stored_digest(checkpoint.checkpoint_path(place, step))
                return packed, {"step": step, "digest": digest, "problem": ""}
    except ChaosError as error:
        return None, {"step": -1, "digest": "", "problem": str(error)}
    return None, {"step": -1, "digest": "", "problem": f"nothing is kept under {name}"}
