"""Which examples are held out: a rule on the example itself, so that no seed, order or size can move it."""

import hashlib


def held_out(key: str, share: float) -> bool:
    """Whether the example that `key` identifies belongs to the held-out `share` (0 to 1) of all examples.

    Python's own hash() changes from process to process; this does not.
    """
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
