"""Packing and unpacking of nested state, and digests over tensors."""

from __future__ import annotations

import base64
import collections
import enum
import json
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos_mpi.elastic.digest import params_digest, tensor_bytes
from chaos_mpi.errors import CheckpointError
from chaos_mpi.replication.tree import Packed, pack, unpack

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.bool, torch.complex64, torch.complex128, torch.float8_e5m2,
]  # fmt: skip


def make_tensor(dtype: torch.dtype, shape: list[int], seed: int, transposed: bool) -> torch.Tensor:
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8,
                        generator=torch.Generator().manual_seed(seed))  # fmt: skip
    tensor = raw.view(dtype).reshape(shape)
    return tensor.mT if transposed and len(shape) >= 2 else tensor


tensors = st.builds(
    make_tensor, st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 99), st.booleans()
)
keys = st.one_of(st.text(max_size=4), st.sampled_from(["a", "a.b", "1", "__metadata__"]), st.integers(), st.booleans())
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**40), 10**40), st.floats(), st.text(max_size=6),
    st.binary(max_size=6), tensors,
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(collections.OrderedDict),
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return params_digest([("", a)]) == params_digest([("", b)])
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True)
        return len(a) == len(b) and all(type(i) is type(j) and i == j and same(x, y) for (i, x), (j, y) in pairs)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return repr(a) == repr(b)
    return bool(a == b)


@settings(max_examples=100, deadline=None)
@given(trees, st.booleans())
def test_round_trip(tree: Any, clone: bool) -> None:
    packed = pack(tree, clone)
    json.loads(packed.skeleton, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert same(unpack(packed), tree)
    assert all(not t.requires_grad and (t.is_contiguous() or not clone) for t in packed.tensors.values())


def test_names_are_dotted_paths_and_never_clash() -> None:
    one, two, three = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    tree = {"a.b": one, "a": {"b": two}, "m": [torch.ones(2)], "__metadata__": three}
    packed = pack(tree, clone=False)
    assert list(packed.tensors) == ["a.b", "a.b~2", "m.0", "__metadata__~2"]
    assert same(unpack(packed), tree)
    assert list(pack(one, clone=False).tensors) == ["value"]


def test_clones_are_independent_and_live_tensors_are_not_copied() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    live, copy = pack([weight], clone=False), pack([weight], clone=True)
    with torch.no_grad():
        weight.fill_(1)
    assert live.tensors["0"].tolist() == [1, 1, 1]
    assert copy.tensors["0"].tolist() == [0, 0, 0]


def test_a_clone_of_a_slice_takes_only_its_own_memory() -> None:
    big = torch.zeros(1000)
    assert pack([big[:10]], clone=True).tensors["0"].untyped_storage().nbytes() == 40
    assert pack([big[:10]], clone=True).nbytes == 40


def test_tied_tensors_are_stored_once() -> None:
    weight = torch.randn(4, 4)
    packed = pack({"in": weight, "out": weight, "t": weight.T, "first": weight[0]}, clone=True)
    assert set(packed.tensors) == {"in", "t", "first"}
    tree = unpack(packed)
    assert tree["in"] is tree["out"]
    assert torch.equal(tree["t"], weight.T)


def test_numpy_numbers_stay_what_they_are() -> None:
    numbers = [np.float32(0.1), np.float16(0.1), np.float64(0.1), np.int32(3), np.uint64(2**64 - 1), np.bool_(True),
               np.float32("nan"), np.dtype(">i4").type(7)]  # fmt: skip
    back = unpack(pack(numbers, clone=False))
    assert [type(number) for number in back] == [type(number) for number in numbers]
    assert [number.tobytes() for number in back] == [number.tobytes() for number in numbers]


def test_numpy_arrays_and_texts_become_plain() -> None:
    tree = unpack(pack(
        {"s": np.str_("x"), "big": np.arange(3, dtype=">i4"),
         "back": np.arange(4.0)[::-1], "zero": np.array(5.0)}, clone=False))  # fmt: skip
    assert type(tree["s"]) is str
    assert same(tree["big"], torch.arange(3, dtype=torch.int32))
    assert same(tree["back"], torch.arange(3.0, -1, -1, dtype=torch.float64))
    assert same(tree["zero"], torch.tensor(5.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", ["O", "V8", "U4", "no dtype", "M8[s]"])
def test_a_number_of_a_strange_type_is_damage(dtype: str) -> None:
    packed = Packed(json.dumps({"numpy": [dtype, base64.b64encode(bytes(16)).decode()]}), {})
    with pytest.raises(CheckpointError):
        unpack(packed)


def test_counter_stays_a_counter() -> None:
    tree = unpack(pack({"milestones": collections.Counter({10: 2, 20: 1})}, clone=False))
    assert type(tree["milestones"]) is collections.Counter
    assert list(tree["milestones"].elements()) == [10, 10, 20]


class Point(NamedTuple):
    x: int


class Color(enum.IntEnum):
    RED = 1


cycle: list[Any] = []
cycle.append(cycle)
deep: list[Any] = []
for _ in range(100_000):
    deep = [deep]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [0, {1, 2}]}, r"'a\.1' is of type set, which cannot be saved: use numbers"),
        ({"a": Point(1)}, r"'a' is of type .*Point"),
        ({"a": Color.RED}, r"'a' is of type .*Color"),
        ({"a": collections.defaultdict(int)}, r"collections\.defaultdict"),
        ({"a": torch.nn.Linear(1, 1)}, r"Linear, .* give its owner a state_dict"),
        ({"a": {(1, 2): 3}}, r"'a' has the key \(1, 2\) of type tuple"),
        ({None: 3}, "the value has the key None"),
        ({"a": 1j}, "complex"),
        ({"a": np.longdouble(1)}, "longdouble"),
        ({"a": np.array([None])}, "numpy.ndarray of object"),
        ({"a": torch.eye(2).to_sparse()}, r"'a' has the layout torch\.sparse_coo: save tensor\.to_dense\(\)"),
        ({"a": torch.empty(2, device="meta")}, "'meta' device"),
        ({"a": torch.nn.LazyLinear(1).weight}, "not initialised yet"),
        ({"a": cycle}, r"'a\.0' contains itself"),
        (deep, "nested too deeply"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_everything_else_is_refused_with_its_path(tree: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        pack(tree, clone=True)


@pytest.mark.parametrize(
    "skeleton",
    ["", "{", '{"what":1}', '{"a":1,"b":2}', '{"tensor":"gone"}', '{"int":"x"}', '{"dict":[[1]]}'],
)
def test_damaged_skeletons(skeleton: str) -> None:
    with pytest.raises(CheckpointError):
        unpack(Packed(skeleton, {}))


@given(tensors)
@settings(max_examples=60, deadline=None)
def test_tensor_bytes(tensor: torch.Tensor) -> None:
    data = bytes(tensor_bytes(tensor))
    assert len(data) == tensor.numel() * tensor.element_size()
    if tensor.numel():
        assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.uint8),
                           tensor.contiguous().reshape(-1).view(torch.uint8))  # fmt: skip


def test_tensor_bytes_do_not_copy() -> None:
    tensor = torch.zeros(4, dtype=torch.uint8)
    view = tensor_bytes(tensor)
    tensor[0] = 7
    assert view[0] == 7


def test_digest_sees_every_difference() -> None:
    base = torch.tensor([1.0, 2.0])
    variants = [
        [("w", base)], [("v", base)], [("w", base.reshape(2, 1))], [("w", base.to(torch.bfloat16))], [],
        [("w", base.view(torch.int32))], [("w", torch.tensor([1.0, 2.0000002]))], [("w", base), ("x", torch.zeros(0))],
        [("w", torch.tensor([0.0]))], [("w", torch.tensor([-0.0]))], [("w", torch.tensor(0.0))],
    ]  # fmt: skip
    digests = [params_digest(variant) for variant in variants]
    assert len(set(digests)) == len(variants)
    assert all(len(digest) == 32 for digest in digests)
    assert params_digest([("w", base.clone())]) == digests[0]
    grid = torch.arange(6.0).reshape(2, 3)
    assert params_digest([("w", grid.T)]) == params_digest([("w", grid.T.contiguous())])
    conjugate = torch.complex(base, base).conj()
    assert params_digest([("w", conjugate)]) == params_digest([("w", torch.complex(base, -base))])
