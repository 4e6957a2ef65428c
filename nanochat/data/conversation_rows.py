"""A mixture of conversations as rows to train on, through token files."""

from nanochat import paths
from nanochat.data.bars import Bar
from nanochat.data.packing import PackedRows
from nanochat.data.token_files import TokenFile, write_conversations
from nanochat.locks import folder_lock
from nanochat.runtime import Runtime
from nanochat.tasks.task import Mixture
from nanochat.tokenizer import Tokenizer


def conversation_rows(
    mixture: Mixture, tokenizer: Tokenizer, sequence_len: int, runtime: Runtime, *, learn_all: bool, one_per_row: bool
) -> PackedRows:
    """Tokenise `mixture` into tokens/<its name>, unless that is done already, and pack it into rows."""
    folder = paths.tokens_dir(mixture.name.replace(" ", "-"))
    if runtime.world.is_main:
        print(f"{mixture}\n")
    if runtime.world.is_local_main:
        origin = f"{mixture.fingerprint} cut at {sequence_len}"
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder):
            if not TokenFile.is_current(folder, "train", tokenizer, origin):
                with Bar(f"tokenising {mixture.name}", len(mixture)) as bar:
                    write_conversations(folder, "train", tokenizer, bar.each(mixture), sequence_len, origin)
    runtime.world.barrier()
    file = TokenFile.open(folder, "train", tokenizer)
    return PackedRows(
        file, sequence_len, tokenizer.bos_id, learn_all=learn_all, documents_per_row=1 if one_per_row else None
    )
