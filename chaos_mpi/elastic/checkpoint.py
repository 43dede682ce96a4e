"""Checkpoints on disk: one safetensors file per step, written whole or not at all, and checked when read.

Written here by hand, since a file must be synced before it gets its name; read with the safetensors package.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import socket
import struct
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open

import chaos_mpi
from chaos_mpi.elastic.digest import params_digest, tensor_bytes
from chaos_mpi.errors import CheckpointError
from chaos_mpi.replication.tree import Packed

log = logging.getLogger("chaos_mpi.checkpoint")

#: Version of the layout of a checkpoint; raised when older packages cannot read newer files. The first had another
#: digest.
FORMAT_VERSION = 2

#: Readers of safetensors accept no longer header than this.
MAX_HEADER_BYTES = 100_000_000

#: Temporary files that nobody has written to for so long are left over from a process that died.
STALE_S = 3600.0

_NAME = re.compile(r"step-(\d{9,})\.safetensors")
_TEMPORARY = re.compile(r"\.step-\d{9,}\..*\.tmp")

#: dtypes under their name in safetensors. Tensors of others are stored as bytes, with a note in the metadata.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class _DamagedError(CheckpointError):
    """The file is not what was written; an older checkpoint may be good."""


def unused_directory(directory: Path) -> Path:
    """This directory, or one with a number behind its name, that holds no checkpoints of another run.

    What this process's job has just written there, by another rank, counts as its own.
    """
    started = psutil.Process().create_time()
    numbered = (directory.with_name(f"{directory.name}-{number}") for number in itertools.count(2))
    return next(
        place
        for place in itertools.chain([directory], numbered)
        if all(path.stat().st_mtime >= started for path in list_checkpoints(place))
    )


def make_writable(directory: Path) -> None:
    """Make a directory for checkpoints, if it is not there, and try it.

    Raises:
        CheckpointError: it cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint directory {directory} cannot be written to: {error.strerror or error}"
        ) from error


class CheckpointWriter:
    """Writes checkpoints from a background thread and keeps the newest ones.

    A write that fails is logged and kept in ``last_error`` (None again after a success); training goes on.

    Args:
        directory: where to write; created if it does not exist.
        keep: how many checkpoints to keep.

    Raises:
        CheckpointError: the directory cannot be written to.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2) -> None:
        if keep < 1:
            raise CheckpointError(f"keep must be at least 1, not {keep}")
        self.directory = Path(directory)
        self.keep = keep
        self.last_error: CheckpointError | None = None
        make_writable(self.directory)
        self._changed = threading.Condition()
        self._waiting: tuple[int, Packed] | None = None
        self._writing = False
        self._closed = False
        self._thread = threading.Thread(target=self._write_all, name="chaos_mpi-checkpoint", daemon=True)
        self._thread.start()

    def submit(self, step: int, packed: Packed) -> None:
        """Have a checkpoint written; returns at once. Its tensors must not change any more (pack a clone).

        While one is being written, only the newest of those submitted waits; older ones are never written.
        """
        with self._changed:
            if self._closed:
                raise CheckpointError(f"the checkpoint writer for {self.directory} is closed")
            self._waiting = (step, packed)
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything submitted is on disk, or has failed; False if it takes over ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is None and not self._writing, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Write what is submitted and stop; False if it takes over ``timeout_s``."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._waiting is None:
                    return
                (step, packed), self._waiting, self._writing = self._waiting, None, True
            try:
                save_now(checkpoint_path(self.directory, step), step, packed)
                self.last_error = None
                _prune(self.directory, self.keep, written=step)
            except CheckpointError as error:
                # A new one, because the traceback of the old one would keep the tensors in memory.
                self.last_error = CheckpointError(str(error))
                log.error("%s; training goes on", error)
            except Exception as error:  # a thread that dies silently would end all checkpoints
                self.last_error = CheckpointError(f"the checkpoint of step {step} was not written: {error!r}")
                log.exception("the checkpoint of step %d was not written; training goes on", step)
            finally:
                del packed  # or the copy would stay in memory until the next checkpoint
                with self._changed:
                    self._writing = False
                    self._changed.notify_all()


def checkpoint_path(directory: str | os.PathLike[str], step: int) -> Path:
    """The file of the checkpoint of a step."""
    return Path(directory) / f"step-{step:09d}.safetensors"


def step_of(path: str | os.PathLike[str]) -> int:
    """The step in the name of a checkpoint.

    Raises:
        CheckpointError: the name is not that of a checkpoint.
    """
    match = _NAME.fullmatch(Path(path).name)
    if match is None:
        raise CheckpointError(f"{path} is not named like a checkpoint (step-000000123.safetensors)")
    return int(match.group(1))


def list_checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a directory, oldest step first; none if it does not exist.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"the checkpoint directory {directory} cannot be read: {error}") from error
    return sorted((Path(directory) / name for name in names if _NAME.fullmatch(name)), key=step_of)


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the highest step, or None."""
    found = list_checkpoints(directory)
    return found[-1] if found else None


def save_now(path: str | os.PathLike[str], step: int, packed: Packed) -> None:
    """Write a checkpoint before returning. A file at ``path`` is there whole or not at all, whatever happens.

    Raises:
        CheckpointError: it could not be written; says why.
    """
    path = Path(path)
    writer = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    temporary = path.with_name(f".step-{step:09d}.{writer}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                tensors = _in_file_order(packed.tensors)
                file.write(_header(step, packed, tensors))
                for _, tensor in tensors:
                    file.write(tensor_bytes(tensor))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {path.parent}: {error.strerror or error}"
        ) from error


def load(path: str | os.PathLike[str]) -> Packed:
    """Read a checkpoint, and verify that it is what was written.

    Raises:
        CheckpointError: the file is missing, torn, damaged, not written by chaos_mpi, or by a newer one.
    """
    return _read(Path(path))[1]


def load_latest(directory: str | os.PathLike[str]) -> tuple[int, Packed] | None:
    """Step and content of the newest good checkpoint; None if there is no checkpoint at all.

    A damaged one is passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints, but none can be used; or the newest is of a newer chaos_mpi.
    """
    first: CheckpointError | None = None
    for path in reversed(list_checkpoints(directory)):
        try:
            return _read(path)
        except _DamagedError as error:
            first = first or error
            log.warning("%s; trying the one before", error)
    if first is not None:
        raise CheckpointError(f"no usable checkpoint in {directory}: {first}")
    return None


def _in_file_order(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    # Wide dtypes first: then every tensor is aligned to its own width without gaps, which the format forbids.
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _header(step: int, packed: Packed, tensors: list[tuple[str, torch.Tensor]]) -> bytes:
    header: dict[str, object] = {}
    others: dict[str, list[object]] = {}
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        dtype, shape = _DTYPES.get(tensor.dtype), list(tensor.shape)
        if dtype is None:
            others[name] = [str(tensor.dtype).removeprefix("torch."), shape]
            dtype, shape = "U8", [end - begin]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    header["__metadata__"] = {
        "format": "pt",  # what other readers of safetensors look for
        "writer": "chaos_mpi",
        "format_version": str(FORMAT_VERSION),
        "package_version": chaos_mpi.__version__,
        "step": str(step),
        "digest": _content_digest(step, packed),
        "dtypes": json.dumps(others),
        "skeleton": packed.skeleton,
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"the checkpoint of step {step} has {len(text)} bytes of values that are not tensors, more than "
            f"the {MAX_HEADER_BYTES} that the file format allows: keep long lists of numbers as tensors"
        )
    return struct.pack("<Q", len(text)) + text


def stored_digest(path: str | os.PathLike[str]) -> str:
    """The digest over all that a checkpoint holds, as written in it; :func:`load` makes sure that it is right.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return str((file.metadata() or {}).get("digest", ""))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _content_digest(step: int, packed: Packed, version: str = str(FORMAT_VERSION)) -> str:
    skeleton = torch.frombuffer(bytearray(packed.skeleton.encode()), dtype=torch.uint8)
    content = [(f"step {step}", skeleton), *sorted(packed.tensors.items())]
    return (
        params_digest(content, partial(hashlib.blake2b, digest_size=16)) if version == "1" else params_digest(content)
    )


def _read(path: Path) -> tuple[int, Packed]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata: dict[str, str] = file.metadata() or {}
            _check_origin(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except SafetensorError as error:
        raise _DamagedError(f"{path} is not a whole checkpoint: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        for name, (dtype, shape) in json.loads(metadata["dtypes"]).items():
            tensors[name] = tensors[name].view(getattr(torch, dtype)).reshape(shape)
        step, packed = int(metadata["step"]), Packed(metadata["skeleton"], tensors)
        good = _content_digest(step, packed, metadata["format_version"]) == metadata["digest"]
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise _DamagedError(f"{path} is damaged: {error!r}") from error
    if not good:
        raise _DamagedError(f"{path} is damaged: its content does not match its digest")
    return step, packed


def _check_origin(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("writer") != "chaos_mpi":
        raise _DamagedError(f"{path} is a safetensors file, but not a checkpoint that chaos_mpi wrote")
    version = metadata.get("format_version", "")
    if version.isdecimal() and int(version) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written by chaos_mpi {metadata.get('package_version')} in format {version}; this is "
            f"chaos_mpi {chaos_mpi.__version__}, which reads up to format {FORMAT_VERSION}: upgrade it"
        )


def _prune(directory: Path, keep: int, written: int) -> None:
    """Remove what is no longer needed; only after a success, so a failing disk never costs an old one."""
    superseded = [path for path in list_checkpoints(directory)[:-keep] if step_of(path) != written]
    try:
        stale = [path for path in directory.iterdir() if _TEMPORARY.fullmatch(path.name) and _is_old(path)]
        for path in superseded + stale:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("an old checkpoint in %s could not be removed: %s", directory, error)


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > STALE_S
    except FileNotFoundError:  # its owner has just finished it
        return False


def _sync_directory(directory: Path) -> None:
    """Make the new name of a file survive a power cut, too."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
