"""The model is the one transformers knows."""

import functools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import NanoChatConfig, NanoChatForCausalLM

from nanochat.data.batches import Batch
from nanochat.errors import UserError
from nanochat.model.cpu_kernels import use_blocked_attention
from nanochat.model.gpt import GPT, NANOCHAT_1_SOFTCAP, RMS_NORM_EPS, GPTConfig
from nanochat.model.loss import IGNORE
from tests.conftest import random_model


@pytest.mark.parametrize("shape", [{}, {"n_kv_head": 1, "n_head": 4, "n_embd": 128}])
def test_logits_match_transformers(shape: dict[str, int]) -> None:
    model = random_model(depth=4, logit_softcap=NANOCHAT_1_SOFTCAP, **shape)
    config = model.config
    peer = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=4 * config.n_embd,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            max_position_embeddings=config.sequence_len,
            rms_norm_eps=RMS_NORM_EPS,
            final_logit_softcapping=NANOCHAT_1_SOFTCAP,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    ).eval()
    names = {name if name.startswith("lm_head") else f"model.{name}": p for name, p in model.state_dict().items()}
    peer.load_state_dict(names, strict=True)
    tokens = torch.randint(config.vocab_size, (3, config.sequence_len))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=0)


def test_first_loss_is_that_of_guessing() -> None:
    model = GPT(GPTConfig.from_depth(2, 512, 32))
    tokens = torch.randint(512, (2, 32))
    assert model.loss(tokens, tokens).item() / 64 == pytest.approx(math.log(512), abs=1e-4)


@pytest.mark.parametrize("depth", range(1, 33))
def test_every_depth_divides_into_heads(depth: int) -> None:
    config = GPTConfig.from_depth(depth, 65536, 2048)
    assert config.n_head * config.head_dim == config.n_embd == 64 * depth
    assert config.head_dim <= 128 and config.head_dim % 8 == 0


def test_parameter_counts() -> None:
    config = GPTConfig.from_depth(20, 65536, 2048)
    assert config.num_parameters == 560_988_160  # d20 is 561M
    assert GPTConfig.from_depth(32, 65536, 2048).num_parameters == 1_879_048_192
    small = random_model(depth=3)
    assert small.config.num_parameters == sum(p.numel() for p in small.parameters())


def test_vocabulary_is_padded() -> None:
    assert GPTConfig.from_depth(2, 513, 64).vocab_size == 576


@pytest.mark.parametrize(("depth", "context"), [(0, 64), (-3, 64), (1000, 64), (2, 3)])
def test_shapes_out_of_range_are_refused(depth: int, context: int) -> None:
    with pytest.raises(UserError, match=rf"--(depth|max-seq-len) must be .* got {depth if depth != 2 else context}"):
        GPTConfig.from_depth(depth, 512, context)


def test_more_tokens_than_the_context_is_an_error() -> None:
    with pytest.raises(ValueError, match="context"):
        random_model(sequence_len=32)(torch.zeros(1, 33, dtype=torch.long))


def test_a_token_sees_only_what_came_before() -> None:
    model = random_model()
    tokens = torch.randint(512, (1, 20))
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 512
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :12], model(changed)[:, :12])


def test_bfloat16_is_close_to_float32() -> None:
    model = random_model(depth=2)
    tokens = torch.randint(512, (2, 64))
    expected = model.loss(tokens, tokens).item()
    model.compute_dtype = torch.bfloat16
    assert model.loss(tokens, tokens).item() == pytest.approx(expected, rel=0.01)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(("dtype", "count", "tolerance"), [(torch.float32, 192, None), (torch.bfloat16, 64, 3e-2)])
def test_one_compiled_block_serves_all_and_gives_the_same_gradients(
    dtype: torch.dtype, count: int, tolerance: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(depth=3, sequence_len=count)
    model.compute_dtype = dtype
    tokens = torch.randint(512, (2, count))
    assert use_blocked_attention(count, model.device, dtype, training=True)
    model.loss(tokens, tokens).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = CompileCounterWithBackend("aot_eager")  # needs no compiler
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiled, fullgraph=True))
    model.compile_training()
    model.loss(tokens, tokens).backward()
    assert model._compiled_block and compiled.frame_count == 1
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if tolerance:
            assert (parameter.grad - expected[name]).norm() <= tolerance * expected[name].norm()
        else:
            torch.testing.assert_close(parameter.grad, expected[name])
    model.token_losses(tokens, tokens)  # of other shapes there are many
    assert compiled.frame_count == 1


@pytest.mark.parametrize("weighted", [False, True])
def test_picking_out_what_is_trained_changes_no_gradient(weighted: bool) -> None:
    model = random_model(depth=1, sequence_len=32)
    batch = Batch(torch.randint(512, (3, 32)), torch.randint(512, (3, 32)), torch.randn(3, 32) if weighted else None)
    batch.targets[:, :20] = IGNORE
    batch.targets[1] = IGNORE
    expected = model.loss(*batch)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    picked = batch.to(model.device)
    assert picked.trained is not None and len(picked.trained) == 24
    loss = model.loss(*picked)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_nothing_is_picked_out_where_nearly_all_is_trained() -> None:
    targets = torch.randint(512, (2, 32))
    targets[:, 0] = IGNORE
    assert Batch(targets.clamp(min=0), targets).to(torch.device("cpu")).trained is None


def test_the_head_has_no_work_where_nothing_is_trained() -> None:
    model = random_model(depth=2)
    spared = model.flops_per_token() - model.flops_per_token(trained_share=0.25)
    assert spared == 0.75 * 6 * model.lm_head.weight.numel()


def test_short_rows_cost_less_attention_and_the_same_matrices() -> None:
    model = random_model(depth=2)
    config = model.config
    whole, short = model.flops_per_token(), model.flops_per_token(config.sequence_len // 4)
    attention = 12 * config.n_layer * config.n_embd * config.sequence_len
    assert whole - short == attention * 3 // 4
    assert whole - attention == 6 * config.num_multiplied
