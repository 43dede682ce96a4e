"""The control socket of a member, without a job around it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import click
import pytest

from chaos_mpi.cli.control import ask, end_ranks, find_job
from chaos_mpi.elastic.control import ControlSocket
from chaos_mpi.elastic.session import Session


@pytest.mark.parametrize("length", [1, 200])
def test_a_directory_with_a_long_name_is_no_hindrance(length: int, tmp_path: Path) -> None:
    job = tmp_path / ("d" * length)
    job.mkdir()
    socket = ControlSocket(cast("Session", object()), job / "control-1.sock")
    try:
        assert (job / "control-1.sock").stat().st_mode & 0o777 == 0o600
        with pytest.raises(click.ClickException, match="there is no request 'dance'"):
            list(ask(find_job(job), {"do": "dance"}, limit_s=10))
    finally:
        socket.close()
    assert not list(job.iterdir())


def test_nobody_is_told_to_end_where_nobody_is(tmp_path: Path) -> None:
    (tmp_path / "control-7.sock").touch()  # what a member that was killed leaves
    assert not end_ranks(tmp_path)
