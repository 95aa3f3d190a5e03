"""Keys: which are accepted, and which files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import IdentityError
from isthmus.gateway.api_keys import SHORTEST_KEY, ApiKeys

KEYS = ["the-first-of-the-keys", "the-second-of-the-keys"]


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.touch(mode=mode)
    path.chmod(mode)
    path.write_text(text)
    return path


def test_each_key_of_a_file_is_accepted(tmp_path: Path) -> None:
    keys = ApiKeys.read(write(tmp_path / "keys", f"# ours\n\n {KEYS[0]} \r\n{KEYS[1]}"))
    assert [keys.owner(f"Bearer {key}") for key in KEYS] == [1, 2]
    assert keys.owner(f"bearer  {KEYS[0]}") == 1
    for wrong in ("", "Bearer", "Bearer ", KEYS[0], f"Basic {KEYS[0]}", "Bearer # ours", f"Bearer {KEYS[0]} {KEYS[1]}"):
        assert keys.owner(wrong) is None


@given(st.text(max_size=40))
def test_nothing_else_is(text: str) -> None:
    assert (ApiKeys(KEYS).owner(f"Bearer {text}") is not None) == (text.strip() in KEYS)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o602, 0o610, 0o644, 0o777])
def test_a_file_that_others_may_read_or_write_is_refused(mode: int, tmp_path: Path) -> None:
    path = write(tmp_path / "keys", KEYS[0], mode)
    with pytest.raises(IdentityError, match=f"mode {mode:03o}") as found:
        ApiKeys.read(path)
    assert f"chmod 600 {path}" in found.value.remedy
    path.chmod(0o400)
    assert ApiKeys.read(path).owner(f"Bearer {KEYS[0]}") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "holds no key"), ("# a-comment-that-is-long\n", "holds no key"), ("a" * (SHORTEST_KEY - 1), "fewer than 16")],
)
def test_a_file_without_good_keys_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=said):
        ApiKeys.read(write(tmp_path / "keys", text))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").touch(mode=0o600)
    (tmp_path / "bytes").write_bytes(b"\xff" * 20)
    for path in (tmp_path / "absent", tmp_path, tmp_path / "bytes"):
        with pytest.raises(IdentityError, match="cannot be read"):
            ApiKeys.read(path)
