"""Torch devices by their names in a recipe."""

from __future__ import annotations

import torch

from isthmus.errors import RecipeError

CPU = torch.device("cpu")


def find_device(name: str) -> torch.device:
    """The device named ``cpu``, ``cuda`` or ``cuda:1``; ``auto`` is a CUDA device if there is one, otherwise the CPU.

    Raises:
        RecipeError: torch does not find this device.
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
        why, remedy = f"torch finds {count} CUDA devices, numbered from 0", "name one of these"
    raise RecipeError(
        f"there is no device {name!r} here: {why}", remedy=f"{remedy}, or set the device to 'cpu' or 'auto'"
    )
