"""An accelerator without hardware, see ``hostlike.cpp``: built once by the tests, registered by each process."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import types
import warnings
from pathlib import Path

import torch

NAME = "hostlike"
_SOURCE = Path(__file__).with_suffix(".cpp")
_BUILD_LIMIT_S = 300.0


def _library() -> Path:
    """Where it is built: made anew for another version of torch or of the source."""
    version = f"{torch.__version__}-{_SOURCE.stat().st_mtime_ns}"
    return Path(tempfile.gettempdir()) / f"chaos-test-{os.getuid()}" / f"hostlike-{version}.so"


def build() -> str:
    """Build it if it is not there; why that cannot be, or nothing."""
    library = _library()
    library.parent.mkdir(mode=0o700, exist_ok=True)
    with open(library.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if library.exists():
            return ""
        compiler = shutil.which("c++") or shutil.which("g++")
        if compiler is None:
            return "there is no C++ compiler"
        root = Path(torch.__file__).parent
        new = library.with_suffix(".new")
        abi = int(torch.compiled_with_cxx11_abi())
        line = [
            compiler, "-shared", "-fPIC", "-O0", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
            f"-I{root / 'include'}", str(_SOURCE), "-o", str(new), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu",
        ]  # fmt: skip
        done = subprocess.run(line, capture_output=True, text=True, timeout=_BUILD_LIMIT_S, check=False)
        if done.returncode:
            return f"it cannot be built: {done.stderr[-2000:]}"
        new.rename(library)
        return ""


def register() -> None:
    """Have the device in this process."""
    torch.ops.load_library(str(_library()))
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    answers = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "_is_in_bad_fork": lambda: False, "manual_seed_all": lambda seed: None, "get_amp_supported_dtype": list,
    }  # fmt: skip
    module.__dict__.update(answers)
    torch._register_device_module(NAME, module)
    warnings.filterwarnings("ignore", "An output with one or more elements was resized")  # of operations that fall back
