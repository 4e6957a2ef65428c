"""The sources of text to pretrain on, by the names that --dataset takes, and the mixture of their tokens."""

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanochat import paths
from nanochat.data.token_files import TokenShards
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer
from nanochat.units import format_table

RECORD_FILE = "source.json"
HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:/([^@]+))?(?:@(.+))?")  # owner/name[/configuration][@revision]


class Dataset(NamedTuple):
    """Text known to this project: shuffled, in files shard_NNNNN.parquet on the hub, or part of the installation."""

    license: str
    repository: str | None = None
    num_shards: int = 0


DATASETS = {
    "fineweb-edu": Dataset("ODC-By 1.0", "karpathy/fineweb-edu-100b-shuffle", 1823),
    "climbmix": Dataset("CC BY-NC 4.0, not for commercial use", "karpathy/climbmix-400b-shuffle", 6543),
    "encyclopedia": Dataset("CC BY-SA 4.0"),
}


class Source(NamedTuple):
    """One of the names given to --dataset."""

    name: str
    weight: float | None = None
    location: Path | None = None  # the user's file or folder

    @property
    def folder(self) -> str:
        """Name of its folders below data/ and tokens/."""
        if self.name in DATASETS:
            return self.name
        return self.name.replace("/", "--") if "/" in self.name else f"local--{self.name}"

    @property
    def record(self) -> dict[str, Any]:
        """Facts that ./prepare.sh recorded; empty if it has not prepared this source."""
        try:
            return dict(json.loads((paths.tokens_dir(self.folder) / RECORD_FILE).read_text()))
        except (OSError, ValueError):
            return {}

    @property
    def repository(self) -> str | None:
        """owner/name on the hub; None for other sources."""
        if self.name in DATASETS:
            return DATASETS[self.name].repository
        match = HUB_NAME.fullmatch(self.name)
        return match[1] if match else None

    @property
    def origin(self) -> str:
        """Repository and revision on the hub, or where else the text is from."""
        if not self.repository:
            return "included in the installation" if self.name in DATASETS else "own files"
        try:
            manifest = json.loads((paths.data_dir(self.folder) / paths.MANIFEST_FILE).read_text())
            return f"{self.repository}@{manifest['revision'][:10]}"
        except (OSError, ValueError, KeyError, TypeError):
            return self.repository

    @property
    def license(self) -> str | None:
        """License of the text; None if nobody has stated it."""
        return DATASETS[self.name].license if self.name in DATASETS else self.record.get("license")

    def __str__(self) -> str:
        return self.name if self.weight is None else f"{self.name}:{self.weight:g}"


def parse(specs: str | Sequence[str]) -> list[Source]:
    """Parse the values of --dataset: names, each with an optional :weight. Raises UserError."""
    sources = [_parse(spec) for spec in ([specs] if isinstance(specs, str) else specs)]
    names, weights = {source.name for source in sources}, [source.weight for source in sources]
    if len(names) < len(weights) or not names:
        raise UserError(f"--dataset must be different names, got {' '.join(specs)}: rename a folder")
    if None in weights and any(weights):
        raise UserError(f"--dataset must have a weight for every name or for none, got {' '.join(specs)}")
    return sources


def _parse(spec: str) -> Source:
    name, colon, weight = spec.rpartition(":")
    location = Path(os.path.expanduser(spec))  # unlike Path.expanduser, leaves ~unknown as it is
    if colon and not location.exists() and re.fullmatch(r"-?[\d.]+(e-?\d+)?|nan|inf", weight):
        try:
            if 0 < float(weight) < math.inf:
                return _parse(name)._replace(weight=float(weight))
        except ValueError:
            pass
        raise UserError(f"--dataset {spec}: the weight must be a number above 0, got {weight}")
    if spec in DATASETS:
        return Source(spec)
    if location.exists():
        return Source(location.resolve().name, None, location.resolve())
    if HUB_NAME.fullmatch(spec):
        return Source(spec)
    if Source(location.name).record:  # the folder may be on another machine
        return Source(location.name)
    raise UserError(
        f"--dataset must be {', '.join(DATASETS)}, owner/name on the hub, or a file or folder that exists, got {spec}"
    )


def shares(sources: Sequence[Source], sizes: Sequence[float]) -> list[float]:
    """Share of each source in training: by weight, or without weights by size."""
    weights = [source.weight or size for source, size in zip(sources, sizes, strict=True)]
    return [weight / sum(weights) for weight in weights]


class MixedText(NamedTuple):
    """The tokens of one split of several sources, as one stream."""

    sources: list[Source]
    parts: list[TokenShards]
    shares: list[float]
    stream: TokenShards

    @classmethod
    def open(
        cls, specs: str | Sequence[str], split: str, tokenizer: Tokenizer, max_tokens: int = sys.maxsize
    ) -> "MixedText":
        """Mix the tokens of sources by weight: as many as it takes to use each of them once, at most `max_tokens`.

        Smaller sources are repeated. Raises UserError if a source is not prepared.
        """
        specs = [specs] if isinstance(specs, str) else specs
        sources, parts = parse(specs), []
        for number, source in enumerate(sources):
            folder, record = paths.tokens_dir(source.folder), source.record
            command = f"run ./prepare.sh --dataset {shlex.join(specs)}"
            if not folder.exists():
                raise UserError(f"no tokens of {source.name} in {folder}: {command} first")
            if record.get("location") not in (None, str(source.location)) and source.location:
                raise UserError(f"{folder} was made from {record['location']}, not {source.location}: {command}")
            others = [other.name for other in sources[:number] if other.name not in DATASETS]
            if split == "train" and record.get("after", others) != others:
                raise UserError(f"{source.name} was prepared with other sources, and may repeat their text: {command}")
            parts.append(TokenShards.open(folder, split, tokenizer))
        sizes = [len(part.ids) for part in parts]
        by_weight = shares(sources, sizes)
        total = max((size / share for size, share in zip(sizes, by_weight, strict=True) if share), default=0)
        counts = [round(min(total, max_tokens) * share) for share in by_weight]
        return cls(sources, parts, by_weight, TokenShards.join(parts, counts))

    @property
    def name(self) -> str:
        return " + ".join(map(str, self.sources))

    def table(self, num_tokens: float) -> str:
        """One line per source: its size, license, and share and epochs in a training run of `num_tokens`."""
        rows = [("source", "documents", "tokens", "share", "epochs", "license, from")]
        for source, part, share in zip(self.sources, self.parts, self.shares, strict=True):
            epochs = f"{num_tokens * share / len(part.ids):.1f}"
            origin = f"{source.license or 'license not stated'}, {source.origin}"
            rows.append((source.name, f"{part.num_documents:,}", f"{len(part.ids):,}", f"{share:.1%}", epochs, origin))
        return format_table(rows)
