"""Scripts that are tried out: without a launcher, or with mpirun as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """if True:
    import os
    import chaos_mpi
    from chaos_mpi.mpi.launch import MCA_DEFAULTS
    assert chaos_mpi.init().size == 1
    assert os.environ["OMPI_MCA_btl"] == MCA_DEFAULTS["btl"], "it is for what the script starts"
    chaos_mpi.finalize()
"""


def segments(folder: Path) -> set[str]:
    """Shared memory of Open MPI there."""
    return {path.name for path in folder.glob("*sm_segment*")}


def environment_with(folder: Path) -> dict[str, str]:
    """That of a process that no launcher has started, with a directory of its own for shared memory."""
    ours = ("OMPI_", "PMIX_", "PRTE_", "CHAOS_")
    own = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**own, "OMPI_MCA_btl_sm_backing_directory": str(folder)}


def test_a_process_without_a_launcher_leaves_no_shared_memory_behind(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment_with(tmp_path), timeout=60, check=True)
    assert not segments(tmp_path)


def test_ranks_without_fault_tolerance_are_refused_and_leave_nothing_behind(tmp_path: Path) -> None:
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [str(Path(sys.executable).with_name("mpirun")), "--oversubscribe", "-n", "2", sys.executable, "-c"]
    ended = subprocess.run(
        [*command, "import chaos_mpi; chaos_mpi.init()"], env={**environment_with(tmp_path), **root}, timeout=60,
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert "this job of 2 ranks was started without fault tolerance" in ended.stderr
    assert not segments(tmp_path)
