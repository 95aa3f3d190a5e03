"""Devices by the names that a recipe has for them."""

from __future__ import annotations

import torch

from isthmus.errors import RecipeError

CPU = torch.device("cpu")


def find_device(name: str) -> torch.device:
    """The device of this name: ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` for a CUDA device if there is one.

    Raises:
        RecipeError: torch has no such device here.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda") if count else CPU
    device = torch.device(name)
    if device.type != "cuda" or (device.index or 0) < count:
        return device
    if torch.version.cuda is None and torch.version.hip is None:
        why, remedy = "this torch is built without CUDA", "install a build of torch for it (make TORCH=…, see README)"
    elif not count:
        why, remedy = "torch finds no CUDA device", "check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
    else:
        why, remedy = f"torch finds {count} CUDA devices, counted from 0", "name one of them"
    raise RecipeError(f"there is no device {name!r} here: {why}", remedy=f"{remedy}, or ask for 'cpu' or 'auto'")
