"""The filter between mpirun's output and the user: noise goes, everything else stays, and at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.cli.output import OutputFilter

NBC = b"NBC_Progress: an error 75 was found during schedule 0x55d0 at row-offset 64 - aborting the schedule\n"
RULE = b"-" * 74 + b"\n"
KILLED = (
    RULE + b"prterun noticed that process rank 1 with PID 77 on node vm exited on\nsignal 9 (Killed).\n" + RULE + b"\0"
)
ENDED = (
    RULE + b"prterun detected that one or more processes exited with non-zero status,\nthus causing the job to be"
    b" terminated.\n" + RULE + b"\0"
)
HELPFUL = RULE + b"There are not enough slots available in the system\n\nto satisfy the 9 slots\n" + RULE


def filtered(chunks: Iterable[bytes], *, tagged: bool = False, drop_noise: bool = True) -> bytes:
    """What the user sees of these chunks."""
    output = OutputFilter(tagged=tagged, drop_noise=drop_noise)
    return b"".join([output.feed(chunk) for chunk in chunks] + [output.finish()])


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """``data`` in pieces."""
    ends = sorted({min(place, len(data)) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(ends)]


EVENT_LIBRARY = (
    b"[warn] Epoll MOD(1) on fd 25 failed. Old events were 6; read change was 0 (none); write change was 2 (del); "
    b"close change was 0 (none): Bad file descriptor\n"
)


def test_what_the_event_library_remarks_is_left_out() -> None:
    assert filtered([b"a\n" + EVENT_LIBRARY + b"b\n"]) == b"a\nb\n"
    assert filtered([EVENT_LIBRARY], drop_noise=False) == EVENT_LIBRARY
    other = EVENT_LIBRARY.replace(b"Bad file descriptor", b"No space left on device")
    assert filtered([other]) == other


# -- what is no noise stays -------------------------------------------------------------------------------

#: By which the launcher's remarks are known.
NOISE_STARTS = (
    b"Abort is in progress...hit",
    b"LAUNCHER JOB OBJECT NOT FOUND",
    b"Error in NBC_Start_round()",
    b"MPI Error in NBC subrequest",
)
PLAIN_LINES = st.one_of(
    st.binary(max_size=30)
    .map(lambda text: text.replace(b"\n", b"").replace(b"\0", b""))
    .filter(lambda text: not text.startswith(NOISE_STARTS)),
    st.sampled_from([
        b"", b" ", b"-" * 39, b"-" * 40, b"-" * 80, b"--- epoch 3 ---", b"loss 0.5\r", b"NBC", b"NBC_Progress: well",
        b"Abort is in progress", b"chaos_mpi: a word", b"[1,0]<stdout>: not by mpirun",
    ]),
)  # fmt: skip
PLAIN = st.builds(lambda lines, end: b"\n".join(lines) + end, st.lists(PLAIN_LINES), st.sampled_from([b"", b"\n"]))


@given(PLAIN, st.lists(st.integers(0, 400)), st.booleans())
def test_other_output_is_passed_on_byte_by_byte(data: bytes, places: list[int], drop_noise: bool) -> None:
    assert filtered(cut(data, places), drop_noise=drop_noise) == data


@given(st.binary(), st.lists(st.integers(0, 100)))
def test_without_filtering_nothing_is_even_looked_at(data: bytes, places: list[int]) -> None:
    assert filtered(cut(data, places), drop_noise=False) == data


@given(st.lists(st.integers(0, 2000)))
def test_noise_is_found_however_it_is_cut(places: list[int]) -> None:
    data = b"before\n" + NBC + b"\n" + NBC + b"\nbetween\n" + KILLED + ENDED + b"after\n" + HELPFUL
    assert filtered(cut(data, places)) == b"before\nbetween\nafter\n" + HELPFUL


@pytest.mark.parametrize("rest", [NBC, b"Abort is in progress...hit ctrl-c again\n"])
def test_the_rest_of_a_line_is_no_noise(rest: bytes) -> None:
    assert filtered([b"progress ", rest]) == b"progress " + rest


@pytest.mark.parametrize("drop_noise", [False, True])
def test_it_is_noted_that_mpi_gives_up(drop_noise: bool) -> None:
    said = b"[vm:00000] *** MPI_ERRORS_ARE_FATAL (processes in this communicator will now abort,\n"
    for place in range(len(said)):
        output = OutputFilter(tagged=False, drop_noise=drop_noise)
        output.feed(b"epoch 3\n" + said[:place])
        output.feed(said[place:])
        assert output.mpi_gave_up, place
    output = OutputFilter(tagged=False, drop_noise=drop_noise)
    output.feed(b"epoch 3\nMPI is a library\n")
    assert not output.mpi_gave_up


# -- noise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [NBC + b"\n", KILLED, ENDED, b"Abort is in progress...hit ctrl-c again within 5\n"])
def test_noise_is_dropped(noise: bytes) -> None:
    assert filtered([b"a\n" + noise + b"b\n"]) == b"a\nb\n"


def test_noise_stays_on_request() -> None:
    data = b"a\n" + NBC + b"\n" + KILLED
    assert filtered([data], drop_noise=False) == data


def test_the_empty_line_of_each_remark_goes_and_no_other() -> None:
    # Several processes write into one stream: the empty lines may come later than the next remark.
    assert filtered([NBC + NBC + b"\n\n\na\n\nb\n"]) == b"\na\n\nb\n"


def test_a_box_that_helps_is_shown_whole() -> None:
    assert filtered([b"a\n" + HELPFUL + b"b\n"]) == b"a\n" + HELPFUL + b"b\n"


def test_a_box_without_end_is_not_withheld_for_ever() -> None:
    lines = b"".join(b"line %d\n" % n for n in range(60))
    output = OutputFilter(tagged=False, drop_noise=True)
    shown = output.feed(RULE + lines)
    assert len(shown.splitlines()) >= 40
    assert shown + output.finish() == RULE + lines
    assert filtered([RULE + b"the last word"]) == RULE + b"the last word"


def test_idle_gives_out_what_waits_for_the_end_of_a_box() -> None:
    output = OutputFilter(tagged=False, drop_noise=True)
    assert output.feed(RULE + b"epoch 1\n") == b""
    assert output.idle() == RULE + b"epoch 1\n"
    assert output.idle() == b""
    assert output.feed(b"epoch 2\n") == b"epoch 2\n"


# -- partial lines ----------------------------------------------------------------------------------------


def test_a_prompt_is_shown_at_once() -> None:
    output = OutputFilter(tagged=False, drop_noise=True)
    assert output.feed(b"continue? ") == b"continue? "
    assert output.feed(b"yes\nlo") == b"yes\nlo"
    assert output.feed(b"ss\r") == b"ss\r"
    assert output.finish() == b""


@pytest.mark.parametrize("start", [b"N", b"NBC_Progress: an", b"-", b"---", b"Abort is"])
def test_what_may_become_noise_waits(start: bytes) -> None:
    output = OutputFilter(tagged=False, drop_noise=True)
    assert output.feed(start) == b""
    assert output.finish() == start


# -- tags -------------------------------------------------------------------------------------------------


def test_tags_become_ranks() -> None:
    data = b"[1,0]<stdout>: hello\n[1,12]<stderr>:there\n[1,3]<stddiag>: \nno tag\n"
    assert filtered([data], tagged=True) == b"[0] hello\n[12] there\n[3] \nno tag\n"


def test_tags_are_left_alone_unless_asked_for() -> None:
    data = b"[1,0]<stdout>: hello\n"
    assert filtered([data]) == data


@given(st.lists(st.tuples(st.integers(0, 99), PLAIN_LINES)), st.lists(st.integers(0, 400)), st.booleans())
def test_tagged_lines_are_passed_on(lines: list[tuple[int, bytes]], places: list[int], drop_noise: bool) -> None:
    data = b"".join(b"[1,%d]<stdout>: %s\n" % line for line in lines)
    shown = filtered(cut(data, places), tagged=True, drop_noise=drop_noise)
    assert shown == b"".join(b"[%d] %s\n" % line for line in lines)


def test_noise_is_found_behind_tags() -> None:
    assert filtered([b"[1,2]<stderr>: " + NBC + b"[1,2]<stderr>: \n[1,2]<stderr>: a\n"], tagged=True) == b"[2] a\n"


def test_a_half_line_waits_for_its_end() -> None:
    output = OutputFilter(tagged=True, drop_noise=False)
    assert output.feed(b"[1,0]<std") == b""
    assert output.feed(b"out>: hel") == b""
    assert output.feed(b"lo\n[1,1]<stdout>: x") == b"[0] hello\n"
    assert output.finish() == b"[1] x"


# -- the package's own messages ---------------------------------------------------------------------------


def test_own_messages_are_remembered() -> None:
    output = OutputFilter(tagged=True, drop_noise=True)
    output.feed(b"[1,0]<stderr>: chaos_mpi: rank 1 is slow\n[1,0]<stderr>: other\n")
    assert output.own_lines == {"chaos_mpi: rank 1 is slow"}


def test_own_messages_behind_a_progress_bar_are_remembered() -> None:
    output = OutputFilter(tagged=False, drop_noise=True)
    output.feed(b"\r 10% [=>   ] chaos_mpi: stopped\n\r 20%")
    output.feed(b"chaos_mpi: saved\n")
    assert output.own_lines == {"chaos_mpi: stopped", "chaos_mpi: saved"}


def test_memory_for_own_messages_is_bounded() -> None:
    output = OutputFilter(tagged=False, drop_noise=True)
    output.feed(b"".join(b"chaos_mpi: %d\n" % n for n in range(1000)))
    assert len(output.own_lines) == 100
