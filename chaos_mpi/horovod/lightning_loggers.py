"""What Lightning's loggers write to: the same at all ranks, since any of them may have to go on with it.

Each rank has loggers of its own, of which only rank 0's write. Left to themselves, the others would number a version of
their own when they come to write, and a CSVLogger would first remove what another rank has written.
"""

from __future__ import annotations

import csv
import os
from typing import TYPE_CHECKING

import torch
from lightning.fabric.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import Trainer

    from chaos_mpi.elastic.session import Session

#: In place of a version that is not a number; then the script has chosen it, and all ranks have the same.
_CHOSEN = -1
#: Versions that rank 0 tells. Always as many, because a script may make its loggers at rank 0 only.
_TOLD = 16


class Loggers:
    """The loggers of a trainer that write to a folder of a numbered version.

    Args:
        trainer: after its loggers were made.
        session: the session.

    Attributes:
        versions: the versions of rank 0's, once it has told them.
    """

    def __init__(self, trainer: Trainer, session: Session) -> None:
        self._trainer, self._session = trainer, session
        self._numbered = [x for x in trainer.loggers if isinstance(x, (CSVLogger, TensorBoardLogger))]
        self.versions: list[int] = []

    def agree(self) -> None:
        """Have all ranks use the versions of rank 0; to be called before anything asks for them."""
        own = [x.version if isinstance(x.version, int) else _CHOSEN for x in self._numbered[:_TOLD]]
        versions = torch.tensor(own + [_CHOSEN] * (_TOLD - len(own)), device="cpu")
        self._session.share("versions of the loggers", [versions])
        self._use(versions.tolist())

    def load(self, versions: Sequence[int]) -> None:
        """In a newcomer: use the versions of the members. One that resumes the job begins its own."""
        if not self._session.is_newcomer:
            return
        before = self._checkpoint_folder()
        self._use(versions)
        for callback in self._trainer.checkpoint_callbacks:
            if before is not None and getattr(callback, "dirpath", None) == before:
                callback.dirpath = self._checkpoint_folder()

    def take_over(self) -> None:
        """This rank is the one that writes from now on."""
        for logger in self._numbered:
            if isinstance(logger, CSVLogger) and logger._experiment is None:
                logger._experiment = _Continued(logger.log_dir)

    def _use(self, versions: Sequence[int]) -> None:
        self.versions = list(versions)
        for logger, version in zip(self._numbered, versions, strict=False):
            if version != _CHOSEN:
                logger._version = version

    def _checkpoint_folder(self) -> str | None:
        """Where a ModelCheckpoint saves that was not told; None if that has nothing to do with these loggers."""
        logger = self._trainer.logger  # the first
        if logger not in self._numbered:
            return None
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        return os.path.join(logger.save_dir or self._trainer.default_root_dir, str(logger.name), version, "checkpoints")


class _Continued(ExperimentWriter):  # type: ignore[misc]
    """Goes on with the file that another rank has written.

    What is in it is looked at whenever something is added: a rank that leaves may write its last lines only now.
    """

    def _check_log_dir_exists(self) -> None:
        """Lightning removes the file here."""

    def save(self) -> None:
        if self.metrics and self._fs.isfile(self.metrics_file_path):
            self.metrics_keys = self._columns()
        super().save()

    def _columns(self) -> list[str]:
        """Those of the file, whose last line is cut off if it is not whole: the rank that wrote it was killed."""
        with self._fs.open(self.metrics_file_path, "r", newline="") as file:
            whole, end, rest = file.read().rpartition("\n")
        if rest:
            with self._fs.open(self.metrics_file_path, "w", newline="") as file:
                file.write(whole + end)
        columns: list[str] = next(csv.reader([whole.partition("\n")[0]]), [])
        return columns
