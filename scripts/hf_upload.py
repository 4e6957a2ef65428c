"""Send what hf_prepare.sh made to the Hugging Face Hub.

python upload_to_hf.py --username ada --dry-run
python upload_to_hf.py --username ada --stage sft --private
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi

from nanochat import cli
from nanochat.errors import UserError
from nanochat.hub.upload import check_login, check_name, collect, link, parcels, readable, send


@dataclass
class Options:
    """Upload prepared models. Run again, it sends only what is not there yet."""

    username: str = ""
    """your name on the hub, or your organisation's"""
    stage: Literal["base", "mid", "sft", "rl", "all"] = "all"
    """which stage; all: each that is prepared"""
    tag: str | None = None
    """which model, such as d20; by default each that is prepared"""
    folder: Path = Path("hf_models")
    """where hf_prepare.sh put them"""
    dry_run: bool = False
    """say what would be sent, and send nothing; needs no login and no network"""
    private: bool = False
    """make repositories that only you can see"""
    collection: bool = False
    """put the models into one collection"""
    revision: str | None = None
    """branch to send to; by default main"""


DEMO = Options()


def main(options: Options) -> None:
    if not options.username:
        raise UserError("--username is missing: pass your name on the hub, such as --username ada")
    chosen = parcels(options.folder, options.username, None if options.stage == "all" else options.stage, options.tag)
    for parcel in chosen:
        print(parcel.describe())
    print(f"{readable(sum(parcel.size for parcel in chosen))} in all", flush=True)
    if options.dry_run:
        print("nothing was sent (--dry-run)")
        return
    api = HfApi()
    check_login(api, options.username)
    for parcel in chosen:
        check_name(api, parcel, options.private)
    for parcel in chosen:
        send(api, parcel, options.private, options.revision)
        print(f"sent and checked: {link(parcel.repository)}", flush=True)
    if options.collection:
        print(f"together: {collect(api, chosen, options.username, options.private)}")


if __name__ == "__main__":
    cli.run(main, Options, demo=DEMO)
