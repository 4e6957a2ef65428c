"""The model.

Token embedding, RMSNorm without gains, pre-norm blocks with rotary positions, QK-norm, grouped-query attention, a
squared-ReLU MLP of four times the width, no biases, an untied head. A special case of Apertus
(https://arxiv.org/abs/2509.14233), which many runtimes support; see nanochat/hub/convert_model.py.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.errors import UserError
from nanochat.model import cpu_kernels, fp8, gpu_kernels
from nanochat.model.loss import linear_cross_entropy, token_losses

ARCHITECTURE = "nanochat-2"  # stored in every checkpoint; another name means different tensors or arithmetic

MAX_SIZE, MAX_LAYERS = 1 << 20, 1024
WIDTH_PER_DEPTH = 64
MAX_HEAD_DIM = 128
VOCAB_MULTIPLE = 64
NANOCHAT_1_SOFTCAP = 15.0
"""`logit_softcap` of checkpoints of the architecture "nanochat-1", which is NanoChatForCausalLM in transformers."""
RMS_NORM_EPS = 1.1920929e-07
INIT_SCALE = 0.25
"""Muon's updates have a fixed size: from smaller weights, the first hundred steps learn more (docs/experiments.md)."""


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a model."""

    vocab_size: int  # rows of embedding and head, a multiple of 64
    sequence_len: int = 2048  # context length in tokens, of training rows and KV cache
    n_layer: int = 20
    n_head: int = 10
    n_kv_head: int = 10
    n_embd: int = 1280
    rope_theta: float = 10000.0
    logit_softcap: float = 0.0  # logits become softcap x tanh(logits / softcap); 0 disables it

    def __post_init__(self) -> None:
        """Raises ValueError for an impossible shape, or one so large that building it would take all memory."""
        sizes = (self.vocab_size, self.sequence_len, self.n_layer, self.n_head, self.n_kv_head, self.n_embd)
        if not all(isinstance(size, int) and 1 <= size <= MAX_SIZE for size in sizes) or self.n_layer > MAX_LAYERS:
            raise ValueError(f"impossible sizes: {self}")
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head or self.head_dim % 2:
            raise ValueError(f"the heads do not divide the width: {self}")
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be positive, got {self.rope_theta}")

    @classmethod
    def from_depth(cls, depth: int, vocab_size: int, sequence_len: int) -> "GPTConfig":
        """The shape for `depth`, the only dial: width 64 x depth, heads of 128 or the next size that divides the width.

        Raises UserError if depth or context length is out of range.
        """
        if not 1 <= depth <= 128:
            raise UserError(f"--depth must be between 1 and 128, got {depth}")
        if not 16 <= sequence_len <= MAX_SIZE:
            raise UserError(f"--max-seq-len must be between 16 and {MAX_SIZE}, got {sequence_len}")
        width = WIDTH_PER_DEPTH * depth
        # Kernels prefer head sizes that are multiples of 8: depth 17 gets 17 heads of 64, not 16 of 68.
        n_head = next(
            n for n in range(-(-width // MAX_HEAD_DIM), width + 1) if width % n == 0 and (width // n) % 8 == 0
        )
        padded = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        return cls(
            vocab_size=padded, sequence_len=sequence_len, n_layer=depth, n_head=n_head, n_kv_head=n_head, n_embd=width
        )

    @property
    def num_parameters(self) -> int:
        kv = 2 * self.n_kv_head * self.head_dim
        return self.n_layer * self.n_embd * (10 * self.n_embd + kv) + 2 * self.vocab_size * self.n_embd

    @property
    def num_multiplied(self) -> int:
        """Number of parameters in matrix products: all but those of the embedding."""
        return self.num_parameters - self.vocab_size * self.n_embd

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


def rms_norm(x: Tensor) -> Tensor:
    """x divided by its root mean square along the last dimension; no gains."""
    if cpu_kernels.enabled(x):
        return cpu_kernels.rms_norm(x, RMS_NORM_EPS)
    return F.rms_norm(x, (x.size(-1),), eps=RMS_NORM_EPS)


def norm_and_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RMSNorm and rotary positions to each head. x: (B, T, H, D); cos, sin: (1 or B, T, 1, D / 2).

    Returns (B, H, T, D). A rotation preserves the norm, so their order only changes rounding: on a CPU the norm comes
    second, after the change of layout; in a compiled step it comes first, so that its backward pass is one kernel.
    """
    if cpu_kernels.enabled(x):
        return rms_norm(cpu_kernels.rotate(x, cos, sin))
    first, second = rms_norm(x).chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1).transpose(1, 2)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention. query: (B, H, T, D); key, value: (B, H_kv, T, D) -> (B, H, T, D)."""
    if cpu_kernels.use_blocked_attention(query.size(2), query.device, query.dtype, training=torch.is_grad_enabled()):
        return cpu_kernels.blocked_attention(query, key, value)
    grouped = query.size(1) != key.size(1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


def squared_relu(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return F.relu(x).square()
    return cpu_kernels.squared_relu(x)  # on a GPU too: autograd's backward takes twice the memory


def soft_cap(logits: Tensor, softcap: float) -> Tensor:
    """Logits in fp32, squashed into (-softcap, softcap) unless it is 0. In bfloat16 tanh loses precision."""
    return softcap * torch.tanh(logits.float() / softcap) if softcap else logits.float()


class Linear(nn.Linear):
    """A linear layer without bias, stored in fp32 and applied in the dtype of its input."""

    fp8_training = False
    """multiply in FP8 while gradients are recorded"""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features), in the dtype of x."""
        return apply_all(x, self)[0]


def apply_all(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """Apply several layers to x: (..., in) -> (..., out) each, in the dtype of x."""
    weights = [layer.weight for layer in layers]
    if layers[0].fp8_training and torch.is_grad_enabled():
        return tuple(fp8.linear(x, weight) for weight in weights)
    if x.is_cuda and x.dtype == torch.bfloat16:
        return gpu_kernels.linears(x, *weights)  # sums the gradient of x in the products
    return tuple(F.linear(x, weight.to(x.dtype)) for weight in weights)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and QK-norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.n_embd, config.n_head * self.head_dim)
        self.k_proj = Linear(config.n_embd, config.n_kv_head * self.head_dim)
        self.v_proj = Linear(config.n_embd, config.n_kv_head * self.head_dim)
        self.o_proj = Linear(config.n_head * self.head_dim, config.n_embd)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, T, C) -> (B, T, C). mask: as in `GPT.hidden`."""
        heads = (*x.shape[:2], -1, self.head_dim)
        query, key, value = (y.view(heads) for y in apply_all(x, self.q_proj, self.k_proj, self.v_proj))
        query, key = norm_and_rotate(query, cos, sin), norm_and_rotate(key, cos, sin)
        value = value.transpose(1, 2)
        if mask is None:
            y = causal_attention(query, key, value)
        else:
            grouped = query.size(1) != key.size(1)
            y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
        return self.o_proj(y.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    """Squared ReLU between two matrices."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.n_embd, 4 * config.n_embd)
        self.fc2 = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) -> (B, T, C)."""
        if self.fc1.fp8_training and torch.is_grad_enabled():
            return fp8.squared_relu_mlp(x, self.fc1.weight, self.fc2.weight)
        return self.fc2(squared_relu(self.fc1(x)))


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, T, C) -> (B, T, C)."""
        x = x + self.self_attn(rms_norm(x), cos, sin, mask)
        return x + self.mlp(rms_norm(x))


class GPT(nn.Module):
    """The whole model. Weights are fp32, activations have `compute_dtype`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
        angles = torch.outer(torch.arange(config.sequence_len, dtype=torch.float32), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._compiled_hidden: Callable[[Tensor], Tensor] | None = None
        self._compiled_block: Callable[..., Tensor] | None = None
        self._compiled_shapes: set[torch.Size] = set()
        self.trains_in_fp8 = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize the parameters from torch's current random state.

        Matrices: normal with std INIT_SCALE sqrt(min(1, out / in) / in) (https://arxiv.org/abs/2310.17813). The
        projections into the residual stream and the head start at zero, so the first loss is exactly log(vocab_size).
        """
        nn.init.normal_(self.embed_tokens.weight)
        nn.init.zeros_(self.lm_head.weight)
        for block in self.layers:
            for name, weight in block.named_parameters():
                if name.endswith(("o_proj.weight", "fc2.weight")):
                    nn.init.zeros_(weight)
                else:
                    fan_out, fan_in = weight.shape
                    nn.init.normal_(weight, std=INIT_SCALE * (min(1.0, fan_out / fan_in) / fan_in) ** 0.5)

    def compile_training(self, shapes: Iterable[torch.Size] = ()) -> None:
        """Compile what `loss` runs and, on a GPU, `token_losses` of batches with these shapes.

        Everything else, whose shapes vary, stays eager. On a CPU, one block is compiled for all layers: at depth 4 the
        first step ends after 21 s instead of 32. On a GPU, the shapes are compiled here, before memory is full:
        compiling in the middle of a run has frozen machines with unified memory. Raises UserError if no kernel fits.
        """
        if self.device.type == "cpu":
            self._compiled_block = torch.compile(Block.forward, dynamic=False)
            return
        # Inductor otherwise computes gradients twice that FP8 reads twice (benchmarks/results/gpu-model.md).
        self._compiled_hidden = torch.compile(self.hidden, dynamic=False, options={"realize_reads_threshold": 3})
        self._compiled_shapes = set(shapes)
        try:
            for shape in self._compiled_shapes:
                tokens = torch.zeros(shape, dtype=torch.int64, device=self.device)
                self.loss(tokens, tokens).backward()
                self.token_losses(tokens, tokens)
        except torch.OutOfMemoryError:
            pass  # the first step runs out as well, and halves the rows
        except RuntimeError as error:
            if "No valid triton configs" not in str(error):
                raise
            raise UserError("torch.compile found no kernels that fit this GPU: rerun with --compile False") from None
        finally:
            self.zero_grad()

    def train_in_fp8(self) -> None:
        """Multiply the matrices inside the blocks in FP8 in `loss`, not in evaluation and decoding."""
        self.trains_in_fp8 = True
        for module in self.layers.modules():
            if isinstance(module, Linear):
                module.fp8_training = True

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def flops_per_token(self, row_len: int | None = None, trained_share: float = 1.0) -> float:
        """Training FLOPs per token: 6 per matrix parameter, plus 12 T C per layer for attention (T = `row_len`).

        The head only computes the `trained_share` of positions that have a target. By the convention of PaLM's
        appendix B (https://arxiv.org/abs/2204.02311) the attention matrix counts in full and the embedding does not.
        """
        head = self.lm_head.weight.numel()
        matrices = self.config.num_multiplied - (1 - trained_share) * head
        return 6 * matrices + 12 * self.config.n_layer * self.config.n_embd * (row_len or self.config.sequence_len)

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Final hidden states. tokens: (B, T) -> (B, T, C) in the compute dtype. Raises ValueError past the context.

        positions: (B, T), default: 0 to T - 1. mask: (B, 1, T, T), True where a token attends; default: causal.
        """
        if positions is None:
            if tokens.size(1) > self.config.sequence_len:
                raise ValueError(f"{tokens.size(1)} tokens exceed the context length of {self.config.sequence_len}")
            cos, sin = (table[None, : tokens.size(1), None] for table in (self.cos, self.sin))
        else:
            cos, sin = (table[positions].unsqueeze(2) for table in (self.cos, self.sin))
        cos, sin = cos.to(self.compute_dtype), sin.to(self.compute_dtype)
        x = rms_norm(self.embed_tokens(tokens).to(self.compute_dtype))
        run_block: Callable[..., Tensor] = Block.__call__
        if self._compiled_block and mask is None and torch.is_grad_enabled():
            run_block = self._compiled_block
        for block in self.layers:
            x = run_block(block, x, cos, sin, mask)
        return rms_norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits in fp32. hidden: (..., C) -> (..., V)."""
        return soft_cap(self.lm_head(hidden), self.config.logit_softcap)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits at every position. tokens: (B, T) -> (B, T, V) in fp32."""
        return self.head(self.hidden(tokens))

    def loss(
        self, tokens: Tensor, targets: Tensor, token_weights: Tensor | None = None, trained: Tensor | None = None
    ) -> Tensor:
        """Sum over tokens of weight x cross-entropy, a scalar. tokens, targets, token_weights: (B, T).

        trained: (N,) flattened positions of all targets that are not IGNORE; the head computes only these.
        """
        hidden = (self._compiled_hidden or self.hidden)(tokens).flatten(0, 1)
        targets = targets.flatten()
        weights = None if token_weights is None else token_weights.flatten()
        if trained is not None:
            hidden, targets = hidden.index_select(0, trained), targets[trained]
            weights = None if weights is None else weights[trained]
        compiled, softcap = self._compiled_hidden is not None, self.config.logit_softcap
        return linear_cross_entropy(hidden, self.lm_head.weight, targets, weights, softcap, compiled=compiled)

    @torch.no_grad()
    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each token in nats, 0 for targets of loss.IGNORE. (B, T), (B, T) -> (B, T)."""
        compiled = self._compiled_hidden if tokens.shape in self._compiled_shapes else None
        hidden = (compiled or self.hidden)(tokens).flatten(0, 1)
        losses = token_losses(
            hidden, self.lm_head.weight, targets.flatten(), self.config.logit_softcap, compiled=compiled is not None
        )
        return losses.view_as(targets)
