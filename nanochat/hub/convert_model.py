"""The model in transformers' terms: config.json, the names of the tensors, and the way back."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
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
MAX_SHARD_SIZE = "5GB"
MOST_EPS = 1e-5
"""Of RMSNorm. Activations have a mean square near 1, so that no eps below this can be told from another."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and warnings to itself."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def transformers_config(config: GPTConfig, tokenizer: Tokenizer) -> NanoChatConfig:
    """config.json of a model of this shape.

    There is no padding id: torch would keep that row of the embedding from ever being trained again.
    """
    return NanoChatConfig(
        **hf_shape(config),
        architectures=[ARCHITECTURE],
        dtype=torch.bfloat16,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.special("<|assistant_end|>"),
        pad_token_id=None,
    )


def hf_shape(config: GPTConfig) -> dict[str, Any]:
    """Shape and arithmetic of the model, by the names of NanoChatConfig."""
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


def generation_config(config: GPTConfig, tokenizer: Tokenizer) -> GenerationConfig:
    """generation_config.json: what this project's own chat does when nothing else is asked for.

    A reply ends with <|assistant_end|>, a document with the <|bos|> of the next. Ids that only pad the vocabulary are
    never sampled.
    """
    return GenerationConfig(
        bos_token_id=tokenizer.bos_id,
        eos_token_id=[tokenizer.special("<|assistant_end|>"), tokenizer.bos_id],
        pad_token_id=tokenizer.bos_id,
        do_sample=True,
        temperature=CHAT_SAMPLING.temperature,
        top_k=CHAT_SAMPLING.top_k,
        max_new_tokens=min(CHAT_SAMPLING.max_tokens, config.sequence_len // 2),
        suppress_tokens=list(range(tokenizer.vocab_size, config.vocab_size)) or None,
    )


def hf_name(name: str) -> str:
    """What transformers calls our tensor `name`."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def check_tensors(found: Collection[str], config: GPTConfig, where: str) -> None:
    """Raise UserError, naming them, if tensors (by our names) are there that the class does not know, or lack."""
    with torch.device("meta"):
        known = set(GPT(config).state_dict())
    strange, lacking = sorted(set(found) - known), sorted(known - set(found))
    if strange:
        raise UserError(
            f"{where} has tensors that {ARCHITECTURE} does not know, such as {', '.join(strange[:5])}: it is a model "
            "of another architecture, which cannot be converted"
        )
    if lacking:
        raise UserError(f"{where} lacks tensors, such as {', '.join(lacking[:5])}: it is not a whole model")


def write_model(
    weights: dict[str, Tensor],
    config: GPTConfig,
    tokenizer: Tokenizer,
    folder: Path,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write config.json, generation_config.json and the weights, by our names, in bfloat16 as transformers does."""
    theirs = {hf_name(name): tensor.bfloat16() for name, tensor in weights.items()}
    with torch.device("meta"):
        model = NanoChatForCausalLM(transformers_config(config, tokenizer))
    model.load_state_dict(theirs, strict=True, assign=True)
    model.generation_config = generation_config(config, tokenizer)
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=max_shard_size)


def our_config(theirs: dict[str, Any], where: str) -> GPTConfig:
    """The shape that a config.json describes. Raises UserError if this project has no such model."""
    if ARCHITECTURE not in (theirs.get("architectures") or []) and theirs.get("model_type") != "nanochat":
        raise UserError(
            f"{where} holds a {theirs.get('architectures') or theirs.get('model_type')}, not a {ARCHITECTURE}"
        )
    try:
        config = NanoChatConfig(**{name: value for name, value in theirs.items() if name != "architectures"})
        rope = dict(config.rope_parameters or {})
        width, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
        differences = {
            "intermediate_size": config.intermediate_size != 4 * width,
            "hidden_act": config.hidden_act != "relu2",
            "final_logit_softcapping": config.final_logit_softcapping != LOGIT_SOFTCAP,
            "rms_norm_eps": not 0 < config.rms_norm_eps <= MOST_EPS,
            "attention_bias": config.attention_bias,
            "tie_word_embeddings": config.tie_word_embeddings,
            "head_dim": getattr(config, "head_dim", None) not in (None, head_dim),
            "rope_parameters": rope.get("rope_type", "default") != "default",
        }
        if wrong := [name for name, differs in differences.items() if differs]:
            raise UserError(
                f"{where} has another arithmetic than this project's model ({', '.join(wrong)}): it cannot be imported"
            )
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
        raise UserError(f"config.json of {where} cannot be read ({error}): it is damaged") from None
