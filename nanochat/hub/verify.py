"""Verify that transformers loads the same model from a folder: logits, token ids and chat template.

Both models hold the same weights (rounded to bfloat16 if the folder's are) and compute in float32, so only the order
of additions differs. Any mistake in arithmetic, positions or weights stands out.
"""

import json
import random
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nanochat.conversations import Message
from nanochat.data import demo_data
from nanochat.data.sources import MixedText
from nanochat.data.token_files import ShardedIds
from nanochat.errors import UserError
from nanochat.model.gpt import GPT
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

NUM_PASSAGES = 64
PASSAGE_TOKENS, MAX_PASSAGE_TOKENS = 128, 8192
NUM_TEXTS = 5000
MAX_LOGIT_DIFFERENCE = 0.01
"""A trained model of depth 4: 3e-05. An error of two percent in one matrix of a two-layer model exceeds the limit."""
SAMPLES = json.loads(Path(__file__).with_name("verify_samples.json").read_text(encoding="utf-8"))
"""Pieces of text and conversations that are known to distinguish tokenizers and chat templates."""


class Passages(NamedTuple):
    origin: str  # dataset and split
    rows: list[Tensor]  # each (1, T) int64, starting with bos

    @property
    def tokens(self) -> int:
        return sum(row.numel() for row in self.rows)


class Comparison(NamedTuple):
    largest: float  # largest difference of two logits
    error: float  # root mean square of the differences, relative to the standard deviation of the logits
    agreement: float  # share of positions with the same top token
    loss: float  # mean cross-entropy of the first model, in nats per token
    other_loss: float


def held_out_passages(dataset: Sequence[str], tokenizer: Tokenizer, sequence_len: int) -> Passages:
    """64 passages spread over the validation text of `dataset`, or of the encyclopedia if that has no token files.

    The first one is as long as the context, up to 8,192 tokens.
    """
    ids: ShardedIds | np.ndarray
    try:
        text = MixedText.open(dataset, "val", tokenizer)
        ids, origin = text.stream.ids, f"{text.name} val"
    except UserError:
        texts = demo_data.documents("val")
        ids = np.array([token for text in texts for token in (tokenizer.bos_id, *tokenizer.encode(text))])
        origin = "encyclopedia val"
    rows = []
    for i in range(NUM_PASSAGES):
        length = min(MAX_PASSAGE_TOKENS if i == 0 else PASSAGE_TOKENS, sequence_len, len(ids))
        start = i * (len(ids) - length) // NUM_PASSAGES
        row = np.array([tokenizer.bos_id, *ids[start : start + length - 1]], np.int64)
        rows.append(torch.from_numpy(row)[None])
    return Passages(origin, rows)


def check_logits(ours: GPT, folder: Path, passages: Passages) -> Comparison:
    """Compare `ours` with the model that transformers loads from the folder, both in float32.

    Raises UserError if they differ by more than rounding, or if a tensor is missing or unknown to transformers.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, trust_remote_code=False
    )
    theirs, loading = loaded
    if problems := [f"{kind}: {', '.join(map(str, sorted(names)[:3]))}" for kind, names in loading.items() if names]:
        raise UserError(f"transformers cannot load {folder} ({'; '.join(problems)})")
    theirs = theirs.to(ours.device).eval()
    if ours.device.type == "cuda" and any(getattr(m, "_xielu_cuda_obj", None) for m in theirs.modules()):
        raise UserError(
            "the installed package xielu computes another activation than the checkpoint's (it ignores beta): run pip "
            "uninstall xielu, or pass --device-type cpu"
        )
    result = compare(ours, lambda tokens: theirs(tokens).logits, passages)
    if not result.largest <= MAX_LOGIT_DIFFERENCE:
        raise UserError(
            f"transformers computes a different model from {folder}: logits differ by up to {result.largest:.3g}, "
            f"rounding explains {MAX_LOGIT_DIFFERENCE}; please report this with your version of transformers"
        )
    return result


@torch.inference_mode()
def compare(ours: GPT, theirs: Callable[[Tensor], Tensor], passages: Passages) -> Comparison:
    """Compare the logits of `ours` with those that `theirs` returns, (1, T) -> (1, T, V)."""
    torch.set_float32_matmul_precision("highest")  # TF32 differs in the third digit
    largest, same, squares, variance, losses = 0.0, 0, 0.0, 0.0, []
    for row in passages.rows:
        tokens = row.to(ours.device)
        logits, others = ours(tokens)[0], theirs(tokens)[0]
        difference = float((logits - others).abs().max())
        largest = difference if not difference <= largest else largest  # keeps NaN
        squares += float((logits - others).square().mean())
        variance += float(logits.var(dim=-1).mean())
        same += int((logits.argmax(-1) == others.argmax(-1)).sum())
        both = torch.stack((logits[:-1], others[:-1]), dim=-1)
        losses.append(F.cross_entropy(both, tokens[0, 1:, None].expand(-1, 2), reduction="none"))
    loss, other_loss = torch.cat(losses).mean(dim=0).tolist()
    return Comparison(largest, (squares / variance) ** 0.5, same / passages.tokens, loss, other_loss)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that transformers loads from the folder, without code from there."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def check_token_ids(ours: Tokenizer, folder: Path, *, check_defaults: bool = True) -> int:
    """Compare token ids on 5,000 texts; return the number of texts. Raises UserError at the first difference.

    A transformers tokenizer turns text that looks like a special token into that token, unless it is called with
    split_special_tokens=True. Ours never does, so that is what is compared. `check_defaults` also compares decoding,
    and encoding without any option for the texts that contain no such name.
    """
    if check_defaults:
        theirs = load_tokenizer(folder)
    else:  # from elsewhere: read nothing but tokenizer.json
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    texts = sample_texts(NUM_TEXTS)
    expected = [ours.encode(text) for text in texts]
    split = theirs(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    default = theirs(texts).input_ids if check_defaults else expected
    decoded = theirs.batch_decode(expected) if check_defaults else texts
    for text, ids, split_ids, default_ids, back in zip(texts, expected, split, default, decoded, strict=True):
        has_special_name = any(name in text for name in SPECIAL_TOKENS)
        if split_ids != ids or back != text or (default_ids != ids and not has_special_name):
            raise UserError(f"the tokenizer in {folder} is not the model's: different ids for {text!r}")
    return len(texts)


def check_chat_template(ours: Tokenizer, folder: Path) -> int:
    """Compare the chat template with our own rendering; return the number of conversations. Raises UserError."""
    theirs = load_tokenizer(folder)
    conversations = sample_conversations()
    for messages in conversations:
        is_prompt = messages[-1]["role"] == "user"
        expected = ours.render_prompt(messages) if is_prompt else ours.render_conversation({"messages": messages}).ids
        ids = theirs.apply_chat_template(messages, add_generation_prompt=is_prompt, return_dict=False)
        if ids != expected:
            raise UserError(f"the chat template in {folder} differs from ours for {messages!r}")
    return len(conversations)


def sample_texts(count: int, seed: int = 0) -> list[str]:
    """`count` texts of all kinds: prose, code, emoji, digits, spaces, look-alikes of special tokens, scripts, noise."""
    rng = random.Random(f"texts {seed}")
    kinds = [(kind["pieces"], kind["separators"]) for kind in SAMPLES["texts"].values()]
    repeated = [piece for pieces, _ in kinds for piece in pieces] + 10 * SAMPLES["repeated"]
    scripts = [range(int(start, 16), int(end, 16) + 1) for start, end in SAMPLES["scripts"].values()]
    texts = [""]
    while len(texts) < count:
        for pieces, separators in kinds:
            texts.append("".join(rng.choice(pieces) + rng.choice(separators) for _ in range(rng.randint(1, 40))))
        script = rng.choice(scripts)
        texts.append("".join(rng.choice((*map(chr, rng.choices(script, k=6)), " ", "1")) for _ in range(40)))
        points = (
            rng.choice((rng.randint(0, 0xD7FF), rng.randint(0xE000, 0x10FFFF))) for _ in range(rng.randint(1, 40))
        )
        texts.append("".join(map(chr, points)))  # any character; surrogates are not characters
        texts.append(rng.choice(repeated) * rng.randint(1, 120))  # overlapping merges
    return texts[:count]


def sample_conversations() -> list[list[Message]]:
    """One to three turns, with and without a system message, replies as text and as parts in every order.

    Two parts of type text never follow each other: we encode them one by one, a template encodes their concatenation.
    """
    parts = SAMPLES["conversations"]
    users, replies = parts["user"], parts["assistant"]
    conversations: list[list[Message]] = []
    for system, i in product(parts["system"], range(len(replies))):
        turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        for user, reply in zip(users, (replies[i], replies[i - 1], None), strict=True):
            turns = [*turns, {"role": "user", "content": user}]
            conversations.append(turns)
            if reply is not None:
                turns = [*turns, {"role": "assistant", "content": reply}]
                conversations.append(turns)
    return conversations
