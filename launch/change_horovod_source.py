"""Changes that the source of Horovod 0.28.1 needs before it is built: ``change_horovod_source.py FOLDER``.

PyTorch's headers need C++17, the last release asks for C++14 (https://github.com/horovod/horovod/pull/3998 came after
it). The rest is for ranks that come and go:

* Horovod ignores what some calls of MPI return, so that a death in one of them, in most cases while Horovod starts,
  ends in a crash of the others, where it could end in an error that is dealt with.
* It asks MPI which ranks share a machine. Ranks of Open MPI do not know that of one that was started later by another
  rank, so some would say yes and some no, and wait for each other for ever. The names of their hosts tell it as well.
"""

from __future__ import annotations

import sys
from pathlib import Path

_STANDARD = ("set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 17)")

#: A failed call leaves no communicator, and no thread goes on with one that is not there.
_CHECKED_COMMUNICATORS = """
namespace {
void Check(int status, MPI_Comm* made, const char* what) {
  if (status != MPI_SUCCESS) {
    *made = MPI_COMM_NULL;
    throw std::runtime_error(std::string(what) + " failed");
  }
}

void SplitByHost(MPI_Comm comm, MPI_Comm* made) {
  int rank, size, length;
  MPI_Comm_rank(comm, &rank);
  MPI_Comm_size(comm, &size);
  std::vector<char> names(size * MPI_MAX_PROCESSOR_NAME);
  char name[MPI_MAX_PROCESSOR_NAME] = {0};
  MPI_Get_processor_name(name, &length);
  Check(PMPI_Allgather(name, MPI_MAX_PROCESSOR_NAME, MPI_CHAR, names.data(), MPI_MAX_PROCESSOR_NAME, MPI_CHAR, comm),
        made, "MPI_Allgather");
  int color = 0;
  while (std::string(&names[color * MPI_MAX_PROCESSOR_NAME]) != name) ++color;
  Check(PMPI_Comm_split(comm, color, rank, made), made, "MPI_Comm_split");
}
}  // namespace
#define MPI_Comm_dup(comm, made) Check(PMPI_Comm_dup(comm, made), made, "MPI_Comm_dup")
#define MPI_Comm_split(comm, color, key, made) \\
  Check(PMPI_Comm_split(comm, color, key, made), made, "MPI_Comm_split")
#define MPI_Comm_split_type(comm, type, key, info, made) SplitByHost(comm, made)
"""

_CHECKED_COLLECTIVES = """
namespace {
int Check(int status, const char* what) {
  if (status != MPI_SUCCESS) {
    throw std::runtime_error(std::string(what) + " failed");
  }
  return status;
}
}  // namespace
#define MPI_Allgather(...) Check(PMPI_Allgather(__VA_ARGS__), "MPI_Allgather")
#define MPI_Gather(...) Check(PMPI_Gather(__VA_ARGS__), "MPI_Gather")
#define MPI_Gatherv(...) Check(PMPI_Gatherv(__VA_ARGS__), "MPI_Gatherv")
#define MPI_Bcast(...) Check(PMPI_Bcast(__VA_ARGS__), "MPI_Bcast")
"""

_INCLUDES = '#include "../logging.h"\n'
_START = """    global_mpi_context.Initialize(mpi_ctx_manager);
    if (state.control_operation == LibType::MPI) {
      // Initializes global controller
      state.process_set_table.Initialize(global_mpi_context);
    }
"""
_GUARDED_START = f"""    try {{
{_START}    }} catch (const std::exception& ex) {{
      LOG(ERROR) << "Horovod could not be initialized: " << ex.what();
      state.process_set_table.Get(0).Finalize(SHUT_DOWN_ERROR);
      global_mpi_context.Finalize(mpi_ctx_manager);
      state.initialization_failed = true;
      return;
    }}
"""
_DUP = "  MPI_Comm_dup(comm[0], &global_mpi_context.global_comm);\n"
_CHECKED_DUP = """  if (MPI_Comm_dup(comm[0], &global_mpi_context.global_comm) != MPI_SUCCESS) {
    global_mpi_context.global_comm = MPI_COMM_NULL;
    return false;
  }
"""
_RESET = "    horovod_global.shut_down = false;\n    horovod_global.initialization_done = false;\n"

#: File, what stands there exactly once, and what is to stand there.
CHANGES: list[tuple[str, str, str]] = [
    ("CMakeLists.txt", *_STANDARD),
    # Debugging symbols are nine tenths of the package and a good part of the time that it takes to build.
    ("setup.py", "else 'RelWithDebInfo'", "else 'Release'"),
    ("horovod/torch/CMakeLists.txt", *_STANDARD),
    ("horovod/common/mpi/mpi_context.cc", _INCLUDES, _INCLUDES + _CHECKED_COMMUNICATORS),
    ("horovod/common/mpi/mpi_controller.cc", _INCLUDES, _INCLUDES + _CHECKED_COLLECTIVES),
    ("horovod/common/operations.cc", _START, _GUARDED_START),
    ("horovod/common/operations.cc", _DUP, _CHECKED_DUP),
    # So that a start that failed is not the last one.
    ("horovod/common/operations.cc", _RESET, _RESET + "    horovod_global.initialization_failed = false;\n"),
]


def main() -> None:
    """Make the changes, or none and say which one does not fit."""
    folder = Path(sys.argv[1])
    texts = {name: (folder / name).read_text() for name, _, _ in CHANGES}
    for name, old, new in CHANGES:
        if texts[name].count(old) != 1:
            sys.exit(f"{name} is not as in Horovod 0.28.1: it should have, once,\n{old}")
        texts[name] = texts[name].replace(old, new)
    for name, text in texts.items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
