"""The optional dependencies of attacks, as the extra ``audit`` of ``pyproject.toml`` lists them."""

from __future__ import annotations

from importlib.util import find_spec

from isthmus.errors import AttackError

PACKAGES = {
    "rouge_score": "rouge-score",
    "sacrebleu": "sacrebleu",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
}
"""Distribution by module."""


def require_extra() -> None:
    """Check that the extra ``audit`` is installed.

    Raises:
        AttackError: a package of it is missing.
    """
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise AttackError(
            f"attacks need packages that are not installed: {', '.join(missing)}",
            remedy="install them with: pip install 'isthmus[audit]'",
        )
