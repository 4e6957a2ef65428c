"""Decide which examples are held out, by a rule on the example itself: no seed, order or size can move it."""

import hashlib


def digest64(text: str) -> int:
    """First 64 bits of the sha256 of `text`. Unlike hash(), the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def held_out(key: str, share: float) -> bool:
    """Return True if the example identified by `key` belongs to the held-out `share` (0 to 1) of all examples."""
    return digest64(key) < share * 2**64
