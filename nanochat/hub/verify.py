"""That what transformers loads from a folder is the model that it was made from: logits, token ids, chat format.

Both models hold the same numbers, rounded to bfloat16 where the folder is, and compute in float32: what is left between
them is the order of additions, so that any slip in arithmetic, position or weight stands out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from nanochat import paths
from nanochat.conversations import Message, Part
from nanochat.data import demo_data
from nanochat.data.token_shards import ShardedIds, TokenShards
from nanochat.errors import UserError
from nanochat.hub.convert_model import quiet_transformers
from nanochat.hub.texts import trying_texts
from nanochat.model.gpt import GPT
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

PASSAGES = 64
PASSAGE_TOKENS = 128
TEXTS = 5000
MOST_LOGIT_DIFFERENCE = 0.01
"""Of two logits, which lie between -15 and 15. 1.4e-05 was the most seen in trained models of depth 4, 6e-06 in a
random one of depth 20; two per cent in one matrix of a model of two layers is over it."""


@dataclass(frozen=True)
class Passages:
    """Held-out text in tokens."""

    origin: str
    """what it is, for a person"""
    rows: list[Tensor]
    """each (1, T) int64, opening with bos; the first spans the context, so that every position is looked at"""

    @property
    def tokens(self) -> int:
        """Of all passages."""
        return sum(row.numel() for row in self.rows)


def held_out_passages(dataset: str | None, tokenizer: Tokenizer, sequence_len: int) -> Passages:
    """64 passages spread over the validation text of `dataset`, of the encyclopedia where that has no token files."""
    ids: ShardedIds | np.ndarray
    try:
        ids = TokenShards.open(paths.tokens_dir(dataset or ""), "val", tokenizer).ids
        origin = f"{dataset} val"
    except UserError:
        texts = demo_data.documents("val")
        ids = np.array([token for text in texts for token in (tokenizer.bos_id, *tokenizer.encode(text))])
        origin = "encyclopedia val"
    rows = []
    for i in range(PASSAGES):
        length = min(sequence_len if i == 0 else PASSAGE_TOKENS, sequence_len, len(ids))
        start = i * (len(ids) - length) // PASSAGES
        row = np.array([tokenizer.bos_id, *ids[start : start + length - 1]], np.int64)
        rows.append(torch.from_numpy(row)[None])
    return Passages(origin, rows)


@dataclass(frozen=True)
class LogitReport:
    """How far two models are from each other on the same tokens."""

    tokens: int
    max_difference: float
    """largest between two logits"""
    agreement: float
    """share of tokens after which both find the same one likeliest"""

    def __str__(self) -> str:
        return (
            f"{self.max_difference:.1e} at most between two, the same top token after {self.agreement:.2%} of "
            f"{self.tokens:,} held-out tokens"
        )


@torch.inference_mode()
def check_logits(ours: GPT, folder: Path, passages: Passages) -> LogitReport:
    """Compare with what transformers loads from the folder, both in float32.

    Raises UserError if they differ by more than the order of additions can, or if transformers does not find every
    tensor, or finds one that it does not know.
    """
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    theirs, loading = loaded
    if problems := [f"{kind}: {', '.join(map(str, sorted(names)[:3]))}" for kind, names in loading.items() if names]:
        raise UserError(f"transformers cannot load {folder} as it is ({'; '.join(problems)})")
    theirs = theirs.to(ours.device).eval()
    worst, same = 0.0, 0
    with _exact_matmuls():
        for row in passages.rows:
            logits, others = ours(row.to(ours.device)), theirs(row.to(ours.device)).logits
            difference = float((logits - others).abs().max())
            worst = difference if not difference <= worst else worst  # keeps what is not a number
            same += int((logits.argmax(-1) == others.argmax(-1)).sum())
    report = LogitReport(passages.tokens, worst, same / passages.tokens)
    if not worst <= MOST_LOGIT_DIFFERENCE:
        raise UserError(
            f"transformers computes another model from {folder}, with logits that are up to {worst:.3g} off "
            f"({MOST_LOGIT_DIFFERENCE} would be rounding): please report it, with your version of transformers"
        )
    return report


@dataclass(frozen=True)
class RoundingReport:
    """What rounding the weights to bfloat16 does to a model."""

    loss: float
    """cross-entropy before, nats a token"""
    rounded_loss: float
    """and after"""
    changed: float
    """share of tokens after which another one is likeliest then"""

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f} to {self.rounded_loss:.4f} nats a token, another top token after {self.changed:.2%}"
        )


@torch.inference_mode()
def round_to_bfloat16(model: GPT, passages: Passages) -> RoundingReport:
    """Round the weights, in place, to what an exported folder holds."""
    with _exact_matmuls():
        loss, tops = _loss_and_tops(model, passages)
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        rounded_loss, rounded_tops = _loss_and_tops(model, passages)
    return RoundingReport(loss, rounded_loss, float((tops != rounded_tops).float().mean()))


def _loss_and_tops(model: GPT, passages: Passages) -> tuple[float, Tensor]:
    """Mean cross-entropy of all tokens but the first of each passage, and the likeliest token after each, (N,)."""
    losses, tops = [], []
    for row in passages.rows:
        moved = row.to(model.device)
        logits = model(moved)[0]
        losses.append(F.cross_entropy(logits[:-1], moved[0, 1:], reduction="none"))
        tops.append(logits.argmax(-1))
    return float(torch.cat(losses).mean()), torch.cat(tops)


@contextmanager
def _exact_matmuls() -> Iterator[None]:
    """float32 as such: a GPU may otherwise round the factors to TF32, which differs in the third digit."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def check_token_ids(ours: Tokenizer, folder: Path, *, its_defaults: bool = True) -> int:
    """Compare token ids on 5,000 texts; returns how many there were.

    A tokenizer of transformers makes special tokens of text that looks like them, which ours never does, unless it is
    called with split_special_tokens=True; so it is here. With `its_defaults` what it gives when called with the text
    alone is compared too, where no such text is in it, and the way back.
    Raises UserError at the first that differs.
    """
    theirs = load_tokenizer(folder)
    texts = trying_texts(TEXTS)
    expected = [ours.encode(text) for text in texts]
    with quiet_transformers():
        given = theirs(texts, add_special_tokens=False, split_special_tokens=True).input_ids
        default = theirs(texts).input_ids if its_defaults else expected
        back = theirs.batch_decode(expected) if its_defaults else texts
    for text, ids, split, plain, decoded in zip(texts, expected, given, default, back, strict=True):
        looks_special = any(name in text for name in SPECIAL_TOKENS)
        if split != ids or decoded != text or (plain != ids and not looks_special):
            raise UserError(
                f"the tokenizer in {folder} gives other ids for {text!r} than ours: they do not belong together"
            )
    return len(texts)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as a user of transformers gets it."""
    return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder, local_files_only=True))


def check_chat_template(ours: Tokenizer, folder: Path) -> int:
    """Compare the chat template with our own rendering on every shape of conversation; returns how many there are.

    Raises UserError at the first that differs.
    """
    theirs = load_tokenizer(folder)
    shapes = conversation_shapes()
    for messages in shapes:
        asked = messages[-1]["role"] != "assistant"
        expected = ours.render_prompt(messages) if asked else ours.render_conversation({"messages": messages}).ids
        given = cast(Any, messages)
        ids = theirs.apply_chat_template(given, add_generation_prompt=asked, tokenize=True, return_dict=False)
        if ids != expected:
            raise UserError(f"the chat template in {folder} renders {messages!r} in another way than ours")
    return len(shapes)


def conversation_shapes() -> list[list[Message]]:
    """One to three turns, with and without a system message, the reply as text or as parts in every order.

    Two parts of text never stand side by side: ours are then encoded one by one, a template's text is encoded as one.
    """
    says = ("Hi", " What is 2+3?\n", "多少？ 🙂\n\n")
    text, python, output = (
        lambda words: Part(type="text", text=words),
        lambda code: Part(type="python", text=code),
        lambda result: Part(type="python_output", text=result),
    )
    replies: list[str | list[Part]] = [
        "Hello!",
        "  spaces and lines\n\n\n",
        [text("Just text.")],
        [python("2+3"), output("5"), text("It is 5.")],
        [text("Let me see. "), python("2+3"), output("5"), text(" It is 5.")],
        [text("Twice: "), python("1+1\n"), output("2"), python("2*2"), output(""), text("4")],
        [text("A call: "), python("print('{{ x }}')")],
        [python("2"), output("2")],
    ]
    shapes: list[list[Message]] = []
    for system in (None, "Be brief.", "Two\nlines. "):
        opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        for i, reply in enumerate(replies):
            other = replies[(i + 1) % len(replies)]
            turns: list[Message] = [
                {"role": "user", "content": says[0]},
                {"role": "assistant", "content": reply},
                {"role": "user", "content": says[1]},
                {"role": "assistant", "content": other},
                {"role": "user", "content": says[2]},
            ]
            shapes += [[*opening, *turns[:count]] for count in range(1, 6)]
    return shapes
