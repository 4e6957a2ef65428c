"""Other people's models: read, proved, kept, and nothing of theirs run."""

import json
import math
import os
import pickle
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiktoken
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ApertusConfig, ApertusForCausalLM

from nanochat import paths
from nanochat.data import demo_data, download
from nanochat.errors import UserError
from nanochat.hub import import_karpathy, verify
from nanochat.hub.convert_model import hf_weights
from nanochat.hub.convert_tokenizer import read_tokenizer
from nanochat.hub.import_karpathy import read_checkpoint, read_pickled_tokenizer
from nanochat.hub.import_model import files_to_download, read_model, stage_in_name
from nanochat.inference.chat import load_chat
from nanochat.inference.sampling_params import SamplingParams
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint
from scripts import hf_prepare, import_hf
from scripts.import_hf import Options
from tests.hub.conftest import save_model
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
    except TypeError:  # modules cannot be pickled: call something harmless by name
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


def test_the_way_there_and_back_changes_nothing(exported: Path, base_dir: Path, tokenizer: Tokenizer) -> None:
    import_hf.main(Options(str(exported)))
    kept = checkpoint.find("sft", exported.name)
    assert kept.step == 7 and Tokenizer.load(paths.tokenizer_dir()).hash == tokenizer.hash
    back = hf_weights(load_file(kept.folder / checkpoint.MODEL_FILE), kept.config)
    weights = load_file(exported / "model.safetensors")
    assert back.keys() == weights.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor.bfloat16(), weights[name])


def test_an_imported_model_chats_and_can_be_trained_on(
    exported: Path, base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_hf.main(Options(str(exported), stage="mid", tag="theirs"))
    said = capsys.readouterr().out
    assert "./sft.sh --model-tag theirs" in said and "5,000" in said
    chat = load_chat(checkpoint.find("mid", "theirs"), "cpu")
    prompt = chat.prompt([{"role": "user", "content": "Hi"}])
    assert chat.engine.generate([prompt], SamplingParams(max_tokens=4))[0].tokens
    options = checkpoint.find("mid", "theirs").meta["options"]
    assert options["device_batch_size"] and options["total_batch_size"]


def test_from_the_hub(hub: FakeHub, exported: Path, base_dir: Path) -> None:
    files = {path.name: StoredFile(path.read_bytes(), path.suffix == ".safetensors") for path in exported.iterdir()}
    files["extra/huge.safetensors"] = StoredFile(b"not wanted", True)
    hub.repositories["ada/nanochat-d2-sft"] = Repository(branches={"main": files})
    import_hf.main(Options("ada/nanochat-d2-sft"))
    assert checkpoint.find("sft", "nanochat-d2-sft").meta["origin"] == "ada/nanochat-d2-sft"
    assert not any("huge" in request for request in hub.requests)
    with pytest.raises(UserError, match=r"nanochat-d2-sft.*--tag"):
        import_hf.main(Options("ada/nanochat-d2-sft"))


def test_a_hub_that_sends_more_than_it_lists_is_stopped(
    hub: FakeHub, exported: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: StoredFile(path.read_bytes(), path.suffix == ".safetensors") for path in exported.iterdir()}
    hub.repositories["ada/nanochat-d2-sft"] = Repository(branches={"main": files})
    with monkeypatch.context() as context:
        context.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
        with pytest.raises(UserError, match=r"disk space.*HF_HOME"):
            import_hf.main(Options("ada/nanochat-d2-sft"))
    assert hub.downloads == 0
    monkeypatch.setattr(download, "DISK_RESERVE_BYTES", 0)
    size = sum(len(file.content) for file in files.values())
    hub.surplus = b"x" * size
    with pytest.raises(UserError, match=r"more bytes than.*HF_ENDPOINT"):
        import_hf.main(Options("ada/nanochat-d2-sft"))
    assert sum(path.stat().st_size for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file()) <= size
    hub.surplus = b"x"
    with pytest.raises(UserError, match=r"cannot download.*size"):
        import_hf.main(Options("ada/nanochat-d2-sft"))


def test_an_original_from_the_hub(hub: FakeHub, tokenizer: Tokenizer, base_dir: Path, tmp_path: Path) -> None:
    folder = save_original(tmp_path / "theirs", tokenizer)
    files = {path.name: StoredFile(path.read_bytes(), True) for path in folder.iterdir()}
    hub.repositories["karpathy/nanochat-d2"] = Repository(branches={"main": files})
    import_hf.main(Options("karpathy/nanochat-d2"))
    assert checkpoint.find("sft", "nanochat-d2").step == 650


def test_what_is_not_on_the_hub_gets_a_sentence(hub: FakeHub, base_dir: Path) -> None:
    hub.repositories["ada/empty"] = Repository()
    for origin, sentence in (
        ("ada/nothing", "ada/nothing"),
        ("ada/empty", r"ada/empty.*config\.json"),
        ("not/a/name", "not/a/name"),
        ("", "import"),
    ):
        with pytest.raises(UserError, match=sentence):
            import_hf.main(Options(origin))


def test_another_tokenizer_is_never_overwritten(exported: Path, base_dir: Path) -> None:
    other = Tokenizer.train(["some other text"] * 3, 270)
    other.save(paths.tokenizer_dir())
    with pytest.raises(UserError, match=r"tokenizer.*NANOCHAT_BASE_DIR"):
        import_hf.main(Options(str(exported)))
    assert Tokenizer.load(paths.tokenizer_dir()).hash == other.hash
    assert not checkpoint.newest("sft")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            "NanoChatForCausalLM.*Llama",
        ),
        ({"final_logit_softcapping": 20.0}, "final_logit_softcapping"),
        ({"hidden_act": "relu2"}, "hidden_act"),
        ({"rms_norm_eps": 0.1}, "rms_norm_eps"),
        ({"intermediate_size": 100}, "intermediate_size"),
        ({"hidden_size": "wide"}, r"config\.json"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters"),
    ],
)
def test_another_model_is_refused(exported: Path, tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    shutil.copytree(exported, tmp_path / "copy")
    config = tmp_path / "copy" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=sentence):
        read_model(str(tmp_path / "copy"))


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10_000_000}, {"num_hidden_layers": 1000}, {"hidden_size": 2**40}, {"vocab_size": 10**9},
        {"max_position_embeddings": 10**12}, {"num_attention_heads": 0}, {"num_labels": 10**9},
        {"auto_map": {"AutoConfig": "run.Config"}}, {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"attn_implementation": "somebody/kernels"},
    ],
    ids=str,
)  # fmt: skip
def test_absurd_sizes_and_foreign_code_are_refused_at_once(
    exported: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    shutil.copytree(exported, tmp_path / "copy")
    (tmp_path / "copy" / "run.py").write_text("raise SystemExit('this code must not run')")
    config = tmp_path / "copy" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    start = time.monotonic()
    with pytest.raises(UserError):
        read_model(str(tmp_path / "copy"))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("pattern", ["(a+)+$", r"\p{L}+", r"\s+|\S+"])
def test_a_tokenizer_with_another_pattern_is_refused(exported: Path, tmp_path: Path, pattern: str) -> None:
    parsed = json.loads((exported / "tokenizer.json").read_text())
    parsed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    (tmp_path / "tokenizer.json").write_text(json.dumps(parsed))
    with pytest.raises(UserError, match="pattern"):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_a_pipe_in_place_of_the_weights_is_not_opened(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(UserError, match=r"model\.safetensors.*not a regular file"):
        read_model(str(tmp_path / "copy"))


@pytest.mark.parametrize(
    ("rope", "sentence"),
    [(None, "rope_parameters"), ({"rope_type": "default", "rope_theta": 1e4}, "norms or activations.*alpha")],
)
def test_other_apertus_models_are_refused(tmp_path: Path, rope: dict[str, Any] | None, sentence: str) -> None:
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = ApertusConfig(vocab_size=576, rope_parameters=rope, **shape)  # None: Apertus' own, scaled like Llama 3's
    ApertusForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=sentence):
        read_model(str(tmp_path))


def test_another_rope_theta_and_eps_are_honoured(exported: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    config = json.loads(path.read_text()) | {"rms_norm_eps": 1e-6}
    config["rope_parameters"]["rope_theta"] = 500.0
    path.write_text(json.dumps(config))
    found = read_model(str(tmp_path / "copy"))
    assert found.model.config.rope_theta == 500.0
    passages = verify.held_out_passages((), tokenizer, 64)
    assert verify.check_logits(found.model, tmp_path / "copy", passages).agreement == 1.0


def test_weights_of_other_shapes_get_a_sentence(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "copy")
    weights = load_file(exported / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] = torch.ones(3, 3)
    save_file(weights, tmp_path / "copy" / "model.safetensors")
    with pytest.raises(UserError, match=r"shape.*layers\.1\.mlp\.fc2\.weight"):
        read_model(str(tmp_path / "copy"))


def test_an_embedding_that_outgrew_its_norm_is_refused(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "copy")
    weights = load_file(exported / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 1.3
    save_file(weights, tmp_path / "copy" / "model.safetensors")
    with pytest.raises(UserError, match=r"embedding.*docs/scaling\.md"):
        read_model(str(tmp_path / "copy"))


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_original(tmp_path, tokenizer)
    larger = Tokenizer.train(demo_data.documents("train")[:300], vocab_size=700)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding(larger)))
    with pytest.raises(UserError, match=r"576.*700"):
        read_model(str(tmp_path))


@pytest.mark.parametrize(
    "card", ["---\nnanochat: 7\n---\n", "---\nnanochat: {stage: x, step: y}\n---\n", "---\n: :\n---\n"]
)
def test_a_card_with_rubbish_says_nothing(exported: Path, tmp_path: Path, card: str) -> None:
    shutil.copytree(exported, tmp_path / "their-base")
    (tmp_path / "their-base" / "README.md").write_text(card)
    found = read_model(str(tmp_path / "their-base"))
    assert (found.stage, found.step) == ("base", 0)


def test_missing_weights_are_named(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "copy")
    weights = load_file(exported / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "copy" / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.fc2\.weight"):
        read_model(str(tmp_path / "copy"))


@pytest.mark.parametrize(
    ("origin", "stage"),
    [
        ("ada/nanochat-d20-base", "base"), ("/x/chatrl_checkpoints/d20", "rl"), ("/x/mid_checkpoints/d20", "mid"),
        ("karpathy/nanochat-d32", "sft"), ("ada/database", "sft"), ("ada/My-Base-v2", "base"),
    ],
)  # fmt: skip
def test_the_stage_by_the_name(origin: str, stage: str) -> None:
    assert stage_in_name(origin) == stage


def test_transformers_files_are_preferred() -> None:
    theirs = ["model_000650.pt", "meta_000650.json", "tokenizer.pkl", "README.md"]
    assert files_to_download(theirs) == theirs[:3]
    chosen = files_to_download([*theirs, "config.json", "model.safetensors", "m-q8_0.gguf", "Modelfile", "template"])
    assert chosen == ["model.safetensors", "config.json", "README.md"]


def test_an_imported_model_is_shared_with_its_origin_named(
    hub: FakeHub, exported: Path, base_dir: Path, tokenizer: Tokenizer
) -> None:
    from nanochat.hub.card import base_model
    from tests.hub.conftest import ADA

    files = {path.name: StoredFile(path.read_bytes(), True) for path in exported.iterdir()}
    hub.repositories["bob/small"] = Repository(branches={"main": files})
    import_hf.main(Options("bob/small", stage="mid"))
    grown = save_model(tokenizer, "sft", "small", parent=checkpoint.find("mid", "small"))
    assert base_model(checkpoint.find("mid", "small"), ADA) == base_model(grown, ADA) == "bob/small"
    hf_prepare.main(hf_prepare.Options(author="ada", output=base_dir / "out"))
    cards = [path.read_text() for path in (base_dir / "out").glob("*/README.md")]
    assert len(cards) == 2 and all("starting from bob/small" in card for card in cards)
