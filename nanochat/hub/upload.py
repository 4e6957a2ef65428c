"""Folders that hf_prepare.sh made, on their way to the hub: what is in them, who may send them, and what arrived."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import httpx2
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from nanochat.data.download import retry
from nanochat.errors import UserError
from nanochat.hub.card import read_card
from nanochat.train.checkpoint import sha256

OUTDATED = ["*.safetensors", "*.safetensors.index.json"]
"""Removed where the folder has them no more: an old shard beside new weights would be loaded with them."""
GIT_FILE = ".gitattributes"


@dataclass(frozen=True)
class Parcel:
    """One folder and where it goes."""

    folder: Path
    repository: str
    stage: str
    tag: str

    @property
    def files(self) -> dict[str, Path]:
        """What is sent, by name."""
        return {path.name: path for path in sorted(self.folder.iterdir()) if path.is_file() and path.name[0] != "."}

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())

    def describe(self) -> str:
        """For a person: every file with its size."""
        lines = [f"  {name:<40} {readable(path.stat().st_size):>12}" for name, path in self.files.items()]
        return "\n".join([f"{self.folder} -> {self.repository}", *lines, f"  {'':<40} {readable(self.size):>12}"])


def readable(count: int) -> str:
    """`1,234.5 MB`, `2.1 kB`."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def parcels(output: Path, account: str, stage: str | None, tag: str | None) -> list[Parcel]:
    """The folders to send: those in `output` whose card says that they are this account's, of this stage and model.

    Raises UserError if there is none, or if a card names another repository than its folder would go to.
    """
    found = []
    for card in sorted(output.glob("[!.]*/README.md")):
        told = read_card(card)
        if told and stage in (None, told["stage"]) and tag in (None, told["tag"]):
            found.append(Parcel(card.parent, told["repository"], told["stage"], told["tag"]))
    if not found:
        wanted = " ".join([*([stage] if stage else []), "model", *([f"tagged {tag}"] if tag else [])])
        raise UserError(f"no {wanted} is prepared in {output}: run ./hf_prepare.sh --author {account} first")
    own = [parcel for parcel in found if parcel.repository.startswith(f"{account}/")]
    for parcel in own or found:
        if parcel.repository != f"{account}/{parcel.folder.name}":
            raise UserError(
                f"the card in {parcel.folder} names {parcel.repository}, and it would go to "
                f"{account}/{parcel.folder.name}: run ./hf_prepare.sh --author {account} --force"
            )
    return own


def check_login(api: HfApi, account: str) -> None:
    """Raise UserError if there is no login, or it may not write to this account."""
    try:
        me = retry(api.whoami)
    except LocalTokenNotFoundError:
        raise UserError(
            "you are not logged in: run .venv/bin/hf auth login, or set HF_TOKEN to a token that may write"
        ) from None
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise UserError(
                f"{constants.ENDPOINT} does not know your token: run .venv/bin/hf auth login again, or set HF_TOKEN "
                "to a valid one"
            ) from None
        _explain(error)
    except (httpx2.HTTPError, OSError) as error:
        _explain(error)
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"your token may only read: make one that may write at {constants.ENDPOINT}/settings/tokens")
    roles = {me["name"]: "owner"} | {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])}
    if account not in roles:
        raise UserError(
            f"you are logged in as {me['name']}, who has no part in {account}: pass --username {me['name']}"
        )
    if roles[account] == "read":
        raise UserError(f"you may only read in {account}: ask for the right to write there")


def check_name(api: HfApi, parcel: Parcel, private: bool) -> None:
    """Raise UserError if the repository exists with something else in it, or in public when it is to be private."""
    info = _info(api, parcel)
    if info is None:
        return
    theirs = {sibling.rfilename for sibling in info.siblings or []} - {GIT_FILE}
    told = info.card_data.get("nanochat") if info.card_data else None
    if "README.md" in theirs:
        is_ours = isinstance(told, dict) and told.get("repository") == parcel.repository
    else:  # what an upload that was cut off has left, or nothing
        is_ours = theirs <= parcel.files.keys()
    if not is_ours:
        raise UserError(
            f"the name {parcel.repository} is taken by something else: rename or delete that at "
            f"{link(parcel.repository)}/settings"
        )
    if private and not info.private:
        raise UserError(f"{parcel.repository} is public: make it private at {link(parcel.repository)}/settings first")


def _info(api: HfApi, parcel: Parcel, revision: str | None = None, files: bool = False) -> ModelInfo | None:
    try:
        return retry(lambda: api.model_info(parcel.repository, revision=revision, files_metadata=files))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None
    except (httpx2.HTTPError, OSError) as error:
        _explain(error)


def send(api: HfApi, parcel: Parcel, private: bool, revision: str | None) -> None:
    """Make the repository, and the branch, if they are not there; upload; compare what arrived.

    What the hub has already is not sent again. Raises UserError if it cannot be sent or arrived damaged.
    """

    def upload() -> None:
        api.create_repo(parcel.repository, private=private or None, exist_ok=True)
        if revision:
            api.create_branch(parcel.repository, branch=revision, exist_ok=True)
        try:
            api.upload_folder(
                repo_id=parcel.repository,
                folder_path=parcel.folder,
                allow_patterns=list(parcel.files),
                delete_patterns=OUTDATED,
                revision=revision,
                commit_message=f"nanochat {parcel.tag} {parcel.stage}",
            )
        except RuntimeError as error:  # it wraps what a single file met
            raise error.__cause__ if isinstance(error.__cause__, httpx2.HTTPError) else error from None

    try:
        retry(upload)
    except (httpx2.HTTPError, OSError, RuntimeError) as error:  # Xet's own errors are RuntimeErrors
        _explain(error)
    verify(api, parcel, revision)


def verify(api: HfApi, parcel: Parcel, revision: str | None = None) -> None:
    """Raise UserError unless every file is on the hub with its size and digest."""
    info = _info(api, parcel, revision, files=True)
    there = {sibling.rfilename: sibling for sibling in (info.siblings if info else None) or []}
    for name, path in parcel.files.items():
        entry, size = there.get(name), path.stat().st_size
        if entry is None:
            problem = "is not there"
        elif entry.size != size:
            problem = f"has {entry.size} bytes there and {size} here"
        elif entry.lfs and entry.lfs.sha256 != sha256(path):
            problem = "has another sha256 there"
        elif not entry.lfs and entry.blob_id != _git_blob(path):
            problem = "has other content there"
        else:
            continue
        raise UserError(
            f"{name} of {parcel.repository} {problem}: run it again, and what is whole will not be sent again"
        )


def _git_blob(path: Path) -> str:
    """Git's name for the content of a file that is not in LFS."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def collect(api: HfApi, sent: list[Parcel], account: str, private: bool) -> str:
    """Put the models into one collection, which is made if there is none; returns its address."""
    try:
        collection = api.create_collection(
            f"nanochat {sent[0].tag}", namespace=account, private=private, exists_ok=True
        )
        for parcel in sent:
            api.add_collection_item(collection.slug, parcel.repository, "model", exists_ok=True)
    except (httpx2.HTTPError, OSError) as error:
        _explain(error)
    return f"{constants.ENDPOINT}/collections/{collection.slug}"


def link(repository: str) -> str:
    """Where a person looks at it."""
    return f"{constants.ENDPOINT}/{repository}"


def _explain(error: BaseException) -> NoReturn:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        raise UserError(
            f"the hub refuses ({reason}): make a token that may write to your models at "
            f"{constants.ENDPOINT}/settings/tokens and run .venv/bin/hf auth login"
        ) from error
    raise UserError(
        f"{constants.ENDPOINT} could not be reached or failed ({reason}): run it again, what has arrived will not "
        "be sent again"
    ) from error
