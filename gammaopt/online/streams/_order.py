r"""The order of one pass over n images: a permutation chosen by a key, evaluated where it is needed.

No array of indices is kept: for a pass over six million images that would be 48 MB for each seed. A bijection of
0 … 2^b − 1 ≥ n, rounds of

    x ← (x ⊕ k)·m mod 2^b  (m odd),    x ← x ⊕ (x ≫ b/2)

with k and m from the key, permutes 0 … n − 1 too: an image past the end is sent through again until it is inside
("cycle walking": Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).

On a disk, neighbours are cheap: :class:`Order` permutes blocks of neighbours, and then the images within a window of
several blocks, so that a window is read block by block and yet a batch has images of many blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gammaopt.online.streams._random import key

Indices: TypeAlias = npt.NDArray[np.int64]

ROUNDS = 4
WINDOW = 64  # blocks that are mixed with one another


def permute(index: Indices, size: int, chosen_by: int) -> Indices:
    """The permutation of 0 … ``size`` − 1 chosen by a 64-bit key, at each ``index``.

    Raises:
        IndexError: for an index outside, which would be sent round for ever.
    """
    if np.size(index) and not 0 <= np.min(index) <= np.max(index) < size:
        raise IndexError(f"places {np.min(index)} … {np.max(index)} are not all in 0 … {size - 1}")
    bits = max(2, (size - 1).bit_length())
    mask, shift = np.uint64(2**bits - 1), np.uint64((bits + 1) // 2)
    draws = [np.uint64(key(chosen_by, turn) & (2**64 - 1)) for turn in range(2 * ROUNDS)]
    result = np.asarray(index, np.int64).astype(np.uint64)
    walking = np.arange(result.size)
    flat = result.reshape(-1)
    while walking.size:
        x = flat[walking]
        for xor, odd in zip(draws[::2], draws[1::2], strict=True):
            x = ((x ^ xor) & mask) * (odd | np.uint64(1)) & mask
            x ^= x >> shift
        flat[walking] = x
        walking = walking[x >= np.uint64(size)]
    return result.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """Which image stands at which place of a pass, and which images are held out: never in any pass.

    Args:
        images: how many there are, n.
        held_out: how many of them, at least, to hold out; rounded up to whole blocks, and with the images of a last
            block that is not full.
        block: neighbours that stay together on the disk; 1 mixes all images with one another.
    """

    images: int
    held_out: int
    block: int = 1
    _held_blocks: int = field(init=False)
    _blocks: int = field(init=False)

    def __post_init__(self) -> None:
        blocks = self.images // self.block
        rest = self.images - blocks * self.block
        object.__setattr__(self, "_blocks", blocks)
        object.__setattr__(self, "_held_blocks", max(0, -(-(self.held_out - rest) // self.block)))

    @property
    def train(self) -> int:
        """Images of a pass."""
        return (self._blocks - self._held_blocks) * self.block

    def at(self, place: Indices, seed: int) -> Indices:
        """The images at places 0 … ``train`` − 1 of a seed's pass."""
        blocks = self._blocks - self._held_blocks
        if self.block == 1:
            return permute(self._held_blocks + permute(place, blocks, key("pass", seed)), self._blocks, 0)
        wide = WINDOW * self.block
        window, inside = np.divmod(place, wide)
        mixed = np.empty_like(inside)
        for w in np.unique(window):
            here = window == w
            mixed[here] = permute(inside[here], min(wide, self.train - int(w) * wide), key("window", seed, w))
        mixed += window * wide
        block, offset = np.divmod(mixed, self.block)
        shuffled = permute(block, blocks, key("pass", seed))
        return permute(self._held_blocks + shuffled, self._blocks, 0) * self.block + offset

    def held(self, place: Indices) -> Indices:
        """The held-out images; past their end it begins anew."""
        count = self.images - self.train
        place = place % count
        block, offset = np.divmod(place, self.block)
        inside = block < self._held_blocks
        images = self._blocks * self.block + place - self._held_blocks * self.block  # the last block, if not full
        images[inside] = permute(block[inside], self._blocks, 0) * self.block + offset[inside]
        return images
