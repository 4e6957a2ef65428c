"""Convert our model to transformers' NanoChatForCausalLM and back: config.json and the names of the tensors."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import GenerationConfig, NanoChatConfig, NanoChatForCausalLM
from transformers.utils import logging

from nanochat.errors import UserError
from nanochat.inference.sampling_params import CHAT_SAMPLING
from nanochat.model.gpt import GPT, LOGIT_SOFTCAP, RMS_NORM_EPS, GPTConfig
from nanochat.tokenizer import Tokenizer

ARCHITECTURE = "NanoChatForCausalLM"
MAX_RMS_NORM_EPS = 1e-5
"""Activations have a mean square near 1, so any epsilon below this gives the same result."""

# Exports and imports print their own lines.
logging.set_verbosity_error()
logging.disable_progress_bar()


def hf_shape(config: GPTConfig) -> dict[str, Any]:
    """Shape and arithmetic of the model as arguments of NanoChatConfig."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "rms_norm_eps": RMS_NORM_EPS,
        "final_logit_softcapping": LOGIT_SOFTCAP,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def hf_name(name: str) -> str:
    """Name in transformers of our tensor `name`."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def build_model(weights: dict[str, Tensor], config: GPTConfig, where: str) -> GPT:
    """Our model with these weights (by our names), on the CPU in float32. Raises UserError if they do not match."""
    model = GPT(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # names missing tensors, unknown ones and other shapes
        reason = " ".join(str(error).split())
        raise UserError(f"the tensors of {where} are not those of a {ARCHITECTURE} of its config: {reason}") from None
    return model.eval()


def write_model(
    weights: dict[str, Tensor],
    config: GPTConfig,
    tokenizer: Tokenizer,
    folder: Path,
    max_shard_size: str = "5GB",
) -> None:
    """Write config.json, generation_config.json and, in bfloat16, the weights, which have our names.

    config.json has no padding id, because torch would never train that row of the embedding again.
    generation_config.json has the defaults of our own chat. A reply ends with <|assistant_end|>, a document with the
    <|bos|> of the next one, and ids that only pad the vocabulary are never sampled.
    """
    bos, end = tokenizer.bos_id, tokenizer.special("<|assistant_end|>")
    with torch.device("meta"):
        model = NanoChatForCausalLM(
            NanoChatConfig(
                **hf_shape(config),
                architectures=[ARCHITECTURE],
                dtype=torch.bfloat16,
                tie_word_embeddings=False,
                bos_token_id=bos,
                eos_token_id=end,
                pad_token_id=None,
            )
        )
    model.load_state_dict({hf_name(name): tensor.bfloat16() for name, tensor in weights.items()}, assign=True)
    model.generation_config = GenerationConfig(
        bos_token_id=bos,
        eos_token_id=[end, bos],
        pad_token_id=bos,
        do_sample=True,
        temperature=CHAT_SAMPLING.temperature,
        top_k=CHAT_SAMPLING.top_k,
        max_new_tokens=min(CHAT_SAMPLING.max_tokens, config.sequence_len // 2),
        suppress_tokens=list(range(tokenizer.vocab_size, config.vocab_size)) or None,
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def read_config(stored: dict[str, Any], where: str) -> GPTConfig:
    """The shape that a config.json describes. Raises UserError if our model does not compute the same function."""
    if ARCHITECTURE not in (stored.get("architectures") or []) and stored.get("model_type") != "nanochat":
        kind = stored.get("architectures") or stored.get("model_type")
        raise UserError(f"{where} must be a {ARCHITECTURE}, got {kind}: other architectures are not supported")
    try:
        config = NanoChatConfig(**{name: value for name, value in stored.items() if name != "architectures"})
        rope = dict(config.rope_parameters or {})
        width = config.hidden_size
        differs = {
            "intermediate_size": config.intermediate_size != 4 * width,
            "hidden_act": config.hidden_act != "relu2",
            "final_logit_softcapping": config.final_logit_softcapping != LOGIT_SOFTCAP,
            "rms_norm_eps": not 0 < config.rms_norm_eps <= MAX_RMS_NORM_EPS,
            "attention_bias": config.attention_bias,
            "tie_word_embeddings": config.tie_word_embeddings,
            "head_dim": getattr(config, "head_dim", None) not in (None, width // config.num_attention_heads),
            "rope_parameters": rope.get("rope_type", "default") != "default",
        }
        if any(differs.values()):
            names = ", ".join(name for name in differs if differs[name])
            raise UserError(f"{where} has settings that this project's model does not support ({names})")
        return GPTConfig(
            vocab_size=config.vocab_size,
            sequence_len=config.max_position_embeddings,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_kv_head=config.num_key_value_heads or config.num_attention_heads,
            n_embd=width,
            rope_theta=float(rope.get("rope_theta", GPTConfig.rope_theta)),
        )
    except (TypeError, ValueError, ZeroDivisionError, StrictDataclassError) as error:
        raise UserError(f"config.json of {where} is invalid ({error}): copy it again") from None
