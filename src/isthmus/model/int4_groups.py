"""Weights of 4 bits in groups, as torch's kernel for processors has them: rounded, packed, and computed back.

A weight is a whole number from -8 to 7 times its group's scale, plus its group's zero. A group is neighbours of a row.

Shapes: N rows of a weight (outputs), K its columns (inputs), G groups of a row, S columns of a group, B rows of a block
of the packed order, H bytes with a pair of numbers each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

SIZES = (64, 32)
"""Columns of a group: the first that divides a row. Scale and zero add 32 bits a group: 4.5 bits a weight, or 5."""
ROWS = 16
"""The kernel takes multiples of as many rows."""
REFITS = 4
ROWS_AT_ONCE = 256
"""Rows that are rounded at once: what is computed for it then is small."""


def group_size(columns: int) -> int:
    """Columns of a group of a row; 0: the row cannot be divided."""
    return next((size for size in SIZES if columns % size == 0), 0)


def quantize(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to what the kernel takes: packed numbers ``[N, H]`` in bytes, and the scale and the zero of each
    group, ``[G, N, 2]`` in bfloat16."""
    size = group_size(weight_NK.shape[1])
    pieces = [round_groups(rows.float().view(len(rows), -1, size)) for rows in torch.split(weight_NK, ROWS_AT_ONCE)]
    packed_NH = pack(torch.cat([one.whole_NGS.flatten(1).to(torch.int8) for one in pieces]) + 8)
    scale_zero_NG2 = torch.cat([torch.stack([one.scale_NG, one.zero_NG], dim=-1) for one in pieces])
    return packed_NH, scale_zero_NG2.transpose(0, 1).to(torch.bfloat16).contiguous()


def dequantize(packed_NH: torch.Tensor, scale_zero_GN2: torch.Tensor) -> torch.Tensor:
    """The weights that ``quantize`` rounded to, ``[N, K]``, fp32."""
    whole_NGS = unpack(packed_NH).float().sub_(8).view(len(packed_NH), len(scale_zero_GN2), -1)
    scale_NG1, zero_NG1 = scale_zero_GN2.float().permute(2, 1, 0)[..., None]
    weight_NGS: torch.Tensor = whole_NGS.mul_(scale_NG1).add_(zero_NG1)
    return weight_NGS.flatten(1)


@dataclass(frozen=True)
class Groups:
    """Rounded weights.

    Args:
        whole_NGS: whole numbers from -8 to 7, as fp32.
        scale_NG, zero_NG: numbers of bfloat16, as fp32.
        error_NG: sum of the squared differences from the weights.
    """

    whole_NGS: torch.Tensor
    scale_NG: torch.Tensor
    zero_NG: torch.Tensor
    error_NG: torch.Tensor

    def or_better(self, other: Groups) -> Groups:
        """Of each group the one with the smaller error."""
        better_NG = other.error_NG < self.error_NG
        return Groups(
            torch.where(better_NG[..., None], other.whole_NGS, self.whole_NGS),
            torch.where(better_NG, other.scale_NG, self.scale_NG),
            torch.where(better_NG, other.zero_NG, self.zero_NG),
            torch.where(better_NG, other.error_NG, self.error_NG),
        )


def round_groups(weight_NGS: torch.Tensor, *, refits: int = REFITS) -> Groups:
    """Round weights in fp32: each group between its least and greatest weight, then closer.

    A refit takes the scale and the zero that are the least squares of the weights on their whole numbers, and rounds
    again. It is kept where it is closer.
    """
    low_NG, high_NG = weight_NGS.aminmax(dim=-1)
    scale_NG = _narrow((high_NG - low_NG) / 15)
    groups = _rounded(weight_NGS, scale_NG, _narrow(low_NG + 8 * scale_NG))
    for _ in range(refits):
        groups = groups.or_better(_rounded(weight_NGS, *_least_squares(weight_NGS, groups.whole_NGS)))
    return groups


def _rounded(weight_NGS: torch.Tensor, scale_NG: torch.Tensor, zero_NG: torch.Tensor) -> Groups:
    scale_NG = torch.where(scale_NG == 0, 1.0, scale_NG)
    whole_NGS = ((weight_NGS - zero_NG[..., None]) / scale_NG[..., None]).round_().clamp_(-8, 7)
    error_NGS = torch.addcmul(zero_NG[..., None], whole_NGS, scale_NG[..., None]).sub_(weight_NGS)
    return Groups(whole_NGS, scale_NG, zero_NG, error_NGS.square_().sum(dim=-1))


def _least_squares(weight_NGS: torch.Tensor, whole_NGS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight_NG, whole_NG = weight_NGS.mean(dim=-1), whole_NGS.mean(dim=-1)
    centred_NGS = whole_NGS - whole_NG[..., None]
    spread_NG = centred_NGS.square().sum(dim=-1)
    scale_NG = _narrow((centred_NGS * weight_NGS).sum(dim=-1) / spread_NG.where(spread_NG > 0, 1.0))
    return scale_NG, _narrow(weight_NG - scale_NG * whole_NG)


def _narrow(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.to(torch.bfloat16).float()


def pack(whole_NK: torch.Tensor) -> torch.Tensor:
    """Whole numbers from 0 to 15 in the order of this processor's kernel, ``[N, K / 2]``, bytes."""
    packed_NH: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole_NK.int().contiguous(), 1)
    return packed_NH


def unpack(packed_NH: torch.Tensor) -> torch.Tensor:
    """What was packed, ``[N, K]``, bytes."""
    rest = len(packed_NH) % _block()
    blocks, last = packed_NH[: len(packed_NH) - rest], packed_NH[len(packed_NH) - rest :]
    return torch.cat([_unpacked(one, rows) for one, rows in ((blocks, _block()), (last, rest)) if rows])


def _unpacked(packed_NH: torch.Tensor, block: int) -> torch.Tensor:
    """Rows of blocks. A block's bytes are those of its first column, of its second, and so on."""
    columns = 2 * packed_NH.shape[1]
    pairs = packed_NH.view(-1, columns, block // 2).transpose(1, 2)
    return torch.cat([pairs & 15, pairs >> 4], dim=1).index_select(1, _order(block)).view(-1, columns)


@cache
def _block() -> int:
    """Rows whose numbers of a column this processor's kernel has side by side: 64 with AVX-512, 32 with AVX2."""
    columns_NK = (torch.arange(32) % 16).expand(64, 32)
    return 2 * int(pack(columns_NK).flatten().nonzero()[0])


@cache
def _order(rows: int) -> torch.Tensor:
    """Where each row of a block is among the low halves of a column's bytes and, after them, the high ones.

    It is read off a packed block with the rows' numbers, of which a half of a byte holds 4 bits.
    """
    numbers_NK = torch.arange(rows)[:, None].expand(rows, 32)
    found = torch.zeros(rows, dtype=torch.long)
    for bits in (0, 4):
        pairs = pack(numbers_NK >> bits & 15).flatten()[: rows // 2].long()
        found += torch.cat([pairs & 15, pairs >> 4]) << bits
    return found.argsort()
