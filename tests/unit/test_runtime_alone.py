"""A script without a launcher, as one that is tried out."""

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


def test_a_process_without_a_launcher_leaves_no_shared_memory_behind(tmp_path: Path) -> None:
    # Of all processes of the machine that use the usual directory, only this one is to be seen.
    ours = ("OMPI_", "PMIX_", "CHAOS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment["OMPI_MCA_btl_sm_backing_directory"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, timeout=60, check=True)
    assert not segments(tmp_path)
    refused = [sys.executable, "-c", "import chaos_mpi; chaos_mpi.init()"]
    environment |= {
        "TORCHELASTIC_RUN_ID": "1",
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    ended = subprocess.run([*refused], env=environment, timeout=60, check=False, capture_output=True, text=True)
    assert "was started by" in ended.stderr
    assert not segments(tmp_path)
