"""isthmus: several silos fine-tune and use one language model that none of them holds whole."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read as gRPC is imported; errors here say what its lines say

from isthmus.errors import IsthmusError
from isthmus.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["IsthmusError", "Recipe", "__version__", "join", "open"]


def __getattr__(name: str) -> object:
    if name == "join":  # imports torch and transformers: only for those who use it
        from isthmus.silo.join import join

        return join
    if name == "open":
        from isthmus.engines.opening import open_run

        return open_run
    raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
