"""``[federation.clip]``: wrong values, and keys of a clip that adapts."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.recipe.refusals import OUT, Changes, assert_mended, changed, least, refused

BASE = {"federation.secure": True, "federation.weights": "equal", "federation.noise": {"multiplier": 1.0}}


@pytest.mark.parametrize("mended", [OUT, 0.5], ids=["without it", "with quantile"])
@pytest.mark.parametrize("key", ["rate", "norms"])
def test_a_clip_that_stays_takes_no_rate(key: str, mended: Any) -> None:
    asked = BASE | {"federation.clip": {"norm": 0.5, key: 0.5}}
    reason = f"federation.clip.{key}: only a clip that adapts takes it"
    changes: Changes = {f"federation.clip.{key}": OUT} if mended is OUT else {"federation.clip.quantile": mended}
    assert_mended((asked, reason, "add quantile", changes))


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"norm": 0.0}, "norm"),
        ({"norm": 1e13}, "norm"),
        ({"norm": 0.5, "quantile": 1.0}, "quantile"),
        ({"norm": 0.5, "quantile": 0.5, "norms": 1.0}, "norms"),
        ({"norm": 0.5, "quantile": 0.5, "rate": 0.0}, "rate"),
    ],
    ids=str,
)
def test_a_wrong_value_names_its_key(value: dict[str, Any], key: str) -> None:
    assert refused(changed(least(), BASE | {"federation.clip": value})).message.startswith(f"federation.clip.{key} = ")
