"""Other people's models as checkpoints of ours, from transformers' format or the original nanochat's."""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanochat import paths
from nanochat.errors import UserError
from nanochat.hub import import_karpathy, verify
from nanochat.hub.card import read_card
from nanochat.hub.convert_model import check_tensors, our_config
from nanochat.hub.convert_tokenizer import TOKENIZER_FILE, read_tokenizer
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint, saving
from nanochat.train.checkpoint import Checkpoint

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TRANSFORMERS_FILES = (CONFIG_FILE, INDEX_FILE, TOKENIZER_FILE, "tokenizer_config.json", "README.md")
PICKLED_TOKENIZERS = (import_karpathy.TOKENIZER_FILE, f"tokenizer/{import_karpathy.TOKENIZER_FILE}")
STAGES = re.compile(r"(?<![a-z])(?:chat)?(base|mid|sft|rl)(?![a-z])")


@dataclass(frozen=True)
class IncomingModel:
    """A model that was trained elsewhere."""

    origin: str
    """repository or folder"""
    stage: str
    """base, mid, sft or rl, as far as it says"""
    step: int
    """of the stage; 0 if it is not known"""
    config: GPTConfig
    weights: dict[str, Tensor]
    """by our names, in float32"""
    tokenizer: Tokenizer
    folder: Path | None
    """where transformers can load it from; None if it cannot"""

    @property
    def tag(self) -> str:
        """What to call it: the last part of where it came from."""
        return re.sub(r"[^\w.-]", "-", Path(self.origin).name) or "imported"


def read_model(origin: str, step: int | None = None) -> IncomingModel:
    """The model in a folder, or in a repository of the hub, which is fetched.

    Raises UserError if it is not there, not of this architecture, or has a tokenizer of another kind.
    """
    folder = Path(origin).expanduser()
    if folder.is_dir():
        origin = str(folder.resolve())
    else:
        folder = fetch_model(origin, step)
    if (folder / CONFIG_FILE).is_file():
        return _read_transformers(folder, origin)
    if import_karpathy.steps(folder):
        return _read_original(folder, origin, step)
    raise UserError(
        f"{origin} holds neither {CONFIG_FILE} nor model_NNNNNN.pt: name the folder or repository of a model itself"
    )


def fetch_model(repository: str, step: int | None = None) -> Path:
    """Fetch what is needed of a repository into huggingface_hub's cache; returns the folder."""
    try:
        validate_repo_id(repository)
        names = wanted_files(HfApi().list_repo_files(repository), step)
        return Path(snapshot_download(repository, allow_patterns=names)) if names else Path(repository)
    except HFValidationError:
        raise UserError(
            f"{repository} is neither a folder here nor the name of a repository, such as ada/nanochat-d20"
        ) from None
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            raise UserError(
                f"{repository} is not at {constants.ENDPOINT}, or not for everyone: check its name, or set HF_TOKEN "
                "to a token that may read it"
            ) from None
        raise UserError(f"{constants.ENDPOINT} failed ({error}): run it again later") from None
    except (httpx2.HTTPError, ConnectionError) as error:
        raise UserError(f"cannot reach {constants.ENDPOINT} ({error}): check the network, or HF_ENDPOINT") from None


def wanted_files(names: Sequence[str], step: int | None = None) -> list[str]:
    """Which of a repository's files make up the model: transformers' if they are there, else the original's."""
    safetensors = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if CONFIG_FILE in names and safetensors:
        return [*safetensors, *(name for name in TRANSFORMERS_FILES if name in names)]
    found = [int(match[1]) for name in names if (match := import_karpathy.MODEL_FILE.fullmatch(name))]
    wanted = f"{step if step is not None else max(found, default=0):06d}"
    return [name for name in names if name in (f"model_{wanted}.pt", f"meta_{wanted}.json", *PICKLED_TOKENIZERS)]


def _read_transformers(folder: Path, origin: str) -> IncomingModel:
    config = our_config(_read_json(folder / CONFIG_FILE), origin)
    index = folder / INDEX_FILE
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS_FILE]
    weights: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors = load_file(folder / Path(name).name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / name} cannot be read ({error}): fetch it again") from None
        weights |= {tensor_name.removeprefix("model."): tensor.float() for tensor_name, tensor in tensors.items()}
    check_tensors(weights, config, origin)
    told = read_card(folder / "README.md")
    return IncomingModel(
        origin,
        stage=told.get("stage", stage_in_name(origin)),
        step=told.get("step", 0),
        config=config,
        weights=weights,
        tokenizer=read_tokenizer(folder / TOKENIZER_FILE),
        folder=folder,
    )


def _read_original(folder: Path, origin: str, step: int | None) -> IncomingModel:
    found = import_karpathy.read_original(folder, step)
    # In a base directory of the original the tokenizer lies beside the folders of checkpoints.
    places = [*(folder / name for name in PICKLED_TOKENIZERS), folder.parent.parent / PICKLED_TOKENIZERS[1]]
    path = next((place for place in places if place.is_file()), places[0])
    tokenizer = import_karpathy.read_pickled_tokenizer(path)
    return IncomingModel(origin, stage_in_name(origin), found.step, found.config, found.weights, tokenizer, None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from None


def stage_in_name(origin: str) -> str:
    """The stage that a folder or repository is called after; one that does not say is taken for sft."""
    found = STAGES.findall("/".join(Path(origin).parts[-2:]).lower())
    return found[-1] if found else "sft"


def compare_with_transformers(incoming: IncomingModel, model: GPT) -> list[str]:
    """Compare with what transformers makes of the same folder; what was found, a line each.

    Raises UserError if it differs.
    """
    if incoming.folder is None:
        return []
    passages = verify.held_out_passages(None, incoming.tokenizer, incoming.config.sequence_len)
    texts = verify.check_token_ids(incoming.tokenizer, incoming.folder, its_defaults=False)
    return [
        f"token ids: the same on {texts:,} texts",
        f"logits: {verify.check_logits(model, incoming.folder, passages)}",
    ]


def check_tokenizer(incoming: IncomingModel) -> None:
    """Raise UserError if the base directory's tokenizer is another: every model there depends on it."""
    folder = paths.tokenizer_dir()
    if folder.exists() and Tokenizer.load(folder).hash != incoming.tokenizer.hash:
        raise UserError(
            f"{incoming.origin} has another tokenizer than the models in {paths.base_dir()}: give it a folder of its "
            f"own, NANOCHAT_BASE_DIR={paths.base_dir()}-{incoming.tag} ./nanochat.sh import {incoming.origin}"
        )


def save_checkpoint(incoming: IncomingModel, model: GPT, source: str, tag: str, options: dict[str, Any]) -> Checkpoint:
    """Save the model as a checkpoint of `source`, and its tokenizer if there is none yet.

    `options` are what the next stage inherits. Raises UserError if a model of that stage and tag is there, or another
    tokenizer.
    """
    check_tokenizer(incoming)
    folder = paths.checkpoints_dir(source) / tag
    if checkpoint.checkpoints(folder):
        raise UserError(f"there is a {source} model {tag} already: name this one with --tag")
    incoming.tokenizer.save(paths.tokenizer_dir())
    meta = {
        "source": source,
        "tag": tag,
        "num_iterations": incoming.step,
        "tokenizer": incoming.tokenizer.hash,
        "model_config": dataclasses.asdict(incoming.config),
        "num_parameters": incoming.config.num_parameters,
        "options": options,
        "parent": None,
        "data": f"imported from {incoming.origin}",
        "learns": f"imported from {incoming.origin}",
        "origin": incoming.origin,
        "seconds": 0.0,
        "results": {},
        "machine": "unknown",
        "software": "unknown",
        "peak_memory": 0,
        "commit": saving.commit(),
    }
    try:
        return saving.write(folder, incoming.step, model.state_dict(), {}, meta)
    except saving.SaveError as error:
        raise UserError(f"{error}: make room, or set NANOCHAT_BASE_DIR to a folder on another disk") from None


def build_model(incoming: IncomingModel) -> GPT:
    """The model with its weights, on the CPU in float32. Raises UserError if they do not fit together."""
    if incoming.tokenizer.vocab_size > incoming.config.vocab_size:
        raise UserError(
            f"the tokenizer of {incoming.origin} has {incoming.tokenizer.vocab_size:,} tokens and the model knows "
            f"{incoming.config.vocab_size:,}: they do not belong together"
        )
    model = GPT(incoming.config)
    try:
        model.load_state_dict(incoming.weights)
    except RuntimeError as error:  # torch's, for shapes
        raise UserError(
            f"the weights of {incoming.origin} have other shapes than it says: {' '.join(str(error).split())}"
        ) from None
    return model.eval()
