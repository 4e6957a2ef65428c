"""hf_prepare.sh exports the trained model, and rejects a model that differs from it."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanochat import cli, paths
from nanochat.data import demo_data
from nanochat.data.token_writer import TextShard, write_shards
from nanochat.errors import UserError
from nanochat.hub import verify
from nanochat.hub.convert_model import _unit_rows, round_weights, write_model
from nanochat.hub.convert_tokenizer import read_tokenizer, write_tokenizer
from nanochat.model.gpt import GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.train.checkpoint import META_FILE
from scripts import hf_prepare
from scripts.hf_prepare import Options
from tests.conftest import random_model
from tests.hub.conftest import save_model


def passages(tokenizer: Tokenizer) -> verify.Passages:
    return verify.held_out_passages((), tokenizer, 64)


def test_transformers_loads_the_folder_and_writes_what_we_would(exported: Path, tokenizer: Tokenizer) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    model, loading = loaded
    assert type(model).__name__ == "ApertusForCausalLM" and model.dtype == torch.bfloat16
    assert not any(loading.values())
    theirs: Any = AutoTokenizer.from_pretrained(exported)
    chat = [{"role": "user", "content": "Hi"}]
    inputs = theirs.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert inputs["input_ids"][0].tolist() == tokenizer.render_prompt([{"role": "user", "content": "Hi"}])
    reply = model.generate(**inputs, do_sample=False)[0]
    assert inputs["input_ids"].size(1) < len(reply) <= inputs["input_ids"].size(1) + 32  # half the context


def test_the_files_say_what_older_readers_need(exported: Path, tokenizer: Tokenizer) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["ApertusForCausalLM"]
    assert config["intermediate_size"] == 4 * config["hidden_size"] and config["rms_norm_eps"] == 1.1920929e-07
    assert config["pad_token_id"] is None and config["vocab_size"] == 576 > tokenizer.vocab_size
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 10000.0 and config["rope_scaling"] is None
    assert (config["mlp_bias"], config["post_norm"], config["qk_norm"]) == (False, False, True)
    assert json.loads((exported / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"][0] == tokenizer.special("<|assistant_end|>")
    assert (generation["temperature"], generation["top_k"]) == (0.8, 50)
    assert generation["suppress_tokens"] == list(range(tokenizer.vocab_size, 576))
    assert not any(path.name.startswith(".") for path in exported.parent.iterdir())


def test_the_token_ids_are_ours(exported: Path, tokenizer: Tokenizer) -> None:
    assert verify.check_token_ids(tokenizer, exported) == 5000
    assert read_tokenizer(exported / "tokenizer.json").hash == tokenizer.hash


def test_the_texts_are_many_and_of_every_kind() -> None:
    texts = verify.sample_texts(5000)
    assert len(texts) == 5000 and len(set(texts)) > 4500 and texts == verify.sample_texts(5000)
    assert all(any(name in text for text in texts) for name in SPECIAL_TOKENS)
    for kind in ("🚀", "def f(", "12", "的", "\t", "\x00", "'LL"):
        assert any(kind in text for text in texts)


def test_another_pattern_is_noticed(exported: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = Tokenizer(tokenizer.ranks, tokenizer.pattern.replace("{1,3}", "{1,1}"))
    write_tokenizer(other, 64, tmp_path)
    with pytest.raises(UserError, match="ids"):
        verify.check_token_ids(tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("ours", "wrong"), [("~ '\\n\\n'", "~ '\\n'"), ("'<|bos|>'", "''"), ("<|output_start|>", "<|python_start|>")]
)
def test_another_chat_template_is_noticed(
    exported: Path, tokenizer: Tokenizer, tmp_path: Path, ours: str, wrong: str
) -> None:
    assert verify.check_chat_template(tokenizer, exported) == 120
    shutil.copytree(exported, tmp_path / "copy")
    template = tmp_path / "copy" / "chat_template.jinja"
    assert ours in template.read_text()
    template.write_text(template.read_text().replace(ours, wrong))
    with pytest.raises(UserError, match="differs from ours"):
        verify.check_chat_template(tokenizer, tmp_path / "copy")


def test_the_template_takes_openai_s_parts_and_refuses_what_is_no_conversation(exported: Path) -> None:
    theirs: Any = AutoTokenizer.from_pretrained(exported)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert theirs.apply_chat_template(parts, tokenize=False) == "<|bos|><|user_start|>Hi<|user_end|>"
    for roles in (["assistant"], ["user", "user"], ["user", "system"], ["tool"]):
        with pytest.raises(Exception, match="take turns"):
            theirs.apply_chat_template([{"role": role, "content": "x"} for role in roles], tokenize=False)


@pytest.mark.parametrize("shape", [{}, {"n_head": 4, "n_kv_head": 2}, {"logit_softcap": 15.0}])
def test_logits_are_those_of_the_rounded_model(tokenizer: Tokenizer, tmp_path: Path, shape: dict[str, Any]) -> None:
    model = random_model(vocab_size=576, depth=4, **shape).eval()
    original = copy.deepcopy(model)
    round_weights(model)
    rounding = verify.compare(original, model, passages(tokenizer))
    assert rounding.loss != rounding.other_loss == pytest.approx(rounding.loss, rel=1e-2)
    write_model(model.state_dict(), model.config, tokenizer, tmp_path)
    result = verify.check_logits(model, tmp_path, passages(tokenizer))
    assert result.largest < 1e-4 and result.agreement == 1.0 and passages(tokenizer).tokens == 64 * 64


def test_a_changed_weight_is_noticed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(vocab_size=576).eval()
    round_weights(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["layers.1.self_attn.v_proj.weight"] *= 1.02
    write_model(weights, model.config, tokenizer, tmp_path)
    with pytest.raises(UserError, match="transformers"):
        verify.check_logits(model, tmp_path, passages(tokenizer))


@pytest.mark.parametrize("change", ["drop", "add"])
def test_tensors_that_are_not_the_class_s_are_noticed(
    exported: Path, tokenizer: Tokenizer, tmp_path: Path, change: str
) -> None:
    shutil.copytree(exported, tmp_path / "copy")
    tensors = load_file(exported / "model.safetensors")
    if change == "drop":
        del tensors["model.layers.0.mlp.up_proj.weight"]
    else:
        tensors["model.smear"] = torch.ones(2)
    save_file(tensors, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"(missing|unexpected)_keys"):
        verify.check_logits(random_model(vocab_size=576), tmp_path / "copy", passages(tokenizer))


def test_large_weights_are_written_in_shards(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(vocab_size=576).eval()
    round_weights(model)
    write_model(model.state_dict(), model.config, tokenizer, tmp_path, max_shard_size="400KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert verify.check_logits(model, tmp_path, passages(tokenizer)).agreement == 1.0


def prepare(output: Path, **options: object) -> None:
    hf_prepare.main(Options(**{"author": "ada", "output": output, **options}))  # type: ignore[arg-type]  # a test's


def test_every_stage_with_its_lineage(base_dir: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    base = save_model(tokenizer, "base")
    save_model(tokenizer, "mid", parent=base)
    prepare(tmp_path / "out", license="apache-2.0")
    cards = {path.parent.name: ModelCard.load(path) for path in (tmp_path / "out").glob("*/README.md")}
    assert set(cards) == {"nanochat-d2-base", "nanochat-d2-mid"}
    assert cards["nanochat-d2-mid"].data.base_model == "ada/nanochat-d2-base"
    assert cards["nanochat-d2-base"].data.base_model is None
    assert {card.data.license for card in cards.values()} == {"apache-2.0"}
    assert "apache-2.0" in (tmp_path / "out" / "nanochat-d2-base" / "LICENSE").read_text()


def test_all_stages_are_of_one_model(base_dir: Path, tokenizer: Tokenizer) -> None:
    for source, tag in (("base", "d2"), ("sft", "d9"), ("mid", "d2")):
        save_model(tokenizer, source, tag)
    assert [(found.source, found.tag) for found in hf_prepare.select("all", None)] == [("base", "d2"), ("mid", "d2")]
    assert [(found.source, found.tag) for found in hf_prepare.select("sft", None)] == [("sft", "d9")]


def test_a_folder_that_is_there_is_replaced_only_by_force(base_dir: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(tokenizer)
    folder = tmp_path / "out" / "nanochat-d2-sft"
    folder.mkdir(parents=True)
    (folder / "mine").touch()
    with pytest.raises(UserError, match="--force"):
        prepare(tmp_path / "out")
    assert (folder / "mine").exists()
    prepare(tmp_path / "out", force=True)
    assert not (folder / "mine").exists() and (folder / "model.safetensors").exists()


def test_a_checkpoint_of_another_architecture_is_refused(base_dir: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = save_model(tokenizer)
    meta = json.loads((found.folder / META_FILE).read_text())
    (found.folder / META_FILE).write_text(json.dumps(meta | {"architecture": "nanochat-9"}))
    with pytest.raises(UserError, match="nanochat-9"):
        prepare(tmp_path / "out")
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--author", ""], "--author"),
        (["--author", "a/b"], "--author"),
        (["--author", "ada", "--license", "My own"], "--license"),
        (["--author", "ada", "--tag", "d9"], "d9"),
    ],
)
def test_mistakes_get_a_sentence(base_dir: Path, options: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        hf_prepare.main(cli.parse(Options, options))


def test_held_out_passages_are_the_run_s_own_where_they_are_there(base_dir: Path, tokenizer: Tokenizer) -> None:
    assert passages(tokenizer).origin == "encyclopedia val"
    shard = TextShard("val", "", partial(demo_data.documents, "val"))
    write_shards(paths.tokens_dir("climbmix"), {"val": [shard]}, tokenizer, workers=1)
    found = verify.held_out_passages(["climbmix"], tokenizer, 300)
    assert found.origin == "climbmix val" and len(found.rows) == 64
    assert [row.size(1) for row in found.rows[:3]] == [300, 128, 128]
    assert all(row[0, 0] == tokenizer.bos_id for row in found.rows)
    assert len({tuple(row[0, :50].tolist()) for row in found.rows}) == 64


def test_a_reply_ends_where_ours_does(exported: Path, tokenizer: Tokenizer) -> None:
    theirs: Any = AutoTokenizer.from_pretrained(exported)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False)
    assert rendered.endswith("<|assistant_end|>")


def test_rounded_rows_of_the_embedding_keep_their_norm() -> None:
    embedding = torch.randn(500, 1280)
    rows = _unit_rows(embedding)
    assert torch.equal(rows, rows.bfloat16().float())
    assert ((rows.double().square().mean(dim=1) - 1).abs() < 1e-6).all()
    exact = embedding * embedding.square().mean(dim=1, keepdim=True).rsqrt()
    assert ((rows - exact).norm(dim=1) < 5e-3 * exact.norm(dim=1)).all()


def test_padding_keeps_its_row(tokenizer: Tokenizer, exported: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.model.embed_tokens.padding_idx is None
    shape = GPTConfig(vocab_size=576, sequence_len=64, n_layer=2, n_head=1, n_kv_head=1, n_embd=128)
    assert model.model.embed_tokens.weight.shape == (576, 128)
    assert sum(p.numel() for p in model.parameters() if p.dim() == 2) == shape.num_parameters
