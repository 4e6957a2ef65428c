"""Upload the models that hf_prepare.sh exported to the Hugging Face Hub.

python upload_to_hf.py --username ada --dry-run
python upload_to_hf.py --username ada --stage sft --private
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi

from nanochat import cli
from nanochat.errors import UserError
from nanochat.hub.upload import check_login, check_repository, exported_models, upload
from nanochat.stages import StageName
from nanochat.units import format_bytes


@dataclass
class Options:
    """Upload exported models. Files that the hub already has are not sent again."""

    username: str = ""
    """your user name or organization on the hub"""
    stage: Literal[StageName, "all"] = "all"
    """stage to upload; all: every exported stage"""
    tag: str | None = None
    """model to upload, such as d20; default: all that are exported"""
    folder: Path = Path("hf_models")
    """output folder of hf_prepare.sh"""
    dry_run: bool = False
    """list the files without sending them; needs no login and no network"""
    private: bool = False
    """create private repositories"""
    revision: str | None = None
    """branch to upload to; default: main"""


DEMO = Options()


def main(options: Options) -> None:
    if not options.username:
        raise UserError("--username is missing: pass your name on the hub, such as --username ada")
    stage = None if options.stage == "all" else options.stage
    models = exported_models(options.folder, options.username, stage, options.tag)
    total = 0
    for model in models:
        print(f"{model.folder} -> {model.repository}")
        for name, path in model.files.items():
            size = path.stat().st_size
            total += size
            print(f"  {name:<40} {format_bytes(size):>12}")
    print(f"{format_bytes(total)} in total", flush=True)
    if options.dry_run:
        print("nothing was sent (--dry-run)")
        return
    api = HfApi()
    check_login(api, options.username)
    for model in models:
        check_repository(api, model, options.private)
    for model in models:
        upload(api, model, options.private, options.revision)
        print(f"uploaded and verified: {model.url}", flush=True)


if __name__ == "__main__":
    cli.run(main, Options, demo=DEMO)
