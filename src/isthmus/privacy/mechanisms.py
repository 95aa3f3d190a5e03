"""The mechanisms that secure a tensor before it leaves."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import torch

from isthmus.recipe import ReleaseSection


@dataclass(frozen=True)
class Gaussian:
    """Clip each row to an L2 norm, then add N(0, noise²) to every coordinate. Zero switches either off."""

    clip: float
    noise: float

    @classmethod
    def of(cls, section: ReleaseSection) -> Gaussian:
        return cls(section.clip, section.noise)

    def apply(
        self, h_TD: torch.Tensor, generator: torch.Generator, factors_T: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The secured tensor, in float32 ``[T, D]``.

        Args:
            factors_T: by what each row's noise is multiplied; None: 1.
        """
        h_TD = h_TD.detach().to(torch.float32)
        if self.clip:
            norms = h_TD.norm(dim=1, keepdim=True).clamp_min(1e-30)
            h_TD = h_TD * (self.clip / norms).clamp_max(1.0)
        if self.noise:
            draw = torch.randn(h_TD.shape, generator=generator, device=generator.device)
            if factors_T is not None:
                draw *= factors_T.to(draw).unsqueeze(1)
            h_TD = h_TD + self.noise * draw.to(h_TD.device)
        return h_TD


def secret_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by the operating system's entropy, apart from torch's global one."""
    return torch.Generator(device).manual_seed(secrets.randbits(63))
