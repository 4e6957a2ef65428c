"""Import a model trained elsewhere as a checkpoint, to chat with it, evaluate it or train it further.

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
from nanochat.model.gpt import GPTConfig
from nanochat.runtime import Runtime
from nanochat.stages import STAGES, StageName, previous
from nanochat.train.options import PretrainOptions
from nanochat.train.scaling import scale_options


@dataclass
class Options:
    """Import a model: an exported one, any NanoChatForCausalLM on the hub, or a folder of the original nanochat."""

    origin: Annotated[str, tyro.conf.Positional] = ""
    """repository on the hub, such as ada/nanochat-d20-sft, or a folder"""
    stage: Literal["auto", StageName] = "auto"
    """stage to import it as; the next stage then starts from it; auto: as in its card or name, else sft"""
    tag: str | None = None
    """name of the model here; default: that of its folder or repository"""
    step: int | None = None
    """step, if an original folder has several; default: the last"""


DEMO = Options()


def main(options: Options) -> None:
    if not options.origin:
        raise UserError("import needs a repository or a folder: ./nanochat.sh import REPOSITORY")
    if options.tag is not None:
        paths.check_tag(options.tag, "--tag")
    imported = import_model.read_model(options.origin, options.step)
    import_model.check_tokenizer(imported)
    config = imported.model.config
    print(
        f"{imported.origin}: {config.num_parameters:,} parameters, {imported.tokenizer.vocab_size:,} tokens", flush=True
    )
    for line in import_model.compare_with_transformers(imported):
        print(line, flush=True)
    stage = imported.stage if options.stage == "auto" else options.stage
    kept = import_model.save_checkpoint(imported, stage, options.tag or imported.tag, training_options(config))
    print(f"saved as {kept.folder}")
    base = f"NANOCHAT_BASE_DIR={shlex.quote(str(paths.base_dir()))} "
    print(f"chat:          {base}./chat.sh --source {stage} --model-tag {kept.tag}")
    for following in list(STAGES.values())[1:]:
        if previous(following.name).name == stage:
            print(f"train further: {base}{following.script} --model-tag {kept.tag}")


def training_options(config: GPTConfig) -> dict[str, object]:
    """Options that the next stage inherits, as pretraining such a model would have set them."""
    with Runtime.start() as runtime:
        options = scale_options(PretrainOptions(), config, runtime)
    return {"device_batch_size": options.device_batch_size, "total_batch_size": options.total_batch_size}


if __name__ == "__main__":
    cli.run(main, Options, demo=DEMO)
