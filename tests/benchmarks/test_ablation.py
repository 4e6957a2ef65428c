"""benchmarks/ablation.py: the variants compute what they say, and an interrupted ablation goes on where it was."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import ablation
from benchmarks.ablation_results import Cost, Job, Results, Setting, table
from benchmarks.architectures import VARIANTS, AblationGPT, AblationOptimizer, Additions, DecodeCache, extra_parameters
from nanochat import cli, paths
from nanochat.data.corpora import Encyclopedia
from nanochat.data.token_shards import write_shards
from nanochat.errors import UserError
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.train.optim import MuonAdamW, OptimizerOptions

CONFIG = GPTConfig(vocab_size=256, sequence_len=32, n_layer=4, n_head=2, n_kv_head=1, n_embd=64)
SETTING = Setting(1, 32, 256, 128, 128, 128, "mine")


def random_variant(additions: Additions, dtype: torch.dtype = torch.float64) -> AblationGPT:
    """With every parameter away from its start, where most additions do nothing."""
    torch.manual_seed(1)
    model = AblationGPT(CONFIG, additions, dtype).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def some_tokens(rows: int = 2) -> Tensor:
    return torch.randint(256, (rows, 32), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("variant", ["plain", "scales", "smear"])
def test_training_starts_as_the_plain_model_and_plain_stays_it(variant: str) -> None:
    models: list[GPT] = []
    for build in (lambda: GPT(CONFIG), lambda: AblationGPT(CONFIG, VARIANTS[variant])):
        torch.manual_seed(3)
        models.append(build())
    product, ours = models
    assert isinstance(ours, AblationGPT)
    optimizers = [MuonAdamW(product, OptimizerOptions()), AblationOptimizer(ours)]
    tokens, targets = some_tokens(), some_tokens().roll(-1, 1)
    for _ in range(3 if variant == "plain" else 1):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            model.zero_grad()
            loss = model.loss(tokens, targets) / tokens.numel()
            loss.backward()
            optimizer.step(1.0)
            losses.append(loss.detach())
        assert torch.equal(*losses)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_with_a_cache_is_the_full_forward(variant: str) -> None:
    model, tokens = random_variant(VARIANTS[variant]), some_tokens()
    cache = DecodeCache(model, batch_size=2)
    with torch.no_grad():
        whole = model(tokens)
        chunks = [tokens[:, :12], tokens[:, 12:17], *tokens[:, 17:].split(1, dim=1)]
        torch.testing.assert_close(torch.cat([model.decode(chunk, cache) for chunk in chunks], 1), whole)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_finite_differences(variant: str) -> None:
    model, tokens = random_variant(VARIANTS[variant]), some_tokens(1)

    weights = torch.randn(32, 64, dtype=torch.float64)

    def weighed() -> Tensor:
        return (model.hidden(tokens) * weights).sum()

    weighed().backward()
    inside = "layers.0.self_attn.v_proj.weight"
    for name, parameter in {**extra_parameters(model), inside: model.get_parameter(inside)}.items():
        assert parameter.grad is not None and parameter.grad.any(), name
        direction = torch.randn_like(parameter)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(weighed())
                parameter.sub_(direction, alpha=step)
        slope = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((parameter.grad * direction).sum(), slope, rtol=1e-4, atol=1e-8)


def test_each_addition_is_what_it_says() -> None:
    tokens, other = some_tokens(1), some_tokens(1).clone()
    other[:, 0] = (other[:, 0] + 1) % 256
    config = replace(CONFIG, n_layer=1)
    assert AblationGPT(config, VARIANTS["windows"]).windows == [32]  # the last layer sees all
    model = random_variant(VARIANTS["windows"])
    assert model.windows == [8, 8, 8, 32]
    torch.nn.init.zeros_(model.get_parameter("layers.3.self_attn.o_proj.weight"))
    with torch.no_grad():  # three layers of 8 reach 21 tokens back, and no further
        changed = (model.hidden(tokens) != model.hidden(other)).any(-1)[0]
    assert changed[21] and not changed[22:].any()
    smear = random_variant(VARIANTS["smear"])
    for layer in range(CONFIG.n_layer):
        torch.nn.init.zeros_(smear.get_parameter(f"layers.{layer}.self_attn.o_proj.weight"))
    with torch.no_grad():
        changed = (smear.hidden(tokens) != smear.hidden(other)).any(-1)[0]
    assert changed[:2].all() and not changed[2:].any()
    assert list(AblationGPT(CONFIG, VARIANTS["value-embeddings"]).value_embeddings) == ["1", "3"]
    scales = AblationGPT(CONFIG, VARIANTS["scales"])
    with torch.no_grad():
        scales.stream_scales.zero_()  # blocks write nothing at the start, so x0 alone is left
        scales.x0_scales.fill_(2)
        torch.testing.assert_close(scales.hidden(tokens), GPT.hidden(scales, tokens))


def test_muon_keeps_to_the_matrices_inside_blocks() -> None:
    model = AblationGPT(CONFIG, VARIANTS["all"])
    optimizer = AblationOptimizer(model, lr_scale=2.0, extra_lr_scale=3.0)
    extra = extra_parameters(model)
    assert len(extra) == 2 * 2 + 2 + 2
    muon = {name.removesuffix(".momentum") for name in optimizer.state if name.endswith(".momentum")}
    assert muon == {name for name, _ in model.named_parameters() if name.startswith("layers.")}
    before = {name: parameter.detach().clone() for name, parameter in extra.items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.5)
    for name, parameter in extra.items():  # Adam's first step is the learning rate
        lr = 0.2 * (64 / 768) ** -0.5 if name.endswith("table.weight") else AblationOptimizer.SCALAR_LR
        torch.testing.assert_close(before[name] - parameter.detach(), torch.full_like(parameter, lr * 2 * 3 * 0.5))


def test_the_table_takes_the_best_learning_rates_and_pairs_seeds(tmp_path: Path) -> None:
    results = Results(tmp_path / "runs.jsonl", SETTING)
    tuning = Job("plain", "tuning", 9)
    for job, bpb in [
        (tuning, 2.0), (replace(tuning, lr_scale=2.0), 1.9), (replace(tuning, lr_scale=4.0), float("nan")),
        (Job("plain", "equal tokens", 0, 1.0), 1.0), (Job("plain", "equal tokens", 0, 2.0), 1.8),
        (Job("plain", "equal tokens", 1, 2.0), 1.6), (Job("smear", "tuning", 9), 1.9),
        (Job("smear", "equal tokens", 1), 1.5),
    ]:  # fmt: skip
        results.add("run", job=vars(job), bpb=bpb)
    Results(results.path, replace(SETTING, depth=2)).add("run", job=vars(Job("smear", "equal tokens", 0)), bpb=1.0)
    results.add("cost", variant="smear", cost=vars(Cost(1234, 0.5, 3.0)))
    plain, smear = table(results, ("plain", "smear")).splitlines()[2:]
    assert plain == "| plain | 2, 1 | 1.7000 ± 0.1414 (2) | 0.0000 ± 0.0000 (2) | – | – | – | – | – |"
    assert smear == "| smear | 1, 1 | 1.5000 | 0.1000 | – | – | 1,234 | 256 | 3.00 |"


def test_an_interrupted_ablation_goes_on_where_it_was(
    tokenizer: Tokenizer, base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.save(paths.tokenizer_dir())
    corpus = Encyclopedia("mine")
    write_shards(paths.tokens_dir("mine"), {split: corpus.shards(split) for split in ("train", "val")}, tokenizer, 1)
    command = [
        "--depth", "1", "--max-seq-len", "32", "--tokens", "256", "--tuning-tokens", "128", "--total-batch-size", "128",
        "--device-batch-size", "4", "--eval-tokens", "128", "--dataset", "mine", "--seeds", "0", "--lr-scales", "1",
        "--extra-lr-scales", "1", "3", "--variants", "plain", "smear", "--results", str(base_dir / "x/runs.jsonl"),
        "--device-type", "cpu",
    ]  # fmt: skip
    options = cli.parse(ablation.AblationOptions, command)
    ablation.main(options)
    first = capsys.readouterr().out
    assert first.count("bits per byte after") in (5, 6)  # 6 where smear took longer than plain
    rows = first.splitlines()[-2:]
    assert not any("–" in row for row in rows)
    lines = options.results.read_text().splitlines(keepends=True)
    options.results.write_text("".join(lines[:-2]) + lines[-2][:40])
    ablation.main(options)
    again = capsys.readouterr().out
    assert again.count("bits per byte after") in (1, 2)
    assert again.splitlines()[-2:] == rows
    ablation.main(replace(options, table=True))
    assert capsys.readouterr().out.splitlines()[-2:] == rows


def test_a_variant_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="no variant sliding: --variants takes plain, value-embeddings"):
        cli.parse(ablation.AblationOptions, ["--variants", "sliding"])
