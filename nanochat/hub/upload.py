"""Upload the folders that hf_prepare.sh wrote: find them, check the account, upload and verify."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils.sha import git_hash

from nanochat.data.download import retry
from nanochat.errors import UserError, one_line
from nanochat.hub.card import read_card
from nanochat.train.checkpoint import sha256

DELETE_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.gguf", "Modelfile", "template", "params"]
"""Deleted on the hub if the folder does not have them: old shards and GGUF files would be loaded as the new model."""


@dataclass(frozen=True)
class ExportedModel:
    """A folder that hf_prepare.sh wrote, and its repository."""

    folder: Path
    repository: str
    stage: str
    tag: str

    @property
    def files(self) -> dict[str, Path]:
        return {path.name: path for path in sorted(self.folder.iterdir()) if path.is_file() and path.name[0] != "."}

    @property
    def url(self) -> str:
        return f"{constants.ENDPOINT}/{self.repository}"


def exported_models(output: Path, account: str, stage: str | None, tag: str | None) -> list[ExportedModel]:
    """Find exported folders by their cards. Raises UserError if there are none, or if card and folder name disagree."""
    found = []
    for card in sorted(output.glob("[!.]*/README.md")):
        data = read_card(card)
        if data and stage in (None, data["stage"]) and tag in (None, data["tag"]):
            found.append(ExportedModel(card.parent, data["repository"], data["stage"], data["tag"]))
    if not found:
        wanted = " ".join(filter(None, [stage, "model", tag]))
        raise UserError(f"no exported {wanted} in {output}: run ./hf_prepare.sh --author {account} first")
    own = [model for model in found if model.repository.startswith(f"{account}/")]
    for model in own or found:
        if model.repository != f"{account}/{model.folder.name}":
            raise UserError(
                f"the card in {model.folder} names {model.repository} instead of {account}/{model.folder.name}: run "
                f"./hf_prepare.sh --author {account} --force"
            )
    return own


@contextmanager
def _hub_errors() -> Iterator[None]:
    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError(
            "you are not logged in: run .venv/bin/hf auth login, or set HF_TOKEN to a token with write access"
        ) from None
    except (httpx2.HTTPError, OSError, RuntimeError) as error:  # Xet raises RuntimeErrors
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise UserError(
                f"{constants.ENDPOINT} denies access ({one_line(error)}): make a token with write access at "
                f"{constants.ENDPOINT}/settings/tokens and run .venv/bin/hf auth login, or set HF_TOKEN"
            ) from error
        raise UserError(
            f"{constants.ENDPOINT} failed ({one_line(error)}): run the same command again to resume"
        ) from error


def check_login(api: HfApi, account: str) -> None:
    """Raise UserError if nobody is logged in, or if the login has no write access to the account."""
    with _hub_errors():
        me = retry(api.whoami)
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"your token is read-only: make one with write access at {constants.ENDPOINT}/settings/tokens")
    roles = {me["name"]: "owner"} | {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])}
    if roles.get(account, "read") == "read":
        raise UserError(f"{me['name']} has at most read access to {account}: pass --username {me['name']}")


def check_repository(api: HfApi, model: ExportedModel, private: bool) -> None:
    """Raise UserError if the repository exists with other content, or is public although `private` is set."""
    info = _model_info(api, model)
    if info is None:
        return
    existing = {sibling.rfilename for sibling in info.siblings or []} - {".gitattributes"}
    card = info.card_data.get("nanochat") if info.card_data else None
    if "README.md" in existing:
        is_ours = isinstance(card, dict) and card.get("repository") == model.repository
    else:  # empty, or an interrupted upload
        is_ours = existing <= model.files.keys()
    if not is_ours:
        raise UserError(f"{model.repository} already holds other content: rename or delete it at {model.url}/settings")
    if private and not info.private:
        raise UserError(f"{model.repository} is public: make it private at {model.url}/settings first")


def _model_info(api: HfApi, model: ExportedModel, **options: Any) -> ModelInfo | None:
    with _hub_errors(), suppress(RepositoryNotFoundError, RevisionNotFoundError):
        return retry(lambda: api.model_info(model.repository, **options))
    return None


def upload(api: HfApi, model: ExportedModel, private: bool, revision: str | None) -> None:
    """Create repository and branch if needed, send the files that the hub lacks, and verify. Raises UserError."""

    def attempt() -> None:
        api.create_repo(model.repository, private=private or None, exist_ok=True)
        if revision:
            api.create_branch(model.repository, branch=revision, exist_ok=True)
        try:
            api.upload_folder(
                repo_id=model.repository,
                folder_path=model.folder,
                allow_patterns=list(model.files),
                delete_patterns=DELETE_PATTERNS,
                revision=revision,
                commit_message=f"nanochat {model.tag} {model.stage}",
            )
        except RuntimeError as error:  # upload_folder wraps the error of a single file
            raise error.__cause__ if isinstance(error.__cause__, httpx2.HTTPError) else error from None

    with _hub_errors():
        retry(attempt)
    info = _model_info(api, model, revision=revision, files_metadata=True)
    uploaded = {sibling.rfilename: sibling for sibling in (info.siblings if info else None) or []}
    for name, path in model.files.items():
        entry = uploaded.get(name)
        if entry and entry.lfs:
            is_same = entry.lfs.sha256 == sha256(path)
        else:
            is_same = entry is not None and entry.blob_id == git_hash(path.read_bytes())
        if not is_same:
            problem = "differs on the hub" if entry else "is missing on the hub"
            raise UserError(f"{name} of {model.repository} {problem}: run the same command again to send it")
