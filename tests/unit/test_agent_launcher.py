"""What a rank is told of the end of its launcher, with the pipes of the kernel."""

import os

import pytest

from chaos_mpi.agent.launcher import VARIABLE, LauncherPipe, is_lost


def test_the_end_is_seen() -> None:
    pipe = LauncherPipe()
    environ = pipe.variables()
    assert not is_lost(environ)
    pipe.close()
    pipe.close()
    assert is_lost(environ)
    assert is_lost(environ)
    pipe.passed_on()


def test_another_file_with_the_same_number_is_not_taken_for_it() -> None:
    pipe = LauncherPipe()
    environ = pipe.variables()
    pipe.close()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, pipe.descriptor)
    os.close(null)
    assert not is_lost(environ)
    pipe.passed_on()
    assert not is_lost(environ)


@pytest.mark.parametrize("value", ["", "x", "3", "3:x", "-1:1", "999:1"])
def test_what_is_not_understood_is_no_loss(value: str) -> None:
    assert not is_lost({VARIABLE: value})
    assert not is_lost({})
