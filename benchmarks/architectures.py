"""Additions to the model's architecture that `benchmarks.ablation` weighs; the product does without them.

Each was found in speedruns of GPT-2 (https://github.com/KellerJordan/modded-nanogpt), and a later version of nanochat
has all of them. A checkpoint with any of them would not load in transformers, so they live here: `AblationGPT` is
nanochat.model.gpt.GPT with some of them on, and with none of them the same to the bit.
"""

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.model.gpt import GPT, Attention, AttentionCache, Block, GPTConfig, Linear, rms_norm, rotate_and_norm
from nanochat.train.optim import MuonAdamW, OptimizerOptions

GATE_CHANNELS = 32
"""of the stream that a gate reads, fewer than any model has"""
SHORT_WINDOW_SHARE = 4
"""A short window is the context over this."""
SHORT_WINDOW_PERIOD = 4
"""One layer in so many sees the whole context, and the last one always."""


@dataclass(frozen=True)
class Additions:
    """Which additions a model has."""

    value_embeddings: bool = False
    """in every other layer and the last, a second embedding of the token is added to attention's values, gated"""
    scales: bool = False
    """before each layer: learned scalars times the residual stream and times the normalised embedding x0"""
    smear: bool = False
    """a gated part of the previous token's embedding is added to each token's"""
    windows: bool = False
    """three layers of four see the last quarter of the context alone"""


VARIANTS = {
    "plain": Additions(),
    "value-embeddings": Additions(value_embeddings=True),
    "scales": Additions(scales=True),
    "smear": Additions(smear=True),
    "windows": Additions(windows=True),
    "all": Additions(value_embeddings=True, scales=True, smear=True, windows=True),
}


class ValueEmbedding(nn.Module):
    """A vector of each token for the values of one layer, times a gate for each head that reads the stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.n_kv_head * config.head_dim)
        self.gate = Linear(GATE_CHANNELS, config.n_kv_head)
        nn.init.normal_(self.table.weight, std=config.n_embd**-0.5)
        nn.init.zeros_(self.gate.weight)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        """tokens: (B, T); x: (B, T, C) -> (B, T, H_kv, D) in the dtype of x. The gate starts at 1."""
        gate = 2 * torch.sigmoid(self.gate(x[..., :GATE_CHANNELS])).unsqueeze(-1)
        return gate * self.table(tokens).to(x.dtype).view(*gate.shape[:-1], -1)


class Smear(nn.Module):
    """x[t] + strength * gate(x[t]) * x[t - 1]: a bigram's worth of context before the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(1))
        self.gate = Linear(GATE_CHANNELS, 1)
        nn.init.zeros_(self.gate.weight)

    def forward(self, x: Tensor, before: Tensor | None) -> Tensor:
        """x: (B, T, C); before: (B, 1, C), the embedding before the first of them, or None where there is none."""
        previous = torch.cat((torch.zeros_like(x[:, :1]) if before is None else before, x[:, :-1]), dim=1)
        return x + self.strength.to(x.dtype) * torch.sigmoid(self.gate(x[..., :GATE_CHANNELS])) * previous


class DecodeCache:
    """Keys and values of one batch of sequences of the same length, and what smear remembers of the last token."""

    def __init__(self, model: GPT, batch_size: int = 1) -> None:
        config = model.config
        shape = (config.n_layer, batch_size, config.n_kv_head, config.sequence_len, config.head_dim)
        self.keys = torch.zeros(shape, dtype=model.compute_dtype, device=model.device)
        self.values = torch.zeros_like(self.keys)
        self.length = 0
        """tokens that are in it"""
        self.last_embedding: Tensor | None = None
        """(B, 1, C)"""

    def update(self, layer: int, key: Tensor, value: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """Keep the new ones, (B, H_kv, T, D); return all that the new tokens may see within `window`."""
        end = self.length + key.size(2)
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        begin = max(0, self.length + 1 - window)
        return self.keys[layer, :, :, begin:end], self.values[layer, :, :, begin:end]


class AblationGPT(GPT):
    """A GPT with additions. What all variants share starts with the same weights at the same seed."""

    def __init__(
        self, config: GPTConfig, additions: Additions = VARIANTS["plain"], compute_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(config, compute_dtype)
        self.additions = additions
        last = config.n_layer - 1
        self.value_embeddings = nn.ModuleDict(
            {
                str(layer): ValueEmbedding(config)
                for layer in range(config.n_layer)
                if additions.value_embeddings and layer % 2 == last % 2
            }
        )
        if additions.scales:
            self.stream_scales = nn.Parameter(torch.ones(config.n_layer))
            self.x0_scales = nn.Parameter(torch.zeros(config.n_layer))
        if additions.smear:
            self.smear = Smear()
        short = max(1, config.sequence_len // SHORT_WINDOW_SHARE)
        self.windows = [
            short
            if additions.windows and layer != last and (layer + 1) % SHORT_WINDOW_PERIOD != 0
            else config.sequence_len
            for layer in range(config.n_layer)
        ]
        """how many tokens, itself included, a token sees in each layer"""

    def hidden(self, tokens: Tensor, cache: AttentionCache | None = None) -> Tensor:
        """As GPT.hidden, with no cache: `decode` is what has one."""
        if cache is not None:
            raise TypeError("the engine's cache does not know the additions: use AblationGPT.decode")
        if tokens.size(1) > self.config.sequence_len:
            raise ValueError(f"{tokens.size(1)} tokens exceed the context of {self.config.sequence_len}")
        return self._hidden(tokens, None)

    def decode(self, tokens: Tensor, cache: DecodeCache) -> Tensor:
        """Logits of the tokens that follow those in the cache, which takes them up. tokens: (B, T) -> (B, T, V)."""
        hidden = self._hidden(tokens, cache)
        cache.length += tokens.size(1)
        return self.head(hidden)

    def _hidden(self, tokens: Tensor, cache: DecodeCache | None) -> Tensor:
        begin = cache.length if cache else 0
        positions = slice(begin, begin + tokens.size(1))
        cos, sin = (table[None, positions, None].to(self.compute_dtype) for table in (self.cos, self.sin))
        x = rms_norm(self.embed_tokens(tokens).to(self.compute_dtype))
        if self.additions.smear:
            embedding, before = x, cache.last_embedding if cache else None
            x = self.smear(x, before)
            if cache:
                cache.last_embedding = embedding[:, -1:]
        x0 = x
        for layer, block in enumerate(cast(list[Block], self.layers)):
            if self.additions.scales:
                x = self.stream_scales[layer].to(x.dtype) * x + self.x0_scales[layer].to(x.dtype) * x0
            x = x + self._attend(block.self_attn, tokens, rms_norm(x), cos, sin, cache)
            x = x + block.mlp(rms_norm(x))
        return rms_norm(x)

    def _attend(
        self, attention: Attention, tokens: Tensor, x: Tensor, cos: Tensor, sin: Tensor, cache: DecodeCache | None
    ) -> Tensor:
        """nanochat.model.gpt.Attention with value embeddings and windows. x: (B, T, C) -> (B, T, C)."""
        heads = (*x.shape[:2], -1, attention.head_dim)
        window = self.windows[attention.layer]
        query = rotate_and_norm(attention.q_proj(x).view(heads), cos, sin)
        key = rotate_and_norm(attention.k_proj(x).view(heads), cos, sin)
        value = attention.v_proj(x).view(heads)
        if str(attention.layer) in self.value_embeddings:
            value = value + self.value_embeddings[str(attention.layer)](tokens, x)
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(attention.layer, key, value, window)
        mask, is_causal = None, False
        if query.size(2) == key.size(2) <= window:
            is_causal = True
        elif query.size(2) > 1:
            mask = band(query.size(2), key.size(2), window, x.device)
        y = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=is_causal, enable_gqa=query.size(1) != key.size(1)
        )
        return attention.o_proj(y.transpose(1, 2).reshape(x.shape))


def band(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Which keys a query sees, (queries, keys) bool; the last keys are the queries' own.

    Without a kernel for windows (torch has none on a CPU) what is masked is computed all the same: a window saves no
    time in training, only in decoding, where the cache reads less.
    """
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return ones.tril(keys - queries) & ones.triu(keys - queries - window + 1)


class AblationOptimizer(MuonAdamW):
    """MuonAdamW whose AdamW also has what the additions brought along: none of it is a matrix for Muon.

    Embeddings of values take the learning rate of the token embedding; gates and scalars have one of their own, which
    is not scaled with width.
    """

    SCALAR_LR = 0.01
    """an Adam step is about the learning rate, and a scalar has to travel about 1 in some hundred steps"""

    def __init__(self, model: AblationGPT, lr_scale: float = 1.0, extra_lr_scale: float = 1.0) -> None:
        """`lr_scale` multiplies all default learning rates, `extra_lr_scale` also those of the additions."""
        options = OptimizerOptions()
        options = replace(
            options,
            matrix_lr=options.matrix_lr * lr_scale,
            embedding_lr=options.embedding_lr * lr_scale,
            unembedding_lr=options.unembedding_lr * lr_scale,
        )
        self.lr_scale, self.extra_lr_scale = lr_scale, extra_lr_scale
        super().__init__(model, options)

    def adamw_lr(self, model: GPT) -> dict[Tensor, float]:
        """Those of the plain model and of the additions."""
        rates = super().adamw_lr(model)
        table_lr = rates[model.embed_tokens.weight]
        for name, parameter in extra_parameters(model).items():
            lr = table_lr if name.endswith("table.weight") else self.SCALAR_LR * self.lr_scale
            rates[parameter] = lr * self.extra_lr_scale
        return rates


def extra_parameters(model: GPT) -> dict[str, nn.Parameter]:
    """What the additions brought along, by name: all parameters that the plain model has not."""
    own = ("embed_tokens.", "lm_head.", "layers.")
    return {name: parameter for name, parameter in model.named_parameters() if not name.startswith(own)}
