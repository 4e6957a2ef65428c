"""Checkpoints of the original nanochat: model_NNNNNN.pt, meta_NNNNNN.json and a pickled tokenizer.

Both .pt and .pkl are pickles, which can run code when they are read. The weights are read with weights_only; the
tokenizer by an unpickler that knows one class, and that an inert one of our own.
"""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.hub.convert_model import check_tensors
from nanochat.hub.convert_tokenizer import tokenizer_of
from nanochat.model.gpt import GPTConfig
from nanochat.tokenizer import Tokenizer

TOKENIZER_FILE = "tokenizer.pkl"
MODEL_FILE = re.compile(r"model_(\d{6})\.pt")
NAMES = {
    "transformer.wte.": "embed_tokens.",
    "transformer.h.": "layers.",
    "attn.c_q.": "self_attn.q_proj.",
    "attn.c_k.": "self_attn.k_proj.",
    "attn.c_v.": "self_attn.v_proj.",
    "attn.c_proj.": "self_attn.o_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
SHAPE = ("vocab_size", "sequence_len", "n_layer", "n_head", "n_kv_head", "n_embd")
NEWER = {
    "value_embeds": "value embeddings",
    "ve_gate": "gates of value embeddings",
    "resid_lambdas": "scales of the residual stream",
    "x0_lambdas": "scales of the first embedding",
    "smear": "the smear of the previous token",
    "backout_lambda": "backout of a middle layer",
}
"""What later versions of nanochat added to the model; no class of transformers has them."""


@dataclass(frozen=True)
class OriginalCheckpoint:
    """What one step of the original nanochat saved."""

    step: int
    config: GPTConfig
    weights: dict[str, Tensor]
    """by our names, in float32"""


def steps(folder: Path) -> list[int]:
    """The steps whose weights are in the folder, in order."""
    return sorted(int(match[1]) for path in folder.glob("model_*.pt") if (match := MODEL_FILE.fullmatch(path.name)))


def read_original(folder: Path, step: int | None = None) -> OriginalCheckpoint:
    """The last checkpoint in the folder, or that of `step`.

    Raises UserError if it is not there or damaged, or of a later architecture, whose tensors it names.
    """
    found = steps(folder)
    if not found or step not in (None, *found):
        raise UserError(
            f"{folder} has no model_{'NNNNNN' if step is None else f'{step:06d}'}.pt: name another folder or --step"
        )
    step = found[-1] if step is None else step
    path = folder / f"model_{step:06d}.pt"
    try:
        shape = json.loads((folder / f"meta_{step:06d}.json").read_text())["model_config"]
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # torch.compile puts _orig_mod. in front of every name.
        stored = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in stored.items()}
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: the weights cannot be understood without it") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} or its meta file cannot be read ({_first_line(error)}): it is damaged or no checkpoint"
        ) from None
    _refuse_newer(stored, shape, path)
    weights = {_our_name(name): tensor.float() for name, tensor in stored.items()}
    try:
        config = GPTConfig(
            **{**{name: int(shape[name]) for name in SHAPE}, "vocab_size": len(weights["embed_tokens.weight"])}
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the shape of the model cannot be read from {path.name} and its meta file ({error!r})"
        ) from None
    check_tensors(weights, config, str(path))
    return OriginalCheckpoint(step, config, weights)


def _our_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _refuse_newer(tensors: Mapping[str, Tensor], shape: Mapping[str, Any], path: Path) -> None:
    """Raise UserError if the model does more than NanoChatForCausalLM, saying what."""
    added = {what for part, what in NEWER.items() for name in tensors if part in name}
    if set(str(shape.get("window_pattern", "L")).upper()) != {"L"}:
        added.add(f"sliding windows ({shape['window_pattern']})")
    if added:
        raise UserError(
            f"{path} is a model of a later nanochat than this one, with {', '.join(sorted(added))}: it cannot be "
            "imported; models from before 2026 can"
        )


class _EncodingParts:
    """Stands for tiktoken.Encoding while a pickle is read: keeps what it was made of and does nothing."""

    parts: object = None

    def __setstate__(self, state: object) -> None:
        self.parts = state


class _TokenizerUnpickler(pickle.Unpickler):
    """Reads a pickled tiktoken.Encoding and refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _EncodingParts
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no tokenizer needs")


def read_pickled_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in the original nanochat's tokenizer.pkl; no code of the file's is run.

    Raises UserError if it holds anything but a tokenizer, or one of another layout than ours.
    """
    try:
        with open(path, "rb") as file:
            encoding = _TokenizerUnpickler(file).load()
        parts = encoding.parts
        ranks, pattern, special = parts["mergeable_ranks"], parts["pat_str"], parts["special_tokens"]
        ranks = {bytes(token): int(rank) for token, rank in ranks.items()}
    except FileNotFoundError:
        raise UserError(f"there is no {path}: put the model's tokenizer there") from None
    except Exception as error:  # a crafted pickle can make any of them
        raise UserError(
            f"{path} cannot be read as a tokenizer ({_first_line(error)}): do not trust this file"
        ) from None
    return tokenizer_of(ranks, str(pattern), dict(special), str(path))


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
