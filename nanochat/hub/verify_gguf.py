"""Verify a GGUF file: its logits, its token ids and, with a llama-server, what llama.cpp itself computes from it.

`GgufModel` is written from the definition of Apertus, not from our model, and knows only what is in the file.
"""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import httpx2
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from torch import Tensor

from nanochat.conversations import Message
from nanochat.errors import UserError
from nanochat.hub.gguf_file import ARCHITECTURE
from nanochat.hub.verify import NUM_TEXTS, Comparison, Passages, compare, sample_conversations, sample_texts
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer

LLAMA_CPP_PATTERNS = {
    "llama-bpe": r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
}
"""llama.cpp's regular expression for each value of `tokenizer.ggml.pre`."""
MAX_ERROR = {"f32": 1e-4, "bf16": 1e-4, "f16": 0.01, "q8_0": 0.05}
"""Relative error of the logits. A trained model of depth 4: 6e-7, 7e-7, 2e-4, 0.008; with a wrong layer 0.1 or more."""
MAX_LOGPROB_DIFFERENCE = {"f32": 1e-2, "bf16": 0.5, "f16": 0.1, "q8_0": 0.5}
"""Larger, because llama.cpp also rounds activations to the type of the weights."""
SERVER_SECONDS = 120
NUM_SERVER_TEXTS = 1000  # One request each, 5 ms.


class GgufModel:
    """Apertus in float32, with hyperparameters and weights from a GGUF file."""

    def __init__(self, path: Path, device: torch.device) -> None:
        reader = gguf.GGUFReader(path)
        self.metadata = {
            name.removeprefix(f"{ARCHITECTURE}."): field.contents() for name, field in reader.fields.items()
        }
        self.weights = {
            tensor.name.removesuffix(".weight"): torch.from_numpy(
                gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()
            ).to(device)
            for tensor in reader.tensors
        }

    def __call__(self, tokens: Tensor) -> Tensor:
        """(1, T) -> logits (1, T, V)."""
        head_dim = self.metadata["rope.dimension_count"]
        group_size = self.metadata["attention.head_count"] // self.metadata["attention.head_count_kv"]
        exponents = torch.arange(0, head_dim, 2, device=tokens.device) / head_dim
        positions = torch.arange(tokens.size(1), device=tokens.device)
        angles = positions[:, None] * self.metadata["rope.freq_base"] ** -exponents
        x = self.weights["token_embd"][tokens[0]]
        for i in range(self.metadata["block_count"]):
            h = self._norm(x, f"blk.{i}.attn_norm")
            query, key, value = (
                self._linear(h, f"blk.{i}.attn_{name}").view(len(h), -1, head_dim).transpose(0, 1) for name in "qkv"
            )
            query = _rotate(self._norm(query, f"blk.{i}.attn_q_norm"), angles)
            key = _rotate(self._norm(key, f"blk.{i}.attn_k_norm"), angles)
            key, value = key.repeat_interleave(group_size, 0), value.repeat_interleave(group_size, 0)
            mixed = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0]
            x = x + self._linear(mixed.transpose(0, 1).flatten(1), f"blk.{i}.attn_output")
            up = self._linear(self._norm(x, f"blk.{i}.ffn_norm"), f"blk.{i}.ffn_up")
            x = x + self._linear(self._xielu(up, i), f"blk.{i}.ffn_down")
        return self._linear(self._norm(x, "output_norm"), "output")[None]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        mean_square = x.square().mean(-1, keepdim=True)
        return x * (mean_square + self.metadata["attention.layer_norm_rms_epsilon"]).rsqrt() * self.weights[name]

    def _xielu(self, x: Tensor, layer: int) -> Tensor:
        alpha_p, alpha_n, beta, eps = (
            torch.tensor(self.metadata[f"xielu.{name}"][layer]) for name in ("alpha_p", "alpha_n", "beta", "eps")
        )
        positive = F.softplus(alpha_p) * x * x
        negative = (torch.expm1(x.clamp(max=eps)) - x) * (beta + F.softplus(alpha_n))
        return torch.where(x > 0, positive, negative) + beta * x


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate each pair (i, i + D / 2) by its angle. x: (H, T, D); angles: (T, D / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


def check(path: Path, kind: str, model: GPT, tokenizer: Tokenizer, passages: Passages, server: str | None) -> list[str]:
    """Run all checks of a file; return one line per program. Raises UserError if one fails."""
    file = GgufModel(path, model.device)
    result = check_logits(model, file, kind, passages)
    num_texts = check_token_ids(tokenizer, file)
    lines = [
        f"{path.name}: relative error of the logits {result.error:.1e}, same top token at {result.agreement:.2%}, "
        f"loss {result.loss:.4f} to {result.other_loss:.4f} nats, token ids identical on {num_texts:,} texts"
    ]
    return [*lines, check_llama_server(server, path, kind, tokenizer, file, passages)] if server else lines


def check_logits(ours: GPT, theirs: GgufModel, kind: str, passages: Passages) -> Comparison:
    """Compare logits in float32. Raises UserError if they differ by more than the type `kind` explains."""
    result = compare(ours, theirs, passages)
    if not result.error <= MAX_ERROR[kind]:
        raise UserError(
            f"the {kind} GGUF file holds a different model: logits differ by {result.error:.3%}, rounding explains "
            f"{MAX_ERROR[kind]:.3%}; please report this with your version of gguf"
        )
    return result


def check_token_ids(ours: Tokenizer, theirs: GgufModel) -> int:
    """Compare token ids on 5,000 texts; return the number of texts. Raises UserError at the first difference."""
    tokens, merges = theirs.metadata["tokenizer.ggml.tokens"], theirs.metadata["tokenizer.ggml.merges"]
    bpe = tokenizers.Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, [tuple(pair.split(" ")) for pair in merges]))
    pattern = tokenizers.Regex(LLAMA_CPP_PATTERNS[theirs.metadata["tokenizer.ggml.pre"]])
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = Sequence([Split(pattern, "isolated"), byte_level])
    texts = sample_texts(NUM_TEXTS)
    for text, encoding in zip(texts, bpe.encode_batch(texts), strict=True):
        if encoding.ids != ours.encode(text):
            raise UserError(f"the tokenizer of the GGUF file is not the model's: different ids for {text!r}")
    return len(texts)


def plain_prompts() -> list[list[Message]]:
    """Conversations that end with a user message, with strings for contents."""
    conversations = [c for c in sample_conversations() if c[-1]["role"] == "user"]
    return [c for c in conversations if all(isinstance(message["content"], str) for message in c)]


@contextmanager
def llama_server(binary: str, path: Path) -> Iterator[httpx2.Client]:
    """A client of `binary`, which serves the file on a free port until the context ends. Raises UserError.

    Runs on the CPU, because the error limits were measured there.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--parallel", "1", "--device", "none"]
    options += ["--cache-type-k", "f32", "--cache-type-v", "f32"]
    log = path.with_name("llama-server.log")
    with log.open("w") as output:
        process = subprocess.Popen([binary, "--model", path, *options], stdout=output, stderr=output)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=SERVER_SECONDS, trust_env=False) as client:
            _wait_until_ready(client, process, path.name, log)
            yield client
    except (httpx2.HTTPError, LookupError, ValueError) as error:
        raise UserError(f"{binary} failed on {path.name} ({error!r}): update llama.cpp") from error
    finally:
        process.kill()
        process.wait()
        log.unlink()


def _wait_until_ready(client: httpx2.Client, process: "subprocess.Popen[bytes]", name: str, log: Path) -> None:
    deadline = time.monotonic() + SERVER_SECONDS
    while True:
        try:
            if client.get("/health").is_success:
                return
        except httpx2.ConnectError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            lines = log.read_text(errors="replace").split("\n")
            error = next((line for line in lines if "error" in line.lower()), "no error message")
            raise UserError(
                f"llama-server cannot serve {name} ({' '.join(error.split())[:200]}): update llama.cpp, pass another "
                "llama-server to --check-with, or remove it from PATH"
            )
        time.sleep(0.1)


def check_llama_server(
    binary: str, path: Path, kind: str, ours: Tokenizer, theirs: GgufModel, passages: Passages
) -> str:
    """Compare llama.cpp with `GgufModel` on the same file; return one line. Raises UserError if they differ.

    Compared are token ids, prompts of conversations, and the log probabilities of the ten likeliest tokens after each
    passage.
    """
    conversations = plain_prompts()
    largest, same = 0.0, 0
    with llama_server(binary, path) as client:

        def ask(endpoint: str, **request: Any) -> Any:
            return client.post(endpoint, json=request).raise_for_status().json()

        texts = sample_texts(NUM_SERVER_TEXTS)
        for text in texts:
            if ask("/tokenize", content=text, parse_special=False)["tokens"] != ours.encode(text):
                raise UserError(f"llama.cpp encodes {text!r} to different ids")
        for messages in conversations:
            if ask("/apply-template", messages=messages)["prompt"] != ours.decode(ours.render_prompt(messages)):
                raise UserError(f"llama.cpp renders {messages!r} differently")
        for row in passages.rows:
            prompt = row[:, :-1]
            # The server leaves out the probabilities of a reply that ends, or that is not UTF-8 yet.
            forced = [[ours.encode("a")[0], 1000]]
            reply = ask("/completion", prompt=prompt[0].tolist(), n_predict=1, logit_bias=forced, n_probs=10)
            candidates = reply["completion_probabilities"][0]["top_logprobs"]
            logprobs = theirs(prompt.to(theirs.weights["output"].device))[0, -1].log_softmax(-1)
            differences = [abs(candidate["logprob"] - float(logprobs[candidate["id"]])) for candidate in candidates]
            largest = max(largest, *differences)
            same += candidates[0]["id"] == int(logprobs.argmax())
    if not largest <= MAX_LOGPROB_DIFFERENCE[kind]:
        raise UserError(
            f"llama.cpp computes another model from {path.name}: log probabilities differ by up to {largest:.3g}, "
            f"rounding explains {MAX_LOGPROB_DIFFERENCE[kind]}"
        )
    return (
        f"{path.name} in llama-server: log probabilities differ by at most {largest:.1e}, same top token on {same} of "
        f"{len(passages.rows)} passages, token ids identical on {len(texts):,} texts, prompts on {len(conversations)} "
        "conversations"
    )
