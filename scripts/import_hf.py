"""A model that was trained elsewhere as a checkpoint here: it chats, is evaluated and trained on like one of ours.

./nanochat.sh import karpathy/nanochat-d32
./nanochat.sh import ~/their-nanochat/chatsft_checkpoints/d20 --stage mid
"""

import shlex
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from nanochat import cli, paths
from nanochat.errors import UserError
from nanochat.hub import import_model
from nanochat.hub.import_model import IncomingModel
from nanochat.runtime import Runtime
from nanochat.train.options import PretrainOptions
from nanochat.train.scaling import scale_options


@dataclass
class Options:
    """Bring in a model: any NanoChatForCausalLM of the hub, or a checkpoint folder of the original nanochat."""

    origin: Annotated[str, tyro.conf.Positional] = ""
    """repository on the hub, such as ada/nanochat-d20-sft, or a folder"""
    stage: Literal["auto", "base", "mid", "sft", "rl"] = "auto"
    """what it counts as here, and so which stage can go on from it; auto: what its card or its name says, else sft"""
    tag: str | None = None
    """what to call it; by default as its folder or repository is called"""
    step: int | None = None
    """of an original folder that has several; by default the last"""


DEMO = Options()
NEXT = {"base": "./midtrain.sh", "mid": "./sft.sh", "sft": "./rl.sh"}


def main(options: Options) -> None:
    if not options.origin:
        raise UserError("what to import is missing: ./nanochat.sh import REPOSITORY, or a folder")
    model = import_model.read_model(options.origin, options.step)
    import_model.check_tokenizer(model)
    ours = import_model.build_model(model)
    print(
        f"{model.origin}: {model.config.num_parameters:,} parameters, {model.tokenizer.vocab_size:,} tokens", flush=True
    )
    for line in import_model.compare_with_transformers(model, ours):
        print(line, flush=True)
    stage = model.stage if options.stage == "auto" else options.stage
    kept = import_model.save_checkpoint(model, ours, stage, options.tag or model.tag, training_options(model))
    print(f"kept as {kept.folder}")
    base = f"NANOCHAT_BASE_DIR={shlex.quote(str(paths.base_dir()))} "
    print(f"talk to it:   {base}./chat.sh --source {stage} --model-tag {kept.tag}")
    if stage in NEXT:
        print(f"train it on:  {base}{NEXT[stage]} --model-tag {kept.tag}")


def training_options(model: IncomingModel) -> dict[str, object]:
    """What the next stage inherits, as pretraining of such a model would have set it."""
    with Runtime.start() as runtime:
        options = scale_options(PretrainOptions(), model.config, runtime)
    return {"device_batch_size": options.device_batch_size, "total_batch_size": options.total_batch_size}


if __name__ == "__main__":
    cli.run(main, Options, demo=DEMO)
