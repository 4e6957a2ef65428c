"""The model's forward pass for the engine, with its KV cache and ragged batches.

The same function as nanochat.model.gpt, with fewer operations: on a CPU, each operation costs 2 to 5 us to call, and
one token at depth 4 takes about a hundred. The tokens of all sequences, in prefill and decode, go through the matrices
in one batch without padding; only attention runs per sequence.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.errors import UserError
from nanochat.model.cpu_kernels import use_blocked_attention
from nanochat.model.gpt import GPT, RMS_NORM_EPS, causal_attention, rms_norm, soft_cap, squared_relu
from nanochat.runtime import copy_to, free_memory, native_dtype

FREE_MEMORY_FRACTION = 0.25
MASK_ALIGNMENT = 16  # elements from row to row of a mask; attention on a GPU would copy another mask in every layer
PACKED_ROWS = 512  # rows that oneDNN's layout of a matrix is chosen for
GRAPH_LENGTH = 256  # a CUDA graph attends to a multiple of this many keys


@dataclass(frozen=True)
class Span:
    """New tokens of one sequence, or one new token each of several sequences in adjacent slots."""

    first_row: int  # row of the first token in the step's batch
    first_slot: int
    starts: tuple[int, ...]  # tokens already in each slot
    count: int  # new tokens per slot


Visible = Sequence[tuple[Span, Sequence[Tensor], Sequence[Tensor], Tensor | None]]
"""Per span its keys and values, per layer (sequences, n_kv_head, length, head_dim), and its mask."""


class Matrix:
    """A weight matrix, (out, in)."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.dtype, weight = dtype, weight.detach().to(dtype)
        self.packed: Tensor | None = None
        if weight.device.type == "cpu" and dtype == torch.bfloat16 and native_dtype(weight.device) == dtype:
            # oneDNN reads one row's weights 1.5 times as fast from its own layout, which suits any number of rows.
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)
            return
        self.transposed = weight.t()
        if weight.device.type == "cpu":
            # MKL takes 40 us for 1 row of x and 81 us for 16 (1,024 outputs, 256 inputs); with F.linear 40 and 120 us.
            self.transposed = self.transposed.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T. x: (N, in) -> (N, out) in the dtype of the matrix."""
        x = x.to(self.dtype)
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return torch.mm(x, self.transposed)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y W^T. x: (N, out), y: (N, in) -> (N, out) in the dtype of x."""
        if x.dtype != self.dtype:
            return x + self(y)
        return torch.addmm(x, y, self.transposed)


class Layer:
    """Matrices of one block, in the compute dtype."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        weights = {name: weight.detach() for name, weight in block.named_parameters()}
        self.qkv = Matrix(torch.cat([weights[f"self_attn.{name}_proj.weight"] for name in "qkv"]), dtype)
        self.output = Matrix(weights["self_attn.o_proj.weight"], dtype)
        self.fc1 = Matrix(weights["mlp.fc1.weight"], dtype)
        self.fc2 = Matrix(weights["mlp.fc2.weight"], dtype)


class ModelRunner:
    """Runs a snapshot of the model's weights; create a new runner after changing them.

    Matrices have the model's compute dtype; everything else on a CPU is fp32: torch's attention of one query is up to
    7 times slower there in bfloat16.

    cache: keys and values, (n_layer, 2, slots, n_kv_head, length, head_dim). A slot holds one sequence of at most the
    model's context length. On a CPU, memory is allocated as slots fill.
    """

    def __init__(self, model: GPT, slots: int, vocab_size: int) -> None:
        """vocab_size: the tokenizer's; the head's remaining rows are padding."""
        self.config = config = model.config
        self.device, self.matrix_dtype, self.dtype = model.device, model.compute_dtype, cache_dtype(model)
        self.n_rotated = config.n_head + config.n_kv_head
        self.embedding = rms_norm(model.embed_tokens.weight.detach()).to(self.dtype)
        self.layers = [Layer(block, self.matrix_dtype) for block in model.layers]
        self.head = Matrix(model.lm_head.weight[:vocab_size], self.matrix_dtype)
        # Rotary embedding in three operations: x cos + (x with its halves swapped) sin.
        cos, sin = torch.cat((model.cos, model.cos), dim=1), torch.cat((model.sin, -model.sin), dim=1)
        self.cos_sin = torch.stack((cos, sin), dim=1).unsqueeze(2).to(self.dtype)  # (length, 2, 1, head_dim)
        self.root_eps = torch.tensor(RMS_NORM_EPS**0.5)
        self.norm_scales = {size: torch.tensor(size**-0.5) for size in (config.n_embd, config.head_dim)}
        shape = (config.n_layer, 2, slots, config.n_kv_head, config.sequence_len, config.head_dim)
        self.cache = _zeros(shape, self.dtype, self.device)
        self.flat_cache = self.cache.view(config.n_layer, -1, config.head_dim).unbind(0)
        self.slot_rows = config.n_kv_head * config.sequence_len
        # Row of `flat_cache` where each head's keys of slot 0 start, then the same for values.
        heads = torch.arange(config.n_kv_head, device=self.device)
        self.head_rows = torch.cat((heads, heads + slots * config.n_kv_head)) * config.sequence_len
        self.use_graphs = self.device.type == "cuda"
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy keys and values of the first `length` tokens of one slot to another."""
        self.cache[:, :, target, :, :length] = self.cache[:, :, source, :, :length]

    def hidden(self, tokens: Tensor, spans: Sequence[Span]) -> Tensor:
        """Return the final hidden states, (N, C), and append keys and values to the spans' slots.

        tokens: (N,), the spans' tokens concatenated.
        """
        each = [(span, n) for span in spans for n in range(len(span.starts))]
        rows = [(span.first_slot + n, span.starts[n] + i) for span, n in each for i in range(span.count)]
        positions = [position for _, position in rows]
        first_rows = [slot * self.slot_rows + position for slot, position in rows]
        numbers = copy_to(self.device, torch.tensor([positions, first_rows]))
        return self._hidden(tokens, numbers[0], numbers[1], [(span, *self._visible(span)) for span in spans])

    def decode(self, tokens: Tensor, spans: Sequence[Span]) -> Tensor:
        """Return logits, (N, vocab_size), of spans of one new token per slot, like `hidden` and `compute_logits`.

        With `use_graphs`, the GPU runs one CUDA graph for the next power of two of slots, all in one launch. Slots
        without a token compute one that nobody reads; its keys and values go to the last position of the context,
        where no token of a sequence is ever computed.
        """
        context = self.config.sequence_len
        starts = {span.first_slot + n: start for span in spans for n, start in enumerate(span.starts)}
        length = min(-(-(max(starts.values()) + 1) // GRAPH_LENGTH) * GRAPH_LENGTH, context)
        count = min(1 << max(starts).bit_length(), self.cache.size(2))
        positions = [starts.get(slot, context - 1) for slot in range(count)]
        first_rows = [slot * self.slot_rows + position for slot, position in enumerate(positions)]
        numbers = copy_to(self.device, torch.tensor([positions, first_rows, [0] * count]))
        rows = on_device(list(starts), self.device)
        numbers[2].index_copy_(0, rows, tokens)
        return self._decode_in_graph(numbers, length).index_select(0, rows)

    def _decode_in_graph(self, numbers: Tensor, length: int) -> Tensor:
        """`_decode`, in a CUDA graph if possible. Its result is overwritten by the next call."""
        key = numbers.size(1), length
        if self.use_graphs and key not in self._graphs:
            try:
                self._graphs[key] = self._capture(numbers, length)
            except RuntimeError as error:
                self.use_graphs = False
                logging.warning("decoding without CUDA graphs: %s", str(error).partition("\n")[0])
        if not self.use_graphs:
            return self._decode(numbers, length)
        graph, inputs, logits = self._graphs[key]
        inputs.copy_(numbers)
        graph.replay()
        return logits

    def _capture(self, numbers: Tensor, length: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        inputs, graph, stream = numbers.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._decode(inputs, length)  # kernels and workspaces are loaded by the first call, outside of a graph
        torch.cuda.current_stream().wait_stream(stream)
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):  # other threads use the GPU as well
            logits = self._decode(inputs, length)
        return graph, inputs, logits

    def _decode(self, numbers: Tensor, length: int) -> Tensor:
        """Logits of one token in each of the first N slots. numbers: (3, N): positions, cache rows, tokens."""
        positions, first_rows, tokens = numbers
        span = Span(0, 0, (length - 1,) * len(tokens), 1)
        keys, values, _ = self._visible(span)
        hidden = torch.arange(length, device=self.device) > positions[:, None, None, None]
        mask = torch.where(hidden, -torch.inf, 0.0).to(self.dtype)
        return self.compute_logits(self._hidden(tokens, positions, first_rows, [(span, keys, values, mask)]))

    def _hidden(self, tokens: Tensor, positions: Tensor, first_rows: Tensor, visible: Visible) -> Tensor:
        """Final hidden states. first_rows: (N,), rows of `flat_cache` of the first head's keys."""
        config = self.config
        cache_rows = (first_rows.unsqueeze(1) + self.head_rows).flatten()
        cos, sin = self.cos_sin[positions].unbind(1)
        head_dim, half = config.head_dim, config.head_dim // 2
        x = F.embedding(tokens, self.embedding)
        for number, layer in enumerate(self.layers):
            heads = layer.qkv(self._norm(x)).to(self.dtype).view(len(x), -1, head_dim)
            rotated = heads[:, : self.n_rotated]
            swapped = rotated.view(len(x), -1, 2, half).flip(2).view(rotated.shape)  # roll takes three times as long
            self._norm(torch.addcmul(rotated * cos, swapped, sin), out=rotated)
            self.flat_cache[number].index_copy_(0, cache_rows, heads[:, config.n_head :].reshape(-1, head_dim))
            attended = [self._attend(heads, span, k[number], v[number], mask) for span, k, v, mask in visible]
            x = layer.output.added(x, attended[0] if len(attended) == 1 else torch.cat(attended))
            x = layer.fc2.added(x, squared_relu(layer.fc1(self._norm(x))))
        return self._norm(x)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return logits in fp32. hidden: (N, C) -> (N, vocab_size)."""
        return soft_cap(self.head(hidden), self.config.logit_softcap)

    def _norm(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """gpt.rms_norm, in fewer operations for the few rows of a CPU (18 us; rms_norm 32; a Python scale adds 7)."""
        if x.device.type != "cpu":
            return rms_norm(x) if out is None else out.copy_(rms_norm(x))
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        rms = rms.mul_(self.norm_scales[x.size(-1)]).hypot_(self.root_eps)
        if out is None and self.matrix_dtype != torch.float32:
            out = torch.empty_like(x, dtype=self.matrix_dtype)
        return torch.div(x, rms, out=out)

    def _mask(self, span: Span) -> Tensor | None:
        """Return the additive attention mask, (sequences, 1, count, length), or None if none is needed."""
        start, count = max(span.starts), span.count
        if (count == 1 and min(span.starts) == start) or (start == 0 and len(span.starts) == 1):
            return None  # every key is visible, or plain causal attention from the start of a prompt
        if use_blocked_attention(span.count, self.device, self.dtype, training=False):
            return None  # causal_attention runs in blocks and applies the mask itself
        length = start + count
        keys = torch.arange(-(-length // MASK_ALIGNMENT) * MASK_ALIGNMENT, device=self.device)
        first = on_device(span.starts, self.device)[:, None, None]
        hidden = keys > first + torch.arange(count, device=self.device)[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(hidden, -torch.inf).unsqueeze(1)[..., :length]

    def _visible(self, span: Span) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
        """Return a span's keys and values per layer, each (sequences, n_kv_head, length, head_dim), and its mask."""
        slots = slice(span.first_slot, span.first_slot + len(span.starts))
        length = max(span.starts) + span.count
        keys, values = self.cache[:, :, slots, :, :length].unbind(1)
        return keys.unbind(0), values.unbind(0), self._mask(span)

    def _attend(self, heads: Tensor, span: Span, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Return attention of a span's tokens, (rows, n_head * head_dim). heads: (N, n_head or more, head_dim)."""
        query = heads[span.first_row : span.first_row + len(span.starts) * span.count, : self.config.n_head]
        query = query.unsqueeze(2) if span.count == 1 else query.transpose(0, 1).unsqueeze(0)
        if mask is None and span.count > 1:
            attended = causal_attention(query, keys, values)
        else:
            is_grouped = self.config.n_head != self.config.n_kv_head
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=is_grouped)
        return (attended if span.count == 1 else attended.squeeze(0).transpose(0, 1)).flatten(1)


def cache_dtype(model: GPT) -> torch.dtype:
    """Dtype of keys, values and the residual stream."""
    return torch.float32 if model.device.type == "cpu" else model.compute_dtype


def on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """Copy numbers to a tensor on the device without synchronizing with it."""
    return copy_to(device, torch.tensor(values))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Zeros because attention multiplies masked values by 0, and 0 x NaN is NaN. numpy's zeros are allocated on write.
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def num_slots(model: GPT, wanted: int, budget_gb: float | None) -> int:
    """Return how many slots fit in `budget_gb` (default: a quarter of the free memory), at most `wanted`.

    Raises UserError if the budget does not hold one sequence.
    """
    config = model.config
    elements = 2 * config.n_layer * config.n_kv_head * config.head_dim * config.sequence_len
    slot_bytes = elements * cache_dtype(model).itemsize
    if budget_gb is None:
        return min(wanted, max(1, int(FREE_MEMORY_FRACTION * free_memory(model.device) / slot_bytes)))
    slots = min(wanted, int(budget_gb * 1e9 / slot_bytes))
    if slots < 1:
        raise UserError(f"--kv-cache-gb must be at least {slot_bytes / 1e9:.3g} (one sequence), got {budget_gb}")
    return slots
