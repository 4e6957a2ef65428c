"""FP8 products are as near as FP8 allows, harm no tensor that is zero or not finite, and stay in training."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import cli
from nanochat.data.batches import Batch
from nanochat.inference.engine import Engine
from nanochat.inference.sampling_params import SamplingParams
from nanochat.model import cpu_kernels, fp8
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train import resume
from nanochat.train.loop import train_step
from nanochat.train.optim import MuonAdamW, OptimizerOptions
from nanochat.train.options import TrainOptions, check_resumable, inherit
from nanochat.train.run import TrainingRun
from tests.conftest import random_model

E4M3 = (2**-4, 2**-10 / 224)
"""How far rounding can move a number: a share of itself, or below the normal range a share of the tensor's largest one.
Half of the last of 3 bits; half of the smallest step, 2^-9, where the largest number is at 224 to 448."""
E5M2 = (2**-3, 2**-17 / 28672)
"""The same with 2 bits, a smallest step of 2^-16, and the largest number at 28672 to 57344."""


def fp8_model(depth: int = 2) -> GPT:
    model = random_model(depth=depth)
    model.train_in_fp8()
    return model


def random_batch(rows: int, columns: int) -> Batch:
    tokens = torch.randint(512, (rows, columns + 1), generator=torch.Generator().manual_seed(1))
    return Batch(tokens[:, :-1], tokens[:, 1:])


def moved(x: Tensor, rounding: tuple[float, float]) -> Tensor:
    share, least = rounding
    return x.abs() * share + x.abs().max() * least


def check(result: Tensor, a: Tensor, to_a: tuple[float, float], b: Tensor, to_b: tuple[float, float]) -> None:
    """`result` is a b^T, no further from it than the rounding of a and b can bring it, and usually far less."""
    da, db = moved(a, to_a), moved(b, to_b)
    error, product = result.double() - a @ b.T, a @ b.T
    last_bit = 2**-8 if result.dtype == torch.bfloat16 else 2**-20
    bound = da @ b.abs().T + a.abs() @ db.T + da @ db.T
    assert (error.abs() <= bound + last_bit * (product.abs() + bound)).all()
    assert error.norm() <= 0.6 * (to_a[0] ** 2 + to_b[0] ** 2) ** 0.5 * product.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 37, 64])
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e5])
def test_product_and_gradients_are_as_near_as_fp8_allows(dtype: torch.dtype, rows: int, size: float) -> None:
    torch.manual_seed(rows)
    x = (size * torch.randn(2, rows, 64)).to(dtype).requires_grad_()
    weight = (0.1 * torch.randn(96, 64)).requires_grad_()
    y = fp8.linear(x, weight)
    gradient = (1e-6 * torch.randn(2, rows, 96)).to(dtype)
    y.backward(gradient)
    assert x.grad is not None and weight.grad is not None
    assert y.shape == (2, rows, 96)
    assert y.dtype == x.grad.dtype == dtype and weight.grad.dtype == torch.float32
    exact_x, exact_weight = x.detach().double().flatten(0, 1), weight.detach().double()
    exact_gradient = gradient.double().flatten(0, 1)
    check(y.detach().flatten(0, 1), exact_x, E4M3, exact_weight, E4M3)
    check(x.grad.flatten(0, 1), exact_gradient, E5M2, exact_weight.T, E4M3)
    check(weight.grad, exact_gradient.T, E5M2, exact_x.T, E4M3)


@pytest.mark.parametrize("zero", ["x", "weight", "gradient"])
def test_a_tensor_of_zeros_does_no_harm(zero: str) -> None:
    tensors = {"x": torch.randn(5, 32), "weight": torch.randn(16, 32), "gradient": torch.randn(5, 16)}
    tensors[zero].zero_()
    x, weight = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_()
    y = fp8.linear(x, weight)
    y.backward(tensors["gradient"])
    results = {"gradient": y.detach(), "x": x.grad, "weight": weight.grad}
    for left_out, result in results.items():
        assert result is not None and result.isfinite().all()
        assert (result == 0).all() == (zero != left_out)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["x", "weight", "gradient"])
def test_what_is_not_finite_stays_so(bad: float, where: str) -> None:
    tensors = {"x": torch.randn(5, 32), "weight": torch.randn(16, 32), "gradient": torch.randn(5, 16)}
    tensors[where][3, 4] = bad
    x, weight = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_()
    y = fp8.linear(x, weight)
    y.backward(tensors["gradient"])
    results = {"gradient": y.detach(), "x": x.grad, "weight": weight.grad}
    for left_out, result in results.items():
        assert result is not None and result.isfinite().all() == (where == left_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outliers", [1.0, 300.0])
def test_the_mlp_is_as_exact_as_two_layers_although_it_bounds_a_gradient(dtype: torch.dtype, outliers: float) -> None:
    torch.manual_seed(0)
    x, gradient = torch.randn(2, 37, 64), 1e-6 * torch.randn(2, 37, 64)
    x[0, 3], gradient[1, 5] = outliers * x[0, 3], outliers * gradient[1, 5]  # a token that is far from the others
    inputs = [x.to(dtype), 0.1 * torch.randn(256, 64), 0.1 * torch.randn(64, 256)]

    def two_layers(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        return fp8.linear(F.relu(fp8.linear(x, fc1)).square(), fc2)

    def exact(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, fc1)).square(), fc2)

    def results(function: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        y = function(*leaves)
        return [y.detach().double(), *(g.double() for g in torch.autograd.grad(y, leaves, gradient))]

    truth = results(exact, [tensor.double() for tensor in inputs], gradient.to(dtype).double())
    ours = results(fp8.squared_relu_mlp, inputs, gradient.to(dtype))
    other = results(two_layers, inputs, gradient.to(dtype))
    for one, two, right in zip(ours, other, truth, strict=True):
        assert (one - right).norm() < 1.05 * (two - right).norm() < 0.2 * right.norm()


@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["x", "gradient"])
def test_the_mlp_of_zeros_is_finite_and_that_of_what_is_not_finite_is_not(bad: float, where: str) -> None:
    tensors = {"x": torch.randn(5, 32), "gradient": torch.randn(5, 32)}
    tensors[where][:, 4] = bad
    if bad == 0.0:
        tensors[where].zero_()
    x = tensors["x"].requires_grad_()
    y = fp8.squared_relu_mlp(x, torch.randn(64, 32), torch.randn(32, 64))
    y.backward(tensors["gradient"])
    assert x.grad is not None and x.grad.isfinite().all() == (bad == 0.0)
    assert y.isfinite().all() == (bad == 0.0 or where == "gradient")


def run_of(model: GPT) -> TrainingRun:
    optimizer = MuonAdamW(model, OptimizerOptions())
    return TrainingRun("base", "test", TrainOptions(), Runtime.start("cpu"), "", model, optimizer)


def test_a_step_whose_gradient_is_not_finite_can_be_told() -> None:
    model = fp8_model()
    run = run_of(model)
    batch = random_batch(4, 16)
    assert train_step(run, [batch]).is_finite
    with torch.no_grad():
        model.get_parameter("layers.1.mlp.fc1.weight")[0, 0] = float("nan")
    assert not train_step(run, [batch]).is_finite


class Products(TorchDispatchMode):
    """Looks at every FP8 product."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # as torch calls it
        if function is torch.ops.aten._scaled_mm.default:
            self.count += 1
            a, b, scale_a, scale_b = args[:4]
            assert a.stride() == (a.size(1), 1) and b.stride() == (1, b.size(0))
            assert a.size(1) % 16 == 0 and b.size(1) % 16 == 0
            assert scale_a.numel() == scale_b.numel() == 1 and scale_a.dtype == scale_b.dtype == torch.float32
            assert {a.dtype, b.dtype} != {torch.float8_e5m2}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rows", "columns"), [(4, 32), (3, 37), (1, 1)])
def test_products_have_the_shapes_and_layouts_that_cuda_asks_for(rows: int, columns: int) -> None:
    model = fp8_model()
    batch = random_batch(rows, columns)
    with Products() as products:
        model.loss(batch.tokens, batch.targets).backward()
    assert products.count == 3 * 6 * model.config.n_layer


def test_a_gradient_that_lies_by_columns_is_taken_too() -> None:
    x, weight = torch.randn(16, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)
    with Products() as products:
        fp8.linear(x, weight).backward(torch.randn(48, 16).T)
    assert products.count == 3


def test_a_model_learns_a_batch_by_heart() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(1, 512, 32))  # a CPU with AMX takes 0.2 s per FP8 product at depth 2
    model.train_in_fp8()
    run = run_of(model)
    batch = random_batch(4, 32)
    losses = [train_step(run, [batch]).loss for _ in range(40)]
    assert losses[0] == pytest.approx(6.24, abs=0.01) and losses[-1] < 0.1


def test_evaluation_and_decoding_stay_as_they_are(tokenizer: Tokenizer) -> None:
    model = random_model(tokenizer.vocab_size)
    batch = random_batch(3, 20)

    def outside_training() -> list[Tensor]:
        with torch.no_grad():
            logits = model(batch.tokens)
        reply = Engine(model, tokenizer).generate([[tokenizer.bos_id, 7, 8]], SamplingParams(8, temperature=0.0))[0]
        return [logits, model.token_losses(batch.tokens, batch.targets), torch.tensor(reply.tokens)]

    before, loss = outside_training(), model.loss(batch.tokens, batch.targets).item()
    model.train_in_fp8()
    assert all(map(torch.equal, before, outside_training()))
    trained = model.loss(batch.tokens, batch.targets).item()
    assert trained != loss and trained == pytest.approx(loss, rel=0.01)


def test_it_compiles_as_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    # FP8 would round up the last bit in which norms written out differ from those that are compiled.
    monkeypatch.setattr(cpu_kernels, "enabled", lambda x: False)
    model = fp8_model(depth=1)
    batch = random_batch(2, 24)
    weights = torch.randn(2, 24, model.config.n_embd)
    (model.hidden(batch.tokens) * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model.hidden, fullgraph=True, dynamic=False, backend="aot_eager")  # needs no compiler
    (compiled(batch.tokens) * weights).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.get(name))


def test_a_device_without_fp8_gets_a_sentence(
    base_dir: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(options: TrainOptions) -> None:
        with Runtime.start(options.device_type) as runtime:
            config = GPTConfig.from_depth(1, tokenizer.vocab_size, 32)
            resume.start_or_resume("base", options, runtime, tokenizer, config=config)

    with pytest.raises(SystemExit) as stop:
        cli.run(stage, TrainOptions, args=["--fp8", "--device-type", "cpu"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: --fp8") and said.count("\n") == 1
    assert not list(base_dir.iterdir())


def test_a_run_may_take_it_up_and_leave_it_and_the_next_stage_asks_for_it_anew() -> None:
    with_it, without = (dataclasses.asdict(TrainOptions(fp8=fp8)) for fp8 in (True, False))
    check_resumable(TrainOptions(fp8=False), with_it)
    check_resumable(TrainOptions(fp8=True), without)
    assert not inherit(TrainOptions(), with_it).fp8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_gives_what_a_cpu_emulates(compiled: bool) -> None:
    if not Runtime.start("cuda").has_fp8:
        pytest.skip("this GPU has no FP8")
    batch = random_batch(3, 37)
    models = [fp8_model(), fp8_model().to("cuda")]
    if compiled:
        models[1].compile_training()
    losses = []
    for model in models:
        losses.append(model.loss(batch.tokens.to(model.device), batch.targets.to(model.device)))
        losses[-1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-3)
    for ours, other in zip(*(model.parameters() for model in models), strict=True):
        assert ours.grad is not None and other.grad is not None
        assert (other.grad.cpu() - ours.grad).norm() < 0.1 * ours.grad.norm()
