"""Read checkpoints of karpathy/nanochat: model_NNNNNN.pt, meta_NNNNNN.json and a pickled tokenizer.

Both .pt and .pkl files are pickles, which can run code when they are read. The weights are read with weights_only, the
tokenizer by an unpickler that only accepts one class, which it replaces with an inert one.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from nanochat.errors import UserError
from nanochat.hub.convert_model import build_model
from nanochat.hub.convert_tokenizer import checked_tokenizer
from nanochat.model.gpt import GPT, NANOCHAT_1_SOFTCAP, GPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.untrusted import read_json, reading

TOKENIZER_FILE = "tokenizer.pkl"
MODEL_FILE = re.compile(r"model_(\d{6})\.pt")
TENSOR_NAMES = {
    "_orig_mod.": "",  # of torch.compile
    "transformer.wte.": "embed_tokens.",
    "transformer.h.": "layers.",
    "attn.c_q.": "self_attn.q_proj.",
    "attn.c_k.": "self_attn.k_proj.",
    "attn.c_v.": "self_attn.v_proj.",
    "attn.c_proj.": "self_attn.o_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
COPY_AGAIN = "copy the complete checkpoint again"
SHAPE = ("sequence_len", "n_layer", "n_head", "n_kv_head", "n_embd")
UNSUPPORTED = {
    "value_embeds": "value embeddings",
    "ve_gate": "value embedding gates",
    "resid_lambdas": "residual scales",
    "x0_lambdas": "embedding scales",
    "smear": "smear",
    "backout_lambda": "backout",
}
"""Additions of later versions, by a part of their tensors' names. transformers has no class for them."""


def steps(folder: Path) -> list[int]:
    """Steps whose weights are in the folder, in order."""
    return sorted(int(match[1]) for path in folder.glob("model_*.pt") if (match := MODEL_FILE.fullmatch(path.name)))


def read_checkpoint(folder: Path, step: int | None = None) -> tuple[int, GPT]:
    """Read step and model, by default of the last step. Raises UserError if damaged, or of a later architecture."""
    found = steps(folder)
    if not found or step not in (None, *found):
        name = "model_NNNNNN.pt" if step is None else f"model_{step:06d}.pt"
        raise UserError(f"{folder} does not contain {name}: choose another folder or --step")
    step = found[-1] if step is None else step
    path, meta = folder / f"model_{step:06d}.pt", folder / f"meta_{step:06d}.json"
    with reading(meta, COPY_AGAIN):
        shape = read_json(meta)["model_config"]
        sizes = {name: int(shape[name]) for name in SHAPE}
    with reading(path, COPY_AGAIN):
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        unsupported = {feature for part, feature in UNSUPPORTED.items() for name in stored if part in name}
        if set(str(shape.get("window_pattern", "L")).upper()) != {"L"}:
            unsupported.add(f"sliding windows ({shape['window_pattern']})")
        if unsupported:
            raise UserError(
                f"{path} has features of a later nanochat that are not supported ({', '.join(sorted(unsupported))}): "
                "import a model from before 2026"
            )
        weights = {}
        for name, tensor in stored.items():
            for theirs, ours in TENSOR_NAMES.items():
                name = name.replace(theirs, ours)
            weights[name] = tensor
        vocab_size = len(weights["embed_tokens.weight"])
        config = GPTConfig(vocab_size=vocab_size, logit_softcap=NANOCHAT_1_SOFTCAP, **sizes)
        return step, build_model(weights, config, str(path))


class _EncodingState:
    """Replaces tiktoken.Encoding while a pickle is read. Keeps the state and does nothing with it."""

    state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _TokenizerUnpickler(pickle._Unpickler):
    """Reads a pickled tiktoken.Encoding and refuses every other class.

    Not the one in C, which fills memory up to any number that a pickle contains.
    """

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _EncodingState
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no tokenizer needs")


def read_pickled_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.pkl without running code in it. Raises UserError if it holds anything else or another layout."""
    with reading(path, "put the model's tokenizer there"):
        with open(path, "rb") as file:
            state = _TokenizerUnpickler(file).load().state
        ranks = {token: rank for token, rank in state["mergeable_ranks"].items() if isinstance(token, bytes)}
        return checked_tokenizer(ranks, state["pat_str"], state["special_tokens"])
