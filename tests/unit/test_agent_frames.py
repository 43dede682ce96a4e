"""Frames between proxy and supervisor: whatever the pieces they come in, they come out as they went in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.agent.frames import MAGIC, MAX_CONTENT_BYTES, Decoder, Frame, Kind, encode, encode_json
from chaos_mpi.errors import EngineError

FRAMES = st.lists(st.builds(Frame, st.sampled_from(Kind), st.binary(max_size=50), st.integers(0, 2**32 - 1)))
NOISE = st.binary(max_size=60).filter(lambda data: MAGIC[0] not in data)


@given(NOISE, FRAMES, st.lists(st.integers(1, 40), min_size=1))
def test_frames_come_out_as_they_went_in(noise: bytes, frames: list[Frame], sizes: list[int]) -> None:
    data = noise + MAGIC + b"".join(map(encode, frames))
    decoder, before, found = Decoder(), b"", []
    turn = 0
    while data:
        size = sizes[turn % len(sizes)]
        turn += 1
        piece, data = data[:size], data[size:]
        said, complete = decoder.feed(piece)
        before += said
        found += complete
    assert (before, found, decoder.rest()) == (noise, frames, b"")


def test_noise_without_frames_is_kept_for_the_end() -> None:
    decoder = Decoder()
    said, frames = decoder.feed(b"Permission denied\n")
    assert (said + decoder.rest(), frames, decoder.begun) == (b"Permission denied\n", [], False)


@pytest.mark.parametrize("bad", [b"\xff" + bytes(8), b"\x05" + bytes(4) + b"\xff" * 4])
def test_what_is_no_frame_is_refused(bad: bytes) -> None:
    with pytest.raises(EngineError, match="same version"):
        Decoder().feed(MAGIC + bad)


def test_content() -> None:
    _, [frame] = Decoder().feed(MAGIC + encode_json(Kind.EXIT, -9))
    assert frame.json() == -9
    with pytest.raises(EngineError, match="EXIT"):
        Frame(Kind.EXIT, b"{").json()
    with pytest.raises(ValueError, match="holds up to"):
        encode(Frame(Kind.DATA, bytes(MAX_CONTENT_BYTES + 1)))
