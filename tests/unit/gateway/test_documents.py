"""What the document says of answers: every shape is closed by the tests of ``app`` and ``responses``."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from isthmus.gateway.documents import ErrorBody, PrivacyBody


def test_an_error_has_openais_four_fields() -> None:
    error = {"message": "m", "type": "t", "param": None, "code": None}
    ErrorBody.model_validate({"error": error})
    for name in error:
        with pytest.raises(ValidationError):
            ErrorBody.model_validate({"error": {key: value for key, value in error.items() if key != name}})


def test_an_epsilon_may_have_no_bound() -> None:
    body = {"releases": 1, "bytes": 2, "epsilon": None, "delta": 1e-5}
    assert PrivacyBody.model_validate(body).epsilon is None
    assert PrivacyBody.model_validate(body | {"epsilon": 0.5}).epsilon == 0.5
