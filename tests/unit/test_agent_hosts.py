"""Lists of hosts on the command line and in files, and which rank goes where."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos_mpi.agent.hosts import Host, parse_host_list, parse_hostfile, place
from chaos_mpi.errors import ConfigError

HOSTS = st.dictionaries(
    st.from_regex(r"([a-z]+@)?[a-z0-9]([a-z0-9.-]{0,10}[a-z0-9])?", fullmatch=True), st.integers(1, 99), min_size=1
)


@given(HOSTS)
def test_both_forms_say_the_same(slots: dict[str, int]) -> None:
    expected = tuple(Host(host, count) for host, count in slots.items())
    assert parse_host_list(",".join(f"{host}:{count}" for host, count in slots.items())) == expected
    lines = "\n\n# all\n".join(f"  {host}  slots = {count} # {host}" for host, count in slots.items())
    assert parse_hostfile(lines, "hosts") == expected


def test_slots_that_are_not_given_and_hosts_named_twice() -> None:
    assert parse_host_list("edge1:1, edge2:2,edge3") == (Host("edge1", 1), Host("edge2", 2), Host("edge3", 1))
    assert parse_host_list("a,b,a") == (Host("a", 2), Host("b", 1))
    assert parse_hostfile("a\nb slots=2\na slots=3\n", "f") == (Host("a", 4), Host("b", 2))
    assert parse_hostfile("a slots=2 max-slots=4\nb max_slots=1", "f") == (Host("a", 2, 4), Host("b", 1, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a host is missing"),
        ("a,,b", "a host is missing"),
        ("a:", "slots is a number from 1, not ''"),
        ("a:0", "not '0'"),
        ("a:-1", "not '-1'"),
        ("a:²", "not '²'"),
        ("a:*", "not"),
        ("a b", "'a b' is not the name of a host"),
        ("-oProxyCommand=x", "not the name"),
        ("a;rm", "not the name"),
        ("^a", "has no use"),
    ],
)
def test_lists_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="--hosts") as refused:
        parse_host_list(text)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a:2", "'HOST slots=N'"),
        ("a slots", "'slots' is not understood"),
        ("a slots=", "slots is a number"),
        ("a slots=two", "not 'two'"),
        ("a slots=1 slots=1", "slots is given twice"),
        ("a slots=4 max-slots=2", "max-slots=2 is less"),
        ("a cpus=4", "'cpus=4' is not understood"),
        ("+n1", "has no use"),
        ("a@b@c", "not the name"),
    ],
)
def test_files_that_are_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match="nodes, line 2") as refused:
        parse_hostfile(f"# nodes\n{line}\n", "nodes")
    assert message in str(refused.value)


def test_files_without_hosts_or_with_contradictions() -> None:
    with pytest.raises(ConfigError, match="names no host"):
        parse_hostfile("# nothing\n", "nodes")
    with pytest.raises(ConfigError, match="in one place"):
        parse_hostfile("a max-slots=2\na\n", "nodes")
    with pytest.raises(ConfigError, match="taken together"):
        parse_hostfile("a max-slots=1\na max-slots=1\n", "nodes")


def test_ranks_fill_hosts_in_their_order() -> None:
    hosts = parse_host_list("a:2,b:1")
    assert place(hosts) == ("a", "a", "b")
    assert place(hosts, 2) == ("a", "a")
    with pytest.raises(ConfigError, match="4 ranks need as many slots, but a:2, b:1 have 3"):
        place(hosts, 4)
