"""Import a model trained elsewhere, in transformers' or karpathy/nanochat's format, as a checkpoint."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file
from torch import Tensor

from nanochat import paths
from nanochat.data.download import check_disk_space, retry, stop_above
from nanochat.errors import UserError, one_line
from nanochat.hub import import_karpathy, verify
from nanochat.hub.card import read_card
from nanochat.hub.convert_model import build_model, our_weights, read_config
from nanochat.hub.convert_tokenizer import TOKENIZER_FILE, read_tokenizer
from nanochat.model.gpt import GPT
from nanochat.runtime import commit
from nanochat.stages import STAGES
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint
from nanochat.train.checkpoint import Checkpoint
from nanochat.untrusted import read_json, reading

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
TRANSFORMERS_FILES = (CONFIG_FILE, INDEX_FILE, TOKENIZER_FILE, "README.md")
DOWNLOAD_AGAIN = "download it again"
PICKLED_TOKENIZERS = (import_karpathy.TOKENIZER_FILE, f"tokenizer/{import_karpathy.TOKENIZER_FILE}")
STAGE_NAMES = re.compile(rf"(?<![a-z])(?:chat)?({'|'.join(STAGES)})(?![a-z])")


@dataclass(frozen=True)
class ImportedModel:
    """A model that was trained elsewhere."""

    origin: str
    stage: str
    step: int  # step of the stage, 0 if unknown
    model: GPT  # on the CPU in float32
    tokenizer: Tokenizer
    folder: Path | None  # folder that transformers can load; None for karpathy/nanochat's format

    @property
    def tag(self) -> str:
        return re.sub(r"[^\w.-]", "-", Path(self.origin).name) or "imported"


def read_model(origin: str, step: int | None = None) -> ImportedModel:
    """Read a model from a folder or the hub. Raises UserError if it is missing, damaged or unsupported."""
    folder = Path(origin).expanduser()
    if folder.is_dir():
        origin = str(folder.resolve())
    else:
        folder = download_model(origin, step)
    if (folder / CONFIG_FILE).is_file():
        imported = _read_transformers(folder, origin)
    elif import_karpathy.steps(folder):
        imported = _read_karpathy(folder, origin, step)
    else:
        raise UserError(f"{origin} has neither {CONFIG_FILE} nor model_NNNNNN.pt: pass a model's folder or repository")
    num_tokens, max_tokens = imported.tokenizer.vocab_size, imported.model.config.vocab_size
    if num_tokens > max_tokens:
        raise UserError(
            f"the tokenizer of {origin} must have at most the model's {max_tokens:,} tokens, got {num_tokens:,}: use "
            "the tokenizer that the model was trained with"
        )
    return imported


def download_model(repository: str, step: int | None = None) -> Path:
    """Download the files of the model to huggingface_hub's cache; return their folder."""
    try:
        validate_repo_id(repository)
        listed = retry(lambda: HfApi().model_info(repository)).siblings or []
        names = files_to_download([file.rfilename for file in listed], step)
        if not names:
            return Path(repository)
        files = retry(lambda: snapshot_download(repository, allow_patterns=names, dry_run=True))
        num_bytes = sum(file.file_size or 0 for file in files if file.will_download)
        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        check_disk_space(cache, num_bytes, "or set HF_HOME to a folder on a larger disk")
        bar = stop_above(num_bytes)
        return Path(retry(lambda: snapshot_download(repository, allow_patterns=names, tqdm_class=bar)))
    except HFValidationError:
        raise UserError(
            f"{repository} must be an existing folder or the name of a repository, such as ada/nanochat-d20"
        ) from None
    except (httpx2.HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise  # of this machine
        raise UserError(
            f"cannot download {repository} from {constants.ENDPOINT} ({one_line(error)}): check its name "
            "and the network, or set HF_TOKEN to a token with read access if it is private"
        ) from None


def files_to_download(names: Sequence[str], step: int | None = None) -> list[str]:
    """Select the files of the model in a repository: transformers' if it has them, else karpathy/nanochat's."""
    safetensors = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if CONFIG_FILE in names and safetensors:
        return [*safetensors, *(name for name in TRANSFORMERS_FILES if name in names)]
    steps = [int(match[1]) for name in names if (match := import_karpathy.MODEL_FILE.fullmatch(name))]
    chosen = f"{step if step is not None else max(steps, default=0):06d}"
    return [name for name in names if name in (f"model_{chosen}.pt", f"meta_{chosen}.json", *PICKLED_TOKENIZERS)]


def _read_transformers(folder: Path, origin: str) -> ImportedModel:
    weights: dict[str, Tensor] = {}
    with reading(folder / CONFIG_FILE, DOWNLOAD_AGAIN):
        config = read_config(read_json(folder / CONFIG_FILE), origin)
    names = ["model.safetensors"]
    if (folder / INDEX_FILE).exists():
        with reading(folder / INDEX_FILE, DOWNLOAD_AGAIN):
            names = sorted({Path(name).name for name in read_json(folder / INDEX_FILE)["weight_map"].values()})
    for name in names:
        with reading(folder / name, DOWNLOAD_AGAIN):
            weights |= load_file(folder / name)
    with reading(folder, DOWNLOAD_AGAIN):
        model = build_model(our_weights(weights, config, origin), config, origin)
    card = read_card(folder / "README.md")
    stage, step = card.get("stage", stage_in_name(origin)), card.get("step", 0)
    return ImportedModel(origin, stage, step, model, read_tokenizer(folder / TOKENIZER_FILE), folder)


def _read_karpathy(folder: Path, origin: str, step: int | None) -> ImportedModel:
    step, model = import_karpathy.read_checkpoint(folder, step)
    # In a base directory of karpathy/nanochat the tokenizer is next to the folders of checkpoints.
    places = [*(folder / name for name in PICKLED_TOKENIZERS), folder.parent.parent / PICKLED_TOKENIZERS[1]]
    path = next((place for place in places if place.is_file()), places[0])
    tokenizer = import_karpathy.read_pickled_tokenizer(path)
    return ImportedModel(origin, stage_in_name(origin), step, model, tokenizer, None)


def stage_in_name(origin: str) -> str:
    """The stage in the name of a folder or repository; sft if there is none."""
    found = STAGE_NAMES.findall("/".join(Path(origin).parts[-2:]).lower())
    return found[-1] if found else "sft"


def compare_with_transformers(imported: ImportedModel) -> list[str]:
    """Compare with the model that transformers loads from the folder; return one line per result. Raises UserError."""
    if imported.folder is None:
        return []
    passages = verify.held_out_passages((), imported.tokenizer, imported.model.config.sequence_len)
    with reading(imported.folder, "transformers cannot load it"):
        texts = verify.check_token_ids(imported.tokenizer, imported.folder, check_defaults=False)
        result = verify.check_logits(imported.model, imported.folder, passages)
    return [
        f"token ids: identical on {texts:,} texts",
        f"logits: largest difference {result.largest:.1e}, same top token at {result.agreement:.2%} of "
        f"{passages.tokens:,} tokens",
    ]


def check_tokenizer(imported: ImportedModel) -> None:
    """Raise UserError if the base directory has another tokenizer: all models in it depend on that one."""
    folder = paths.tokenizer_dir()
    if folder.exists() and Tokenizer.load(folder).hash != imported.tokenizer.hash:
        raise UserError(
            f"{imported.origin} and the models in {paths.base_dir()} have different tokenizers: set another base "
            f"directory, such as NANOCHAT_BASE_DIR={paths.base_dir()}-{imported.tag}"
        )


def save_checkpoint(imported: ImportedModel, source: str, tag: str, options: dict[str, Any]) -> Checkpoint:
    """Save a checkpoint whose `options` the next stage inherits. Raises UserError if the tag is in use."""
    folder = paths.checkpoints_dir(source) / paths.check_tag(tag, "--tag")
    if checkpoint.checkpoints(folder):
        raise UserError(f"the {source} model {tag} already exists: choose another name with --tag")
    imported.tokenizer.save(paths.tokenizer_dir())
    origin = f"imported from {imported.origin}"
    meta = {
        "source": source,
        "tag": tag,
        "num_iterations": imported.step,
        "tokenizer": imported.tokenizer.hash,
        "model_config": dataclasses.asdict(imported.model.config),
        "num_parameters": imported.model.config.num_parameters,
        "options": options,
        "parent": None,
        "data": origin,
        "trained_on": origin,
        "origin": imported.origin,
        "seconds": 0.0,
        "results": {},
        "machine": "unknown",
        "software": "unknown",
        "peak_memory": 0,
        "commit": commit(),
    }
    try:
        return checkpoint.write(folder, imported.step, imported.model.state_dict(), {}, meta)
    except checkpoint.SaveError as error:
        raise UserError(f"{error}: free some space, or set NANOCHAT_BASE_DIR to a folder on another disk") from None
