"""Decide which examples are held out, by a rule on the example itself: no seed, order or size can move it."""

import hashlib


def held_out(key: str, share: float) -> bool:
    """Return True if the example identified by `key` belongs to the held-out `share` (0 to 1) of all examples."""
    digest = hashlib.sha256(key.encode()).digest()  # unlike hash(), the same in every process
    return int.from_bytes(digest[:8], "big") < share * 2**64
