"""The engine's forward pass is the model's."""

import pytest
import torch

from nanochat.inference.model_runner import ModelRunner, Span
from tests.conftest import random_model

SHAPES = [{}, {"n_head": 4, "n_kv_head": 2, "n_embd": 128}, {"depth": 5}, {"logit_softcap": 15}]


@pytest.mark.parametrize("shape", SHAPES)
# below and above the number of tokens whose attention goes in blocks
@pytest.mark.parametrize("count", [3, 20, 300])
def test_chunks_and_single_tokens_in_one_pass(shape: dict[str, int], count: int) -> None:
    model = random_model(sequence_len=340, **shape).eval()
    tokens = torch.randint(500, (4, 340), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        runner = ModelRunner(model, slots=5, vocab_size=500)
        held = (9, 17, 30, 0)
        for row, slot in ((0, 1), (1, 2), (2, 4)):
            runner.hidden(tokens[row, : held[row]], [Span(0, slot, (0,), held[row])])
        # one token each in slots 1 and 2, a chunk in the middle of slot 4, a prompt's beginning in slot 0
        spans = [Span(0, 1, (9, 17), 1), Span(2, 4, (30,), count), Span(2 + count, 0, (0,), count)]
        new = torch.cat((tokens[0, 9:10], tokens[1, 17:18], tokens[2, 30 : 30 + count], tokens[3, :count]))
        logits = runner.compute_logits(runner.hidden(new, spans))
        full = model(tokens)[:, :, :500]
        expected = torch.cat((full[0, 9:10], full[1, 17:18], full[2, 30 : 30 + count], full[3, :count]))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("slots", [(0,), (0, 1, 2, 3, 4, 5), (1, 2, 4)])
def test_the_step_for_a_graph_is_the_same_and_leaves_other_sequences_alone(slots: tuple[int, ...]) -> None:
    model = random_model(sequence_len=340).eval()
    tokens = torch.randint(500, (7, 340), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        runner = ModelRunner(model, slots=6, vocab_size=500)
        held = (9, 17, 337, 3, 250, 255)  # below and above a multiple of the lengths that graphs have, and the context
        for slot, count in enumerate(held):
            runner.hidden(tokens[slot, :count], [Span(0, slot, (0,), count)])
        for step in range(2):
            spans = [Span(row, slot, (held[slot] + step,), 1) for row, slot in enumerate(slots)]
            if slots[-1] == 5 and step:  # adjacent slots in one span
                spans = [Span(0, 0, tuple(count + 1 for count in held), 1)]
            new = torch.stack([tokens[slot, held[slot] + step] for slot in slots])
            logits = runner.decode(new, spans)
            expected = torch.stack([model(tokens[slot : slot + 1])[0, held[slot] + step, :500] for slot in slots])
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        others = [slot for slot in range(6) if slot not in slots]
        for slot in others:  # still continue from what they held
            logits = runner.decode(tokens[slot, held[slot]].view(1), [Span(0, slot, (held[slot],), 1)])
            torch.testing.assert_close(
                logits[0], model(tokens[slot : slot + 1])[0, held[slot], :500], atol=1e-4, rtol=0
            )


def test_bfloat16_is_as_close_as_it_can_be() -> None:
    model = random_model().eval()
    model.compute_dtype = torch.bfloat16
    tokens = torch.randint(500, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        runner = ModelRunner(model, slots=1, vocab_size=500)
        logits = runner.compute_logits(runner.hidden(tokens[0], [Span(0, 0, (0,), 40)]))
        model.compute_dtype = torch.float32
        exact = model(tokens)[0, :, :500]
    assert (logits - exact).abs().mean() < 0.02 * exact.abs().mean()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_does_not_wait_for_it() -> None:
    model = random_model().to("cuda").eval()
    with torch.inference_mode():
        runner = ModelRunner(model, slots=2, vocab_size=500)
        tokens = torch.arange(12, device="cuda")
        runner.hidden(tokens, [Span(0, 0, (0,), 12)])
        torch.cuda.set_sync_debug_mode("error")
        try:
            runner.compute_logits(runner.hidden(tokens[:2], [Span(0, 0, (12, 0), 1)]))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_gives_what_single_launches_give() -> None:
    model = random_model().to("cuda").eval()
    with torch.inference_mode():
        runners = [ModelRunner(model, slots=3, vocab_size=500) for _ in range(2)]
        runners[1].use_graphs = False
        for start in (0, 1, 2):
            spans = [Span(0, 0, (start,), 1), Span(1, 2, (start,), 1)]
            captured, launched = (runner.decode(torch.tensor([start, 7], device="cuda"), spans) for runner in runners)
            torch.testing.assert_close(captured, launched)
        assert runners[0].use_graphs and len(runners[0]._graphs) == 1
