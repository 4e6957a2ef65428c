"""Write a model as GGUF files, which llama.cpp, Ollama and LM Studio run, and the files that Ollama reads with them.

llama.cpp's `apertus` architecture computes the same function as transformers' ApertusForCausalLM, so the weights come
from `convert_model`. The `gguf` package provides tensor names, metadata keys and quantization.
"""

import json
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from nanochat.errors import UserError
from nanochat.hub.card import Publisher
from nanochat.hub.convert_model import XIELU, hf_weights
from nanochat.hub.convert_tokenizer import TOKENIZER_FILE
from nanochat.inference.sampling_params import CHAT_SAMPLING
from nanochat.model.gpt import RMS_NORM_EPS, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

ARCHITECTURE = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.APERTUS]
TYPES = {
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
}
"""Types that --gguf accepts, of tensors and of the file. Ollama gets the first one that is written."""
DEFAULT_TYPES = ("bf16", "q8_0")
PRE_TOKENIZER = "llama-bpe"  # llama.cpp's name of `tokenizer.SPLIT_PATTERN`.
SUPPRESS_TOKENS = "tokenizer.ggml.suppress_tokens"
"""llama.cpp never samples these. Later versions of the `gguf` package have a name for the key."""


def check_supported(config: GPTConfig, tokenizer: Tokenizer, where: str) -> None:
    """Raise UserError if llama.cpp does not support the model or its tokenizer."""
    problem = None
    if config.logit_softcap:
        problem = "caps its logits, which llama.cpp's apertus architecture does not"
    elif tokenizer.pattern != SPLIT_PATTERN:
        problem = "has a tokenizer with another split pattern, which llama.cpp does not know"
    if problem:
        raise UserError(f"{where} {problem}: leave out --gguf, or train a new model with this version")


def write_gguf(path: Path, kind: str, weights: dict[str, Tensor], config: GPTConfig, publisher: Publisher) -> None:
    """Write `weights`, which have our names, with the tokenizer and the chat template in the same folder.

    Matrices get the type `kind`, gains of norms stay float32. Tensors are quantized and written one at a time.
    """
    tensor_type, file_type = TYPES[kind]
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(path.stem.removesuffix(f"-{kind}"))
    writer.add_author(publisher.name)
    writer.add_license(publisher.license)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_sampling_temp(CHAT_SAMPLING.temperature)
    writer.add_sampling_top_k(CHAT_SAMPLING.top_k or 0)
    writer.add_sampling_top_p(CHAT_SAMPLING.top_p)
    writer.add_sampling_min_p(CHAT_SAMPLING.min_p)
    _add_shape(writer, config)
    _add_tokenizer(writer, path.parent, config.vocab_size)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.APERTUS, config.n_layer)
    tensors = {
        name: weight
        for hf_name, weight in hf_weights(weights, config).items()
        if (name := names.get_name(hf_name, try_suffixes=(".weight",)))  # the activation's parameters are metadata
    }
    types = {name: _tensor_type(weight, tensor_type) for name, weight in tensors.items()}
    for name, weight in tensors.items():
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[types[name]]
        num_bytes = weight.numel() // block_size * block_bytes
        writer.add_tensor_info(name, weight.shape, np.dtype(np.float32), num_bytes, types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, weight in tensors.items():
        writer.write_tensor_data(gguf.quants.quantize(weight.float().cpu().numpy(), types[name]))
    writer.close()


def _tensor_type(weight: Tensor, preferred: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    if weight.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    block_size = gguf.GGML_QUANT_SIZES[preferred][0]
    return gguf.GGMLQuantizationType.F16 if weight.size(1) % block_size else preferred


def _add_shape(writer: gguf.GGUFWriter, config: GPTConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.sequence_len)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(RMS_NORM_EPS)
    writer.add_xielu_alpha_p([XIELU["alpha_p"]] * config.n_layer)
    writer.add_xielu_alpha_n([XIELU["alpha_n"]] * config.n_layer)
    writer.add_xielu_beta([XIELU["beta"]] * config.n_layer)
    writer.add_xielu_eps([XIELU["eps"]] * config.n_layer)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Add the tokenizer of tokenizer.json, and the chat template, which writes <|bos|> itself.

    A reply ends with <|assistant_end|> (end of sequence) or with the <|bos|> of a next document (end of message).
    """
    model = json.loads((folder / TOKENIZER_FILE).read_text())["model"]
    ids = {name: len(model["vocab"]) + i for i, name in enumerate(SPECIAL_TOKENS)} | model["vocab"]
    tokens = sorted(ids, key=ids.__getitem__)
    padding = range(len(tokens), vocab_size)
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL_TOKENS else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list([*tokens, *(f"<|padding_{i}|>" for i in padding)])
    writer.add_token_types([*kinds, *(gguf.TokenType.UNUSED for _ in padding)])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_array(SUPPRESS_TOKENS, list(padding))
    writer.add_bos_token_id(ids["<|bos|>"])
    writer.add_eos_token_id(ids["<|assistant_end|>"])
    writer.add_eom_token_id(ids["<|bos|>"])
    writer.add_pad_token_id(ids["<|bos|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def write_ollama_files(gguf_path: Path, config: GPTConfig, source: str) -> None:
    """Write Modelfile for `ollama create`, and template and params, which the hub passes to `ollama run hf.co/...`."""
    template = "<|bos|>{{ .Prompt }}"
    if source != "base":
        template = Path(__file__).with_name("ollama_template.gotmpl").read_text().strip()
    stop = ["<|assistant_end|>", "<|bos|>"]
    parameters = {
        "num_ctx": config.sequence_len,
        "temperature": CHAT_SAMPLING.temperature,
        "top_k": CHAT_SAMPLING.top_k,
        "top_p": CHAT_SAMPLING.top_p,
        "repeat_penalty": CHAT_SAMPLING.repetition_penalty,
    }
    lines = [f"FROM ./{gguf_path.name}", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    lines += [f'PARAMETER stop "{token}"' for token in stop]
    folder = gguf_path.parent
    (folder / "Modelfile").write_text("\n".join(lines) + "\n")
    (folder / "template").write_text(template)
    (folder / "params").write_text(json.dumps(parameters | {"stop": stop}, indent=2) + "\n")
