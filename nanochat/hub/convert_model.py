"""Convert our model to transformers' ApertusForCausalLM and back. Both compute the same function.

| ours | Apertus |
|---|---|
| RMSNorm of the embedding | applied to its rows |
| RMSNorm without gains | gains of 1 |
| rotation by -theta | rotation by +theta: the second half of each head's rows in q_proj and k_proj is negated |
| norm of queries and keys after the rotation | before it, which a rotation does not change |
| relu(x)^2 | xIELU of x / 4 with alpha_p = 16, alpha_n = beta = 0: 16 (x / 4)^2. The 4 is divided out of up_proj |

All of it is exact in bfloat16 too, except for the rounding of the embedding. A model with a soft-cap, which Apertus
lacks, becomes a NanoChatForCausalLM, whose tensors are ours.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    ApertusConfig,
    ApertusForCausalLM,
    GenerationConfig,
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging

from nanochat.errors import UserError
from nanochat.inference.sampling_params import CHAT_SAMPLING
from nanochat.model.gpt import GPT, MAX_SIZE, NANOCHAT_1_SOFTCAP, RMS_NORM_EPS, GPTConfig, rms_norm
from nanochat.tokenizer import Tokenizer

MAX_RMS_NORM_EPS = 1e-5  # activations have a mean square near 1, so any epsilon below this gives the same result
XIELU = {"alpha_p": 16.0, "alpha_n": -128.0, "beta": 0.0, "eps": -1e-6}
"""Parameters of the activation as stored, before softplus. softplus(16) is 16 in fp32 and bfloat16, and softplus(-128)
is 0. softplus(-100) is 4e-44, whose subnormal activations make transformers 5 times slower on a CPU. alpha_p = 1 has no
exact bfloat16 representation before softplus."""
UP_PROJ_SCALE = XIELU["alpha_p"] ** -0.5
OLDER_SETTINGS = {"rope_scaling": None, "mlp_bias": False, "post_norm": False, "qk_norm": True}
"""Settings that transformers 5 leaves out of config.json, with `rope_theta`. Without them MLX refuses the model, and
transformers 4 scales its rotary frequencies."""
UNSAFE_SETTINGS = ("auto_map", "quantization_config", "attn_implementation", "_attn_implementation")
"""Settings of a config.json by which transformers runs code from the folder or the hub, or needs other packages."""
GAINS = ("attention_layernorm", "feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm")

# Exports and imports print their own lines.
logging.set_verbosity_error()
logging.disable_progress_bar()


def hf_model(config: GPTConfig) -> PreTrainedModel:
    """Transformers' model of the same shape and arithmetic, with random weights."""
    shape: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": False,
        "pad_token_id": None,  # torch would never train that row of the embedding again
    }
    if config.logit_softcap:
        return NanoChatForCausalLM(NanoChatConfig(**shape, final_logit_softcapping=config.logit_softcap))
    return ApertusForCausalLM(ApertusConfig(**shape, hidden_act="xielu"))


def hf_weights(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Convert our fp32 tensors to transformers' names and values."""
    converted = weights if config.logit_softcap else _apertus_weights(weights, config)
    return {name if name.startswith("lm_head.") else f"model.{name}": weight for name, weight in converted.items()}


def _apertus_weights(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    converted = {"norm.weight": torch.ones(config.n_embd)}
    for name, weight in weights.items():
        if name == "embed_tokens.weight":
            weight = rms_norm(weight)
        elif name.endswith("fc1.weight"):
            weight = weight * UP_PROJ_SCALE
        renamed = name.replace("mlp.fc1", "mlp.up_proj").replace("mlp.fc2", "mlp.down_proj")
        converted[renamed] = _rotated(name, weight, config)
    for layer in range(config.n_layer):
        for gain in GAINS:
            width = config.head_dim if gain.startswith("self_attn") else config.n_embd
            converted[f"layers.{layer}.{gain}.weight"] = torch.ones(width)
        for parameter, value in XIELU.items():
            shape = (1,) if parameter.startswith("alpha") else ()
            converted[f"layers.{layer}.mlp.act_fn.{parameter}"] = torch.full(shape, value)
    return converted


@torch.no_grad()
def round_weights(model: GPT) -> None:
    """Round the weights to bfloat16 in place, as `write_model` stores them."""
    if not model.config.logit_softcap:
        model.embed_tokens.weight.copy_(_unit_rows(model.embed_tokens.weight))
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def _unit_rows(embedding: Tensor) -> Tensor:
    """Rows with a root mean square of 1, rounded to bfloat16. (V, C) -> (V, C).

    Rounding changes the mean square by about 1e-3, and Apertus does not normalize the rows again. So in each of 16
    passes, the element that corrects most of it is moved by one unit in its last place: less than 1e-6 remains.
    """
    rounded = rms_norm(embedding).bfloat16()
    for _ in range(16):
        squares = rounded.double().square()
        excess = squares.sum(dim=1, keepdim=True) - rounded.size(1)
        # The bits of a float, read as an integer, are its magnitude; 1 more or less is the next float.
        moved = (rounded.view(torch.int16) - excess.sign().short()).view(torch.bfloat16)
        remaining, best = (excess + moved.double().square() - squares).abs().min(dim=1, keepdim=True)
        best_value = torch.where(remaining < excess.abs(), moved.gather(1, best), rounded.gather(1, best))
        rounded = rounded.scatter(1, best, best_value)
    return rounded.float()


def our_weights(tensors: dict[str, Tensor], config: GPTConfig, where: str) -> dict[str, Tensor]:
    """Convert transformers' tensors to ours. Raises UserError for other norm gains, activations or embedding norms."""
    converted = {}
    for hf_name, tensor in tensors.items():
        name, weight = hf_name.removeprefix("model."), tensor.float()
        parameter = name.rpartition(".")[2]
        is_gain = name.endswith("norm.weight")
        if is_gain or ".act_fn." in name:
            expected = 1.0 if is_gain else XIELU.get(parameter, float("nan"))
            if parameter != "eps" and not (weight == expected).all():
                raise UserError(f"{where} has norms or activations that this project's model lacks ({hf_name})")
            continue
        name = name.replace("mlp.up_proj", "mlp.fc1").replace("mlp.down_proj", "mlp.fc2")
        if name.endswith("fc1.weight") and not config.logit_softcap:
            weight = weight / UP_PROJ_SCALE
        converted[name] = weight if config.logit_softcap else _rotated(name, weight, config)
    rows = converted.get("embed_tokens.weight")
    if rows is not None and not config.logit_softcap and ((rows.square().mean(dim=1) - 1).abs() > 0.01).any():
        raise UserError(
            f"the embedding rows of {where} must have a root mean square of 1: rescale them after each training step, "
            "see docs/scaling.md"
        )
    return converted


def _rotated(name: str, weight: Tensor, config: GPTConfig) -> Tensor:
    """Reverse the direction of the rotation if the tensor is a projection to queries or keys. Its own inverse."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    first, second = weight.view(-1, 2, config.head_dim // 2, config.n_embd).unbind(1)
    return torch.stack((first, -second), dim=1).view_as(weight)


def build_model(weights: dict[str, Tensor], config: GPTConfig, where: str) -> GPT:
    """Our model with these weights (by our names), on the CPU in float32.

    Raises UserError if they do not match, before it takes memory for a model of that shape, or are not finite.
    """
    if config.num_parameters > 2 * (found := sum(weight.numel() for weight in weights.values())):
        raise UserError(f"{where} has {found:,} parameters, but its config describes {config.num_parameters:,}")
    try:
        with torch.device("meta"):
            GPT(config).load_state_dict(weights, assign=True)
    except RuntimeError as error:  # names missing tensors, unknown ones and other shapes
        reason = " ".join(str(error).split())[:500]
        raise UserError(f"the tensors of {where} are not those that its config describes: {reason}") from None
    if damaged := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise UserError(f"the weights of {where} have infinities or NaN in {damaged[0]}: download it again")
    model = GPT(config)
    model.load_state_dict(weights)
    return model.eval()


def write_model(
    weights: dict[str, Tensor], config: GPTConfig, tokenizer: Tokenizer, folder: Path, max_shard_size: str = "5GB"
) -> None:
    """Write config.json, generation_config.json and, in bfloat16, the `weights`, which have our names.

    generation_config.json has the defaults of our own chat. A reply ends with <|assistant_end|>, a document with the
    <|bos|> of the next one, and ids that only pad the vocabulary are never sampled.
    """
    bos, end = tokenizer.bos_id, tokenizer.special("<|assistant_end|>")
    with torch.device("meta"):
        model = hf_model(config)
    converted = hf_weights(weights, config)
    model.load_state_dict({name: weight.bfloat16() for name, weight in converted.items()}, assign=True)
    model.config.bos_token_id, model.config.eos_token_id = bos, end
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
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | OLDER_SETTINGS | {"rope_theta": config.rope_theta}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def read_config(stored: dict[str, Any], where: str) -> GPTConfig:
    """The shape that a config.json describes. Raises UserError if our model does not compute the same function.

    Call it inside `reading`: a malformed one can raise anything.
    """
    kind = (stored.get("architectures") or [stored.get("model_type")])[0]
    is_apertus = kind in (ApertusForCausalLM.__name__, ApertusConfig.model_type)
    if not is_apertus and kind not in (NanoChatForCausalLM.__name__, NanoChatConfig.model_type):
        raise UserError(
            f"{where} must be an ApertusForCausalLM or a NanoChatForCausalLM, got {kind}: other architectures are not "
            "supported"
        )
    if unsafe := [name for name in UNSAFE_SETTINGS if stored.get(name)]:
        raise UserError(f"{where} needs code or kernels of its own ({', '.join(unsafe)}), which is not supported")
    sizes = {name: value for name, value in stored.items() if name.startswith("num_") or name.endswith("_size")}
    if too_large := {name: value for name, value in sizes.items() if isinstance(value, int) and value > MAX_SIZE}:
        raise ValueError(f"too large: {too_large}")
    arguments = {name: value for name, value in stored.items() if name != "architectures"}
    config: Any = (ApertusConfig if is_apertus else NanoChatConfig)(**arguments)
    rope = dict(config.rope_parameters or {})
    width = config.hidden_size
    softcap = 0.0 if is_apertus else NANOCHAT_1_SOFTCAP
    differs = {
        "intermediate_size": config.intermediate_size != 4 * width,
        "hidden_act": config.hidden_act != ("xielu" if is_apertus else "relu2"),
        "final_logit_softcapping": (getattr(config, "final_logit_softcapping", None) or 0.0) != softcap,
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
        logit_softcap=softcap,
    )
