"""hf_prepare.sh --gguf writes files that llama.cpp and Ollama run, and rejects a file that differs from the model."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from nanochat import cli
from nanochat.errors import UserError
from nanochat.hub import gguf_file, verify, verify_gguf
from nanochat.hub.convert_tokenizer import write_tokenizer
from nanochat.hub.gguf_file import TYPES, write_gguf
from nanochat.hub.verify_gguf import GgufModel
from nanochat.model.gpt import GPT
from nanochat.tokenizer import ORIGINAL_PATTERN, SPECIAL_TOKENS, Tokenizer
from scripts import hf_prepare
from scripts.hf_prepare import Options
from tests.conftest import random_model
from tests.hub.conftest import ADA, save_model

CPU = torch.device("cpu")
LLAMA_SERVER = os.environ.get("NANOCHAT_LLAMA_SERVER") or shutil.which("llama-server")


@pytest.fixture(scope="module")
def passages(tokenizer: Tokenizer) -> verify.Passages:
    found = verify.held_out_passages((), tokenizer, 64)
    return found._replace(rows=found.rows[:8])


def written(folder: Path, tokenizer: Tokenizer, model: GPT, kind: str) -> Path:
    write_tokenizer(tokenizer, 64, folder)
    path = folder / f"small-{kind}.gguf"
    write_gguf(path, kind, model.state_dict(), model.config, ADA)
    return path


def padding(tokenizer: Tokenizer) -> list[int]:
    return list(range(tokenizer.vocab_size, 576))


@pytest.mark.parametrize(
    ("kind", "matrices", "limit"),
    [("f32", Type.F32, 1e-6), ("f16", Type.F16, 1e-3), ("bf16", Type.BF16, 1e-2), ("q8_0", Type.Q8_0, 2e-2)],
)
def test_the_file_holds_the_model(
    tokenizer: Tokenizer, passages: verify.Passages, tmp_path: Path, kind: str, matrices: Type, limit: float
) -> None:
    model = random_model(vocab_size=576, n_head=4, n_kv_head=2).eval()
    path = written(tmp_path, tokenizer, model, kind)
    types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    norms = {name for name in types if "norm" in name}
    assert len(norms) == 9 and {types.pop(name) for name in norms} == {Type.F32}
    assert set(types.values()) == {matrices} and len(types) == 2 + 6 * 2
    file = GgufModel(path, CPU)
    assert verify.compare(model, file, passages).error < limit


def test_rows_that_do_not_fill_a_block_are_not_quantized(
    tokenizer: Tokenizer, passages: verify.Passages, tmp_path: Path
) -> None:
    model = random_model(vocab_size=576, n_embd=48, n_head=2, n_kv_head=2).eval()
    path = written(tmp_path, tokenizer, model, "q8_0")
    types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.0.ffn_up.weight"] == Type.F16 and types["blk.0.ffn_down.weight"] == Type.Q8_0
    assert verify.compare(model, GgufModel(path, CPU), passages).error < 0.02


def test_metadata_that_llama_cpp_reads(exported: Path, tokenizer: Tokenizer) -> None:
    metadata = GgufModel(exported / "nanochat-d2-sft-q8_0.gguf", CPU).metadata
    assert metadata["general.name"] == "nanochat-d2-sft" and metadata["general.author"] == "Ada Example"
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", "llama-bpe")
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.special("<|assistant_end|>")
    assert metadata["tokenizer.ggml.eom_token_id"] == tokenizer.bos_id
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata[gguf_file.SUPPRESS_TOKENS] == padding(tokenizer)
    kinds = metadata["tokenizer.ggml.token_type"]
    assert [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.UNUSED] == padding(tokenizer)
    special = [metadata["tokenizer.ggml.tokens"][i] for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    assert special == list(SPECIAL_TOKENS)
    assert metadata["xielu.alpha_p"] == [16.0, 16.0] and metadata["context_length"] == 64
    assert metadata["general.sampling.top_k"] == 50
    assert metadata["tokenizer.chat_template"] == (exported / "chat_template.jinja").read_text()


def flip_keys(file: GgufModel) -> None:
    file.weights["blk.1.attn_k"] *= -1


def unrotated(file: GgufModel) -> None:
    file.weights["blk.0.attn_q"][32:64] *= -1


def another_activation(file: GgufModel) -> None:
    file.metadata["xielu.beta"] = [5.0, 5.0]


def another_base(file: GgufModel) -> None:
    file.metadata["rope.freq_base"] = 500.0


@pytest.mark.parametrize("damage", [flip_keys, unrotated, another_activation, another_base])
def test_a_changed_model_is_noticed(
    exported: Path, passages: verify.Passages, damage: Callable[[GgufModel], None]
) -> None:
    path = exported / "nanochat-d2-sft-q8_0.gguf"
    model = random_model(vocab_size=576).eval()
    file = GgufModel(path, CPU)
    assert verify_gguf.check_logits(model, file, "q8_0", passages).agreement > 0.9
    damage(file)
    with pytest.raises(UserError, match="q8_0"):
        verify_gguf.check_logits(model, file, "q8_0", passages)


def test_a_changed_merge_is_noticed(exported: Path, tokenizer: Tokenizer) -> None:
    file = GgufModel(exported / "nanochat-d2-sft-q8_0.gguf", CPU)
    merges = file.metadata["tokenizer.ggml.merges"]
    del merges[:5]
    with pytest.raises(UserError, match="ids"):
        verify_gguf.check_token_ids(tokenizer, file)


def test_modelfile_and_the_hub_s_files_for_ollama(exported: Path) -> None:
    modelfile = (exported / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./nanochat-d2-sft-q8_0.gguf\n")
    template, params = (exported / "template").read_text(), json.loads((exported / "params").read_text())
    assert f'TEMPLATE """{template}"""\n' in modelfile and template.endswith("<|assistant_start|>")
    assert params["stop"] == ["<|assistant_end|>", "<|bos|>"] and params["num_ctx"] == 64
    assert all(f"PARAMETER {name} {params[name]}\n" in modelfile for name in ("temperature", "top_k", "num_ctx"))
    assert 'PARAMETER stop "<|bos|>"' in modelfile
    card = (exported / "README.md").read_text()
    assert "ollama run hf.co/ada/nanochat-d2-sft:Q8_0" in card and "ApertusForCausalLM" in card


RENDER = """package main
import ("encoding/json"; "os"; "strings"; "text/template")
type Message struct{ Role, Content string }
func main() {
	source, _ := os.ReadFile(os.Args[1])
	parsed := template.Must(template.New("").Parse(string(source)))
	var conversations [][]Message
	json.NewDecoder(os.Stdin).Decode(&conversations)
	rendered := []string{}
	for _, messages := range conversations {
		system := ""
		if messages[0].Role == "system" { system = messages[0].Content }
		var b strings.Builder
		if err := parsed.Execute(&b, map[string]any{"System": system, "Messages": messages}); err != nil { panic(err) }
		rendered = append(rendered, b.String())
	}
	json.NewEncoder(os.Stdout).Encode(rendered)
}
"""
"""Renders a template as Ollama does, which passes all messages and the system message."""


@pytest.mark.skipif(not shutil.which("go"), reason="needs Go")
def test_ollama_s_template_renders_our_chat_format(exported: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    conversations = verify_gguf.plain_prompts()
    (tmp_path / "main.go").write_text(RENDER)
    rendered = subprocess.run(
        ["go", "run", tmp_path / "main.go", exported / "template"],
        input=json.dumps(conversations),
        env=os.environ | {"GOCACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [tokenizer.decode(tokenizer.render_prompt(messages)) for messages in conversations]
    assert json.loads(rendered.stdout) == expected and len(expected) > 30


@pytest.mark.skipif(not LLAMA_SERVER, reason="needs llama-server on PATH or in NANOCHAT_LLAMA_SERVER")
def test_llama_cpp_computes_the_same(
    exported: Path, tokenizer: Tokenizer, passages: verify.Passages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_gguf, "NUM_SERVER_TEXTS", 50)
    path = exported / "nanochat-d2-sft-q8_0.gguf"
    assert LLAMA_SERVER
    line = verify_gguf.check_llama_server(LLAMA_SERVER, path, "q8_0", tokenizer, GgufModel(path, CPU), passages)
    assert "50 texts" in line and not list(exported.glob("*.log"))


def test_a_program_that_is_not_llama_server_is_refused(exported: Path) -> None:
    with (
        pytest.raises(UserError, match="cannot serve"),
        verify_gguf.llama_server("/bin/false", exported / "nanochat-d2-sft-q8_0.gguf"),
    ):
        pass
    assert not list(exported.glob("*.log"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--gguf", "q4_k"], "--gguf.*q4_k"),
        (["--gguf", "q8_0,"], "--gguf"),
        (["--gguf", "--check-with", "/nowhere/llama-server"], "--check-with.*nowhere"),
        (["--gguf", "--check-with", __file__], "--check-with.*executable"),
        (["--check-with", "/bin/true"], "--gguf"),
    ],
)
def test_mistakes_get_a_sentence(base_dir: Path, options: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        hf_prepare.main(cli.parse(Options, ["--author", "ada", *options]))


@pytest.mark.parametrize(
    ("option", "types"),
    [([], []), (["--gguf"], ["q8_0", "bf16"]), (["--gguf", "f32,q8_0"], ["q8_0", "f32"]), (["--gguf", "f16"], ["f16"])],
)
def test_the_option_chooses_the_types(option: list[str], types: list[str]) -> None:
    assert hf_prepare.gguf_types(cli.parse(Options, option).gguf) == types
    assert set(types) <= set(TYPES)


@pytest.mark.parametrize("change", ["soft-cap", "pattern"])
def test_models_that_llama_cpp_cannot_run_are_refused(
    base_dir: Path, tokenizer: Tokenizer, tmp_path: Path, change: str
) -> None:
    found = save_model(tokenizer if change == "soft-cap" else Tokenizer(tokenizer.ranks, ORIGINAL_PATTERN))
    if change == "soft-cap":
        meta: dict[str, Any] = json.loads((found.folder / "meta.json").read_text())
        del meta["model_config"]["logit_softcap"]
        (found.folder / "meta.json").write_text(json.dumps(meta | {"architecture": "nanochat-1"}))
    with pytest.raises(UserError, match=r"llama\.cpp.*--gguf"):
        hf_prepare.main(Options(author="ada", output=tmp_path / "out", gguf=()))
    assert not (tmp_path / "out").exists()
