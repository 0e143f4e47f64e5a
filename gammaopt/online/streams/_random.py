r"""Random numbers that are a function of (key, counter): made on any device, the same on every one.

    word(key, i) = mix(key + (i + 1)·φ)    mod 2^64

mix is the finaliser of SplitMix64 and φ its odd constant, 2^64 over the golden ratio. There is no state, so a batch
needs no generator and a GPU makes its own.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
EVERY_OTHER_BYTE = 0x00FF00FF00FF00FF


def _signed(word: int) -> int:
    """The int64 with the same 64 bits."""
    word &= 2**64 - 1
    return word - 2**64 if word >= 2**63 else word


def key(*parts: object) -> int:
    """A 64-bit key from anything that prints: keys that differ in any part give unrelated numbers."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def keys(seed: int, start: int, stop: int, split: str, device: torch.device, purpose: str = "") -> Tensor:
    """Keys of the batches ``start`` … ``stop`` − 1 of a seed, (steps,) int64."""
    return torch.tensor([key(seed, step, split, purpose) for step in range(start, stop)], device=device)


def mix(words: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place: a bijection of int64 whose every output bit depends on every input bit."""
    words ^= (words >> 30) & (2**34 - 1)  # the shift of a signed word brings in its sign: cut it off
    words *= _signed(FIRST)
    words ^= (words >> 27) & (2**37 - 1)
    words *= _signed(SECOND)
    words ^= (words >> 31) & (2**33 - 1)
    return words


def words(keys: Tensor, count: int) -> Tensor:
    """``count`` random words for each key: (k,) int64 → (k, count) int64, all 64 bits random."""
    counter = torch.arange(1, count + 1, device=keys.device) * _signed(GOLDEN)
    return mix(keys[:, None] + counter)


def bits(keys: Tensor, count: int) -> Tensor:
    """``count`` random bits for each key, (k, count) int64 of 0 and 1."""
    packed = words(keys, -(-count // 64))
    shifts = torch.arange(64, device=keys.device)
    return ((packed[..., None] >> shifts) & 1).flatten(1)[:, :count]


def uniforms(keys: Tensor, count: int) -> Tensor:
    """``count`` uniform numbers in [0, 1) for each key, (k, count) float32, multiples of 2^-24."""
    return ((words(keys, count) >> 40) & (2**24 - 1)).to(torch.float32) * 2.0**-24


def integers(keys: Tensor, count: int, high: int) -> Tensor:
    """``count`` whole numbers in 0 … ``high`` − 1 < 2^31 for each key, (k, count) int64; even to ``high``/2^32."""
    return (((words(keys, count) >> 32) & (2**32 - 1)) * high) >> 32


def normals(keys: Tensor, count: int) -> Tensor:
    """``count`` standard normal numbers for each key, (k, count) float32, by Box and Muller's two from two.

    Reckoned in float64 and rounded once, so that two processors differ in one number of some 10^8.
    """
    pairs = words(keys, -(-count // 2))
    radius = (((pairs >> 32) & (2**32 - 1)).to(torch.float64) + 0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = (pairs & (2**32 - 1)).to(torch.float64).mul_(2 * math.pi * 2.0**-32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1)[:, :count].to(torch.float32)


def triangular(keys: Tensor, count: int) -> Tensor:
    """``count`` numbers of mean 0 and variance 1 for each key, (k, count) float32: the sum of two random bytes.

    Four for each word and no transcendental function: for the noise on pixels.
    """
    pairs = words(keys, -(-count // 4))
    sums = (pairs & EVERY_OTHER_BYTE) + ((pairs >> 8) & EVERY_OTHER_BYTE)
    deviation = math.sqrt(2 * (256**2 - 1) / 12)
    return sums.view(torch.int16)[:, :count].to(torch.float32).sub_(255.0).mul_(1 / deviation)
