"""Other people's models: read, proved, kept, and nothing of theirs run."""

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import ApertusConfig, ApertusForCausalLM

from nanochat import paths
from nanochat.data import download
from nanochat.errors import UserError
from nanochat.hub import verify
from nanochat.hub.convert_model import hf_weights
from nanochat.hub.convert_tokenizer import read_tokenizer
from nanochat.hub.import_model import files_to_download, read_model, stage_in_name
from nanochat.inference.chat import load_chat
from nanochat.inference.sampling_params import SamplingParams
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint
from scripts import hf_prepare, import_hf
from scripts.import_hf import Options
from tests.hub.conftest import save_model
from tests.hub.fake_hub import FakeHub, Repository, StoredFile


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
