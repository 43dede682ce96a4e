"""What a rank on another host gets of mpirun's environment, and the address of its PMIx server."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.agent.environment import (
    CARRIED_PREFIXES,
    TCP_FLAGS,
    Endpoint,
    carried,
    moved,
    network_settings,
    server_endpoint,
    through_relay,
)
from chaos_mpi.errors import EngineError

#: As Open MPI 5.0.11 sets it.
GIVEN = {
    "PMIX_SERVER_URI41": "prterun-node-15240@0.0;tcp4://127.0.0.1:48023",
    "PMIX_SERVER_URI2": "prterun-node-15240@0.0;tcp4://127.0.0.1:48023",
    "PMIX_NAMESPACE": "prterun-node-15240@1",
    "PMIX_RANK": "0",
    "PMIX_SERVER_TMPDIR": "/tmp/ompi.15240",
    "OPAL_PREFIX": "/venv",
    "OMPI_FILE_LOCATION": "/tmp/ompi.15240/1/0",
    "OMPI_COMM_WORLD_RANK": "0",
    "CHAOS_RUN_DIR": "/tmp/run",
    "HOME": "/home/me",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "HF_HOME": "/data",
}
NAMES = st.one_of(
    st.text("ABCXYZ_", min_size=1), st.builds(str.__add__, st.sampled_from(CARRIED_PREFIXES), st.text("ABC_"))
)


def test_what_is_carried() -> None:
    assert set(carried(GIVEN, ["HF_HOME", "NOT_SET"])) == {
        "PMIX_SERVER_URI41", "PMIX_SERVER_URI2", "PMIX_NAMESPACE", "PMIX_RANK", "OPAL_PREFIX", "OMPI_COMM_WORLD_RANK",
        "CHAOS_RUN_DIR", "HF_HOME",
    }  # fmt: skip


@given(st.dictionaries(NAMES, st.text()))
def test_nothing_personal_is_carried(environ: dict[str, str]) -> None:
    found = carried(environ)
    assert found.items() <= environ.items()
    assert all(name.startswith(CARRIED_PREFIXES) for name in found)


def test_the_server_and_the_relay() -> None:
    assert server_endpoint(GIVEN) == ("127.0.0.1", 48023)
    changed = through_relay(GIVEN, Endpoint("127.0.0.1", 99))
    assert server_endpoint(changed) == ("127.0.0.1", 99)
    assert changed["PMIX_SERVER_URI2"] == "prterun-node-15240@0.0;tcp4://127.0.0.1:99"
    assert {name for name in GIVEN if GIVEN[name] != changed[name]} == {"PMIX_SERVER_URI41", "PMIX_SERVER_URI2"}
    assert server_endpoint({"HOME": "/"}) is None


@pytest.mark.parametrize("uri", ["", "a@0.0;tcp6://[::1]:5", "a@0.0;tcp4://127.0.0.1", "a@0.0;tcp4://127.0.0.1:70000"])
def test_an_address_that_is_none_is_refused(uri: str) -> None:
    for call in (server_endpoint, lambda environ: through_relay(environ, Endpoint("127.0.0.1", 1))):
        with pytest.raises(EngineError, match="PMIX_SERVER_URI4"):
            call({"PMIX_SERVER_URI4": uri})


def test_two_servers_are_refused() -> None:
    with pytest.raises(EngineError, match="several"):
        server_endpoint({"PMIX_SERVER_URI4": "a@0.0;tcp4://1.1.1.1:1", "PMIX_SERVER_URI3": "a@0.0;tcp4://1.1.1.1:2"})


def test_another_installation() -> None:
    environ = {"OPAL_PREFIX": "/venv", "A": "/venv/lib", "B": "/venv2", "C": "x/venv"}
    assert moved(environ, "/venv", "/opt/py") == {
        "OPAL_PREFIX": "/opt/py", "A": "/opt/py/lib", "B": "/venv2", "C": "x/venv",
    }  # fmt: skip


def test_no_shared_memory_between_hosts() -> None:
    assert network_settings(None) == {"btl": "self,tcp", "btl_tcp_flags": TCP_FLAGS}
    assert "put" not in TCP_FLAGS
    assert network_settings("10.1.0.0/16")["btl_tcp_if_include"] == "10.1.0.0/16"
