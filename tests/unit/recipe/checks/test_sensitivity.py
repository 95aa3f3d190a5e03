"""Sensitive fields are fields of the templates."""

from __future__ import annotations

import pytest

from tests.unit.recipe.refusals import Changes, assert_mended


@pytest.mark.parametrize("mended", [{"sensitivity.fields": {"prompt": "high"}}, {"task.prompt": "{text}"}], ids=str)
def test_a_field_that_no_template_uses_is_refused(mended: Changes) -> None:
    asked = {"sensitivity": {"fields": {"text": "high"}, "classes": {"high": {}}}}
    reason, remedy = "sensitivity.fields: no template has 'text'", "use one of: answer, prompt"
    assert_mended((asked, reason, remedy, mended))
