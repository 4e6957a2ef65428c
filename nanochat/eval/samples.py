"""Sample text during pretraining: greedy continuations of a few fixed prompts.

With the plain model, so that pretraining does not depend on the inference engine: 40 tokens take 40 forward passes.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer

PROMPTS = ("The capital of France is", "The chemical symbol of gold is", "The planets of the solar system are:")
NUM_TOKENS = 40


@torch.inference_mode()
def continuations(model: GPT, tokenizer: Tokenizer) -> list[str]:
    """Continuations of `PROMPTS` by a base model, one line each. A document ends with the <|bos|> of the next one."""
    rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in PROMPTS]
    for _ in range(min(NUM_TOKENS, model.config.sequence_len - max(map(len, rows)))):
        tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(model.device)
        ends = [len(row) - 1 for row in rows]
        logits = model.head(model.hidden(tokens)[range(len(rows)), ends])
        logits = logits[:, : tokenizer.bos_id + 1]  # without the other special tokens, which follow <|bos|>
        for row, token in zip(rows, logits.argmax(dim=1).tolist(), strict=True):
            if row[-1] != tokenizer.bos_id:
                row.append(token)
    texts = (tokenizer.decode([token for token in row if token != tokenizer.bos_id]) for row in rows)
    return [" ".join(text.split()) for text in texts]
