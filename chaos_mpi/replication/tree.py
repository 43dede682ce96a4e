"""Packing: a nested value becomes a JSON text and a flat set of named tensors, and comes back as it was.

This is how training state travels to other members and to disk. Nothing is ever unpickled, so a state from
somewhere else cannot run code here.
"""

from __future__ import annotations

import base64
import collections
import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from chaos_mpi.errors import CheckpointError

#: Containers with named entries that come back as what they were; others would silently change their kind.
_DICTS: dict[str, type[dict[Any, Any]]] = {
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "Counter": collections.Counter,  # the milestones of torch's MultiStepLR
}
_DICT_NAMES = {kind: name for name, kind in _DICTS.items()}

#: Numpy's numbers: truth values, integers with and without sign, and floats; a long double has bytes without a meaning.
_NUMPY_NUMBERS = frozenset(np.dtype(code) for code in "?bBhHiIqQefd")

#: Names that the file format keeps for itself.
_RESERVED_NAMES = frozenset({"__metadata__"})


@dataclass(frozen=True)
class Packed:
    """A packed tree.

    Attributes:
        skeleton: JSON text with the structure and every value that is not a tensor.
        tensors: the tensors by their dotted path in the tree.
    """

    skeleton: str
    tensors: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def pack(tree: Any, clone: bool) -> Packed:
    """Pack nested dicts (keys str, int or bool), lists, tuples, None, bool, int, float, str, bytes, tensors.

    numpy numbers come back as they were, because what is computed with them depends on their type; numpy arrays
    become tensors. Tensors that share memory, shape and strides (tied weights) are stored once.

    Args:
        tree: what to pack.
        clone: copy the tensors to CPU memory of their own; else they stay the live ones, only detached.

    Raises:
        CheckpointError: a value of another kind; the message names its path and type.
    """
    packer = _Packer(clone)
    try:
        skeleton = json.dumps(packer.encode(tree, ()), allow_nan=False, separators=(",", ":"))
    except RecursionError:
        raise CheckpointError("the state is nested too deeply to be saved; make it flatter") from None
    return Packed(skeleton, packer.tensors)


def unpack(packed: Packed) -> Any:
    """The tree that was packed. Its tensors are those of ``packed``, not copies; tied tensors are one tensor.

    Raises:
        CheckpointError: the skeleton is damaged or does not fit the tensors.
    """
    try:
        return _decode(json.loads(packed.skeleton), packed.tensors)
    except CheckpointError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the structure of the packed state is damaged: {error!r}") from error


@dataclass
class _Packer:
    clone: bool
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _known: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _above: set[int] = field(default_factory=set)

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        """The JSON form of a value. Scalars stand for themselves; everything else is {kind: content}."""
        value = _without_numpy(value, path)
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            # Python refuses to write very long integers in decimal.
            return value if value.bit_length() <= 64 else {"int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if kind is bytes:
            return {"bytes": base64.b64encode(value).decode()}
        if isinstance(value, torch.Tensor):
            return {"tensor": self._add(value, path)}
        if isinstance(value, np.generic) and value.dtype in _NUMPY_NUMBERS:
            return {"numpy": [value.dtype.str, base64.b64encode(value.tobytes()).decode()]}
        if kind is list or kind is tuple or kind in _DICT_NAMES:
            if id(value) in self._above:
                raise CheckpointError(f"{_dotted(path)} contains itself and cannot be saved")
            self._above.add(id(value))
            encoded = self._encode_container(value, path)
            self._above.remove(id(value))
            return encoded
        raise _refusal(value, path)

    def _encode_container(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, (list, tuple)):
            content = [self.encode(entry, (*path, str(index))) for index, entry in enumerate(value)]
            return content if isinstance(value, list) else {"tuple": content}
        for key in value:
            if type(key) not in (str, int, bool):
                raise CheckpointError(
                    f"{_dotted(path)} has the key {key!r} of type {_type_name(key)}; keys must be str, int or bool"
                )
        # Pairs, because JSON's own objects would turn the key 1 into "1".
        pairs = [[self.encode(key, path), self.encode(at, (*path, str(key)))] for key, at in value.items()]
        return {_DICT_NAMES[type(value)]: pairs}

    def _add(self, tensor: torch.Tensor, path: tuple[str, ...]) -> str:
        _refuse_unusual(tensor, path)
        tensor = tensor.detach()
        memory: tuple[Any, ...] | None = None
        if tensor.numel():
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            memory = (*place, tensor.dtype, tensor.is_conj(), tensor.is_neg())
            if memory in self._known:
                return self._known[memory]
        name = self._unused_name(path)
        if self.clone:
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)
        self.tensors[name] = tensor
        if memory is not None:
            self._known[memory] = name
        return name

    def _unused_name(self, path: tuple[str, ...]) -> str:
        """The dotted path; with a number behind it if another path reads the same."""
        wanted = ".".join(path).encode(errors="backslashreplace").decode() or "value"
        name, number = wanted, 1
        while name in self.tensors or name in _RESERVED_NAMES:
            number += 1
            name = f"{wanted}~{number}"
        return name


def _decode(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(entry, tensors) for entry in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        if content not in tensors:
            raise CheckpointError(f"the packed state lacks the tensor '{content}'")
        return tensors[content]
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float(content)
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "numpy":
        dtype, data = content
        return np.frombuffer(base64.b64decode(data), dtype=_numpy_number(dtype))[0]
    if kind == "tuple":
        return tuple(_decode(entry, tensors) for entry in content)
    # Filled one by one: the constructor of a Counter would count the pairs.
    tree = _DICTS[kind]()
    for key, entry in content:
        tree[_decode(key, tensors)] = _decode(entry, tensors)
    return tree


def _without_numpy(value: Any, path: tuple[str, ...]) -> Any:
    """Numpy's arrays and texts as tensors and plain texts."""
    if isinstance(value, (np.str_, np.bytes_)):
        return value.item()
    if type(value) in (np.ndarray, np.memmap):
        try:
            native = value.dtype.newbyteorder("=")
            return torch.from_numpy(value.astype(native, order="C", subok=False, copy=True))
        except TypeError:
            raise _refusal(value, path, f" of {value.dtype}") from None
    return value


def _numpy_number(name: str) -> np.dtype[Any]:
    dtype = np.dtype(name)
    if dtype not in _NUMPY_NUMBERS:
        raise CheckpointError(f"the packed state has a number of type {name}, which is none")
    return dtype


def _refuse_unusual(tensor: torch.Tensor, path: tuple[str, ...]) -> None:
    problem = ""
    if torch.nn.parameter.is_lazy(tensor):
        problem = "is not initialised yet: run one batch through the model before naming its state"
    elif tensor.is_meta:
        problem = "is on the 'meta' device and has no values: materialise the model first"
    elif tensor.layout != torch.strided or tensor.is_nested:
        problem = f"has the layout {tensor.layout}: save tensor.to_dense() instead"
    elif tensor.is_quantized:
        problem = "is quantised: save its integers, scales and zero points as tensors instead"
    elif type(tensor) is not torch.Tensor and not isinstance(tensor, torch.nn.Parameter):
        problem = f"is of the special kind {_type_name(tensor)}: save a plain tensor instead"
    if problem:
        raise CheckpointError(f"the tensor {_dotted(path)} {problem}")


def _refusal(value: Any, path: tuple[str, ...], detail: str = "") -> CheckpointError:
    return CheckpointError(
        f"{_dotted(path)} is of type {_type_name(value)}{detail}, which cannot be saved: use numbers, text, "
        "None, lists, tuples, dicts and tensors, or give its owner a state_dict() made of these"
    )


def _dotted(path: tuple[str, ...]) -> str:
    return "'" + ".".join(path) + "'" if path else "the value"


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
