"""Checkpoints of the original nanochat: read, computed as there, and nothing of theirs run."""

import json
import math
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from torch import Tensor

from nanochat.data import demo_data
from nanochat.errors import UserError
from nanochat.hub import import_karpathy
from nanochat.hub.import_karpathy import read_checkpoint, read_pickled_tokenizer
from nanochat.hub.import_model import read_model
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint
from scripts import import_hf
from scripts.import_hf import Options
from tests.hub.fake_hub import FakeHub, Repository, StoredFile

SHAPE = {"sequence_len": 64, "vocab_size": 521, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64}


def original_weights(seed: int = 0) -> dict[str, Tensor]:
    """Weights by the original's names, the vocabulary padded to 576 rows as its later versions do."""
    generator = torch.Generator().manual_seed(seed)
    width, kv = SHAPE["n_embd"], SHAPE["n_embd"] // SHAPE["n_head"] * SHAPE["n_kv_head"]
    shapes = {"transformer.wte.weight": (576, width), "lm_head.weight": (576, width)}
    for layer in range(SHAPE["n_layer"]):
        prefix = f"transformer.h.{layer}"
        shapes |= {
            f"{prefix}.attn.c_{name}.weight": (size, width) for name, size in (("q", width), ("k", kv), ("v", kv))
        }
        shapes |= {f"{prefix}.attn.c_proj.weight": (width, width)}
        shapes |= {f"{prefix}.mlp.c_fc.weight": (4 * width, width), f"{prefix}.mlp.c_proj.weight": (width, 4 * width)}
    return {name: torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in shapes.items()}


def original_logits(weights: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """The original's model in float64, one position and one head at a time. (T, V)"""
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, kv_heads, half = SHAPE["n_head"], SHAPE["n_kv_head"], SHAPE["n_embd"] // SHAPE["n_head"] // 2

    def norm(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def turned(x: Tensor, position: int) -> Tensor:
        """One head, turned by its position as a complex number is by exp(-i angle)."""
        angles = position / 10000 ** (torch.arange(half, dtype=torch.float64) / half)
        turned = torch.complex(x[:half], x[half:]) * torch.exp(-1j * angles)
        return norm(torch.cat([turned.real, turned.imag]))

    x = norm(w["transformer.wte.weight"][tokens])
    for layer in range(SHAPE["n_layer"]):
        part = {name.split(f"h.{layer}.")[1]: t for name, t in w.items() if f"h.{layer}." in name}
        q, k, v = (norm(x) @ part[f"attn.c_{name}.weight"].T for name in "qkv")
        out = torch.zeros_like(x)
        for t in range(len(tokens)):
            for head in range(heads):
                mine, shared = slice(2 * half * head, 2 * half * (head + 1)), head // (heads // kv_heads)
                theirs = slice(2 * half * shared, 2 * half * (shared + 1))
                query = turned(q[t, mine], t)
                scores = torch.stack([query @ turned(k[s, theirs], s) for s in range(t + 1)]) / math.sqrt(2 * half)
                out[t, mine] = scores.softmax(0) @ v[: t + 1, theirs]
        x = x + out @ part["attn.c_proj.weight"].T
        x = x + (norm(x) @ part["mlp.c_fc.weight"].T).relu().square() @ part["mlp.c_proj.weight"].T
    return 15 * torch.tanh(norm(x) @ w["lm_head.weight"].T / 15)


def encoding(tokenizer: Tokenizer) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "rustbpe",
        pat_str=tokenizer.pattern,
        mergeable_ranks=tokenizer.ranks,
        special_tokens=tokenizer.special_ids,
    )


def save_original(folder: Path, tokenizer: Tokenizer, step: int = 650, prefix: str = "", **more: Any) -> Path:
    """A folder as the original nanochat writes it; `more` goes into the weights or, if no tensor, into the shape."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value for name, value in more.items() if isinstance(value, Tensor)}
    weights = {prefix + name: tensor.bfloat16() for name, tensor in (original_weights() | tensors).items()}
    torch.save(weights, folder / f"model_{step:06d}.pt")
    shape = SHAPE | {name: value for name, value in more.items() if name not in tensors}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": shape}))
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding(tokenizer)))
    torch.save(torch.ones(3), folder / "token_bytes.pt")
    return folder


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_an_original_checkpoint_computes_what_it_did(tokenizer: Tokenizer, tmp_path: Path, prefix: str) -> None:
    found = read_model(str(save_original(tmp_path / "chatsft_checkpoints" / "d2", tokenizer, prefix=prefix)))
    assert (found.step, found.stage, found.tag) == (650, "sft", "d2")
    tokens = torch.randint(576, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    rounded = {name: tensor.bfloat16() for name, tensor in original_weights().items()}
    with torch.no_grad():
        logits = found.model(torch.tensor([tokens]))[0].double()
    torch.testing.assert_close(logits, original_logits(rounded, tokens), atol=1e-4, rtol=0)


def test_its_pickled_tokenizer_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    read = read_pickled_tokenizer(save_original(tmp_path, tokenizer) / "tokenizer.pkl")
    assert read.hash == tokenizer.hash


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch evil",)


@pytest.mark.parametrize(
    "content",
    [Evil(), {"a": [Evil()]}, sys.modules, 7, "cl100k_base"],
    ids=["command", "nested command", "modules", "number", "name"],
)
def test_a_pickle_that_is_no_tokenizer_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        dumped = pickle.dumps(content)
    except TypeError:  # pickle does not support modules; refer to a harmless function by name
        dumped = b"cbuiltins\nprint\n(S'x'\ntR."
    (tmp_path / "tokenizer.pkl").write_bytes(dumped)
    with pytest.raises(UserError, match="tokenizer"):
        read_pickled_tokenizer(tmp_path / "tokenizer.pkl")
    assert not (tmp_path / "evil").exists()


def test_a_registered_encoding_by_name_is_not_looked_up(tmp_path: Path) -> None:
    by_name = b"\x80\x04ctiktoken.core\nEncoding\n)\x81X\x04\x00\x00\x00gpt2b."
    (tmp_path / "tokenizer.pkl").write_bytes(by_name)
    with pytest.raises(UserError, match="tokenizer"):
        read_pickled_tokenizer(tmp_path / "tokenizer.pkl")


def test_weights_that_would_run_code_are_refused(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_original(tmp_path / "m", tokenizer)
    torch.save({"transformer.wte.weight": Evil()}, tmp_path / "m" / "model_000650.pt")
    with pytest.raises(UserError, match=r"\.pt|\.json"):
        read_checkpoint(tmp_path / "m")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"value_embeds.1.weight": torch.ones(576, 32)}, "value embeddings"),
        ({"transformer.h.1.attn.ve_gate.weight": torch.ones(2, 32)}, "gates"),
        (
            {"resid_lambdas": torch.ones(2), "x0_lambdas": torch.zeros(2)},
            "scales",
        ),
        ({"smear_lambda": torch.zeros(1), "backout_lambda": torch.ones(1)}, "backout.*smear"),
        ({"window_pattern": "SSSL"}, "SSSL"),
        ({"transformer.h.0.extra.weight": torch.ones(1)}, "extra"),
    ],
)
def test_later_architectures_are_refused_by_name(
    tokenizer: Tokenizer, tmp_path: Path, more: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        read_checkpoint(save_original(tmp_path, tokenizer, **more))


def test_a_full_context_window_is_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert read_checkpoint(save_original(tmp_path, tokenizer, window_pattern="L"))[0] == 650


def test_the_last_step_or_the_one_asked_for(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for step in (100, 650, 200):
        save_original(tmp_path, tokenizer, step)
    (tmp_path / "model_000900_backup.pt").touch()
    assert import_karpathy.steps(tmp_path) == [100, 200, 650]
    assert read_checkpoint(tmp_path)[0] == 650 and read_checkpoint(tmp_path, 200)[0] == 200
    with pytest.raises(UserError, match=r"model_000300\.pt"):
        read_checkpoint(tmp_path, 300)
    (tmp_path / "meta_000650.json").unlink()
    with pytest.raises(UserError, match=r"meta_000650\.json"):
        read_checkpoint(tmp_path)


def test_an_original_from_the_hub(hub: FakeHub, tokenizer: Tokenizer, base_dir: Path, tmp_path: Path) -> None:
    folder = save_original(tmp_path / "theirs", tokenizer)
    files = {path.name: StoredFile(path.read_bytes(), True) for path in folder.iterdir()}
    hub.repositories["karpathy/nanochat-d2"] = Repository(branches={"main": files})
    import_hf.main(Options("karpathy/nanochat-d2"))
    assert checkpoint.find("sft", "nanochat-d2").step == 650


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_original(tmp_path, tokenizer)
    larger = Tokenizer.train(demo_data.documents("train")[:300], vocab_size=700)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding(larger)))
    with pytest.raises(UserError, match=r"576.*700"):
        read_model(str(tmp_path))
