"""Random numbers as a pure function of a key: the same on every machine, rank and version."""

from __future__ import annotations

import hashlib
import struct

_WORD = 2**64
# Most samples need fewer numbers than one block of the hash holds.
_BLOCK_WORDS = 16


class Draws:
    """A stream of random numbers that belongs to a key.

    The numbers are the output of SHAKE-128 over the key and a counter, so no generator's algorithm
    can change them.

    Args:
        key: the parts of the key, such as seed, epoch and row.
    """

    __slots__ = ("_block", "_key", "_next", "_words")

    def __init__(self, *key: object) -> None:
        self._key = "|".join(map(str, key)).encode("utf-8", "surrogatepass")
        self._block = 0
        self._words: tuple[int, ...] = ()
        self._next = 0

    def uniform(self) -> float:
        """Returns a number in [0, 1)."""
        return (self._word() >> 11) * 2.0**-53

    def below(self, count: int) -> int:
        """Returns an integer in [0, count)."""
        return self._word() * count // _WORD

    def places(self, count: int, *, chance: float) -> list[int]:
        """Returns those of `count` places which a coin with this chance picks, in order."""
        bound = int(chance * _WORD)
        return [place for place, word in enumerate(self._take(count)) if word < bound]

    def permutation(self, count: int) -> list[int]:
        """Returns a permutation of range(count) by Fisher and Yates."""
        order = list(range(count))
        for last in range(count - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def _word(self) -> int:
        if self._next == len(self._words):
            self._refill()
        word = self._words[self._next]
        self._next += 1
        return word

    def _take(self, count: int) -> tuple[int, ...]:
        """Returns the next words, the same as one after the other, but quicker."""
        taken = self._words[self._next : self._next + count]
        self._next += len(taken)
        while len(taken) < count:
            self._refill()
            more = self._words[: count - len(taken)]
            self._next = len(more)
            taken += more
        return taken

    def _refill(self) -> None:
        # The block's number has a fixed length, so that no key can imitate another block.
        state = hashlib.shake_128(self._block.to_bytes(8, "little") + self._key)
        self._words = struct.unpack(f"<{_BLOCK_WORDS}Q", state.digest(8 * _BLOCK_WORDS))
        self._next = 0
        self._block += 1
