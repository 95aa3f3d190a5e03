"""Addresses: what is none is named, in recipes and options alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.errors import RecipeError
from isthmus.recipe.address import address_problem, checked_address, is_loopback
from tests.conftest import make_recipe

GOOD = [
    "localhost:7001",
    "example.org:1",
    "127.0.0.1:65535",
    "[::1]:7001",
    "[fe80::1]:9",
    "a-b_c.d:80",
    "example.org.:7",
]
BAD = {
    "example.org": "such as 'example.org:7001'",
    "": "such as 'example.org:7001'",
    "host:": "a port from 1 to 65535",
    ":50051": "'0.0.0.0:50051' to listen everywhere",
    "::1": r"in brackets, such as '\[::1\]:7001'",
    "fe80::1:7001": "in brackets",
    "[::1]": r"in brackets, such as '\[::1\]:7001'",
    "[nonsense]:7": "an IPv6 address in the brackets",
    "[127.0.0.1]:7": "an IPv6 address in the brackets",
    "http://example.org:80": "without http://",
    "https://example.org": "without https://",
    "host:0": "a port from 1 to 65535",
    "host:70000": "a port from 1 to 65535",
    "host:-1": "a port from 1 to 65535",
    "host:seven": "a port from 1 to 65535",
    "host:٧٠": "a port from 1 to 65535",
    "host name:80": "without spaces",
    "host:80 ": "without spaces",
    "host:80\n": "without spaces",
    "ex/ample:80": "a host of letters",
    "-host:80": "a host of letters",
    "höst:80": "a host of letters",
    "a:b:80": "a host of letters",
    "host:80/path": "a port from 1 to 65535",
}


@pytest.mark.parametrize("address", GOOD)
def test_an_address(address: str) -> None:
    assert address_problem(address) is None
    assert checked_address(address) == address
    assert make_recipe(Path("m"), trunk={"address": address}).trunk.address == address


@pytest.mark.parametrize("address", BAD)
def test_no_address(address: str) -> None:
    with pytest.raises(RecipeError, match=f"expected .*{BAD[address]}") as caught:
        checked_address(address)
    assert repr(address) in caught.value.message
    edge = {"name": "e", "address": address, "silos": ["a"]}
    for key, sections in (
        ("trunk.address", {"trunk": {"address": address}}),
        ("root.address", {"root": {"address": address}}),
        ("edge.0.address", {"edge": [edge]}),
    ):
        with pytest.raises(RecipeError, match=f"{key} = .*expected .*{BAD[address]}") as caught:
            make_recipe(Path("m"), **sections)
        assert caught.value.remedy == f"correct the value of {key}"


def test_a_free_port_is_asked_for_by_0_where_one_listens() -> None:
    assert checked_address("localhost:0", any_port=True) == "localhost:0"
    with pytest.raises(RecipeError):
        checked_address("localhost:65536", any_port=True)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("localhost:1", True),
        ("LOCALHOST.:1", True),
        ("a.localhost:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", True),
        ("[::]:1", True),
        ("example.org:1", False),
        ("localhost.example.org:1", False),
        ("10.0.0.1:1", False),
        ("[fe80::1]:1", False),
    ],
)
def test_what_is_on_this_machine(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected
