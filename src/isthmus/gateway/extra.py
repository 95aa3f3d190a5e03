"""The optional dependencies of the gateway, as the extra ``gateway`` of ``pyproject.toml`` lists them."""

from __future__ import annotations

from importlib.util import find_spec

from isthmus.errors import RunError

SERVER_PACKAGES = ("fastapi", "llguidance", "starlette", "uvicorn")


def require_server() -> None:
    """Check that the extra ``gateway`` is installed.

    Raises:
        RunError: a package of it is missing.
    """
    missing = [package for package in SERVER_PACKAGES if find_spec(package) is None]
    if missing:
        raise RunError(
            f"the gateway needs packages that are not installed: {', '.join(missing)}",
            remedy="install them with: pip install 'isthmus[gateway]'",
        )
