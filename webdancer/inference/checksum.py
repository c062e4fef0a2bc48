"""A checksum of a tensor's bytes that is computed where the tensor lies: what the learner sends directly is proven on what arrived.

Of words w_i of 8 bytes: the sum over i of fold(w_i x odd_i) x odd'_i, modulo 2^64, with two random odd numbers for each place; fold(x) is
x with its upper half xored into the lower, so that the sum is not linear in the words and sees two that changed places. Any one word that
differs changes it for certain, and of a part that is missing, stale, shifted or swapped hardly ever one goes unseen. It is no defence
against intent: learner and engines are one program. No copy to the host, which sha256 would need.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from webdancer.errors import DataError

BLOCK = 1 << 20
"""Words that are multiplied at once: 8 MiB beside the tensor."""
_STEP = 0x5851F42D4C957F2D  # odd; moves a block's sum before the next one is added, so that blocks cannot change places


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """int64 [] on the tensor's device, in its current stream: nothing waits for it here."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words, rest = divmod(data.numel(), 8)
    if data.storage_offset() % 8:
        data = data.clone()  # a slice of a packed buffer may begin anywhere
    whole = data[: 8 * words].view(torch.int64)
    odd, other_odd = _places(tensor.device)
    total = torch.full((), data.numel(), dtype=torch.int64, device=tensor.device)
    for block in torch.split(whole, BLOCK):
        product = block * odd[: len(block)]
        product.bitwise_xor_((product >> 32).bitwise_and_(0xFFFF_FFFF))
        total = total * _STEP + product.mul_(other_odd[: len(block)]).sum()
    if rest:
        last = torch.zeros(8, dtype=torch.uint8, device=tensor.device)
        last[:rest] = data[8 * words :]
        total = total * _STEP + last.view(torch.int64)[0]
    return total


def numbers(sums: Mapping[str, Tensor]) -> dict[str, int]:
    """All of them at once: one copy from the device."""
    if not sums:
        return {}
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))


def check(sent: Mapping[str, int], received: Mapping[str, int]) -> None:
    """Raises DataError naming the first tensor that did not arrive as it was sent."""
    for name in sorted(sent.keys() | received.keys()):
        if name not in received:
            raise DataError(f"weights: {name} must arrive, as it was sent, got nothing")
        if name not in sent:
            raise DataError(f"weights: {name} must be among what was sent, got it all the same")
        if sent[name] != received[name]:
            raise DataError(f"weights: {name} must have the checksum of what was sent, {_spell(sent[name])}, got {_spell(received[name])}")


@cache
def _places(device: torch.device) -> Tensor:
    """[2, BLOCK] odd numbers, the same everywhere."""
    generator = torch.Generator().manual_seed(2505)
    return torch.randint(-(2**63), 2**63 - 1, (2, BLOCK), generator=generator, dtype=torch.int64).bitwise_or(1).to(device)


def _spell(number: int) -> str:
    return f"{number % 2**64:016x}"
