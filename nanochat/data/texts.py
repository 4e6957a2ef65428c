"""Text to pretrain on, from the installation, the hub or the user's files: downloaded, read once and split.

One source becomes a `Text` with the splits `train` and `val`; nanochat.data.token_writer writes its token files.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from httpx2 import HTTPError
from huggingface_hub import HfApi, hf_hub_download

from nanochat import paths
from nanochat.data import demo_data, documents
from nanochat.data.amount import CHARS_PER_TOKEN, SHARD_CHARS, SPARE, shards_for_depth, tokens_for_depth
from nanochat.data.documents import Part, Problems, Span
from nanochat.data.download import fetch, stop_above
from nanochat.data.progress import in_processes
from nanochat.data.sources import DATASETS, HUB_NAME, Source, parse
from nanochat.data.token_writer import TextShard
from nanochat.errors import UserError, one_line
from nanochat.units import format_bytes
from nanochat.untrusted import MAX_LINE_BYTES

HELD_OUT_SHARE, MIN_HELD_OUT = 0.01, 8
"""Held out of the user's text: a hundredth of the documents, but at least eight, or a tenth of fewer than eighty."""
ONE_PROCESS_CHARS = 8_000_000  # less text is read and tokenized faster than processes are started


@dataclass
class TextOptions:
    """Which text to read, and how much of it."""

    dataset: tuple[str, ...] = ("fineweb-edu",)
    """text to pretrain on: fineweb-edu (ODC-By 1.0), climbmix (CC BY-NC 4.0, not for commercial use), encyclopedia (CC
    BY-SA 4.0, five million characters, included in the installation), a file or folder of your own, or
    owner/name[/configuration][@revision] on the hub; several with weights: fineweb-edu:0.7 ./mybooks:0.3"""
    text_column: tuple[str, ...] = ("text",)
    """column or field with the text in Parquet and JSON Lines; of several, the first that a file has"""
    split: str = "train"
    """split of a dataset on the hub"""
    license: str | None = None
    """license of your own text, or of one on the hub that states none, such as cc-by-4.0 or proprietary"""
    depth: int = 20
    """depth of the model to train; sets how much text is downloaded"""
    num_shards: int | None = None
    """files of text, one of them for validation; default: as many as the depth needs, 104 for depth 20"""
    verify: bool = False
    """verify the checksums of all files and download damaged ones again"""
    vocab_size: int = 32768
    """number of tokens, including the nine special ones"""


@dataclass(frozen=True)
class Text:
    """The text of one source in two disjoint splits, `train` and `val`, each in shards."""

    source: Source
    splits: Mapping[str, Sequence[TextShard]]
    num_chars: float
    record: dict[str, Any] | None = None  # to save with the token files; None for the project's own datasets
    digests: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))  # of the documents, duplicates left out

    def read(self, split: str) -> Iterator[str]:
        for shard in self.splits[split]:
            yield from shard.texts()


def open_texts(options: TextOptions) -> list[Text]:
    """Open the text of every source, downloaded if it is on the hub. Raises UserError if a source has none."""
    texts: list[Text] = []
    for source in parse(options.dataset):
        if source.name == "encyclopedia":
            texts.append(encyclopedia(source))
        elif source.name in DATASETS:
            texts.append(known_text(source, options))
        elif source.repository:
            texts.append(hub_text(source, options, texts))
        elif source.location:
            root = source.location if source.location.is_dir() else source.location.parent
            texts.append(file_text(source, root, local_files(source.location), options, texts))
        else:
            raise UserError(f"--dataset {source.name} is prepared, but its folder is not here: pass the folder's path")
    return texts


def encyclopedia(source: Source) -> Text:
    """Leads of Wikipedia's vital articles, five million characters, without a download."""
    splits: tuple[demo_data.Split, ...] = ("val", "train")
    shards = (TextShard(split, demo_data.ENCYCLOPEDIA_ORIGIN, partial(demo_data.documents, split)) for split in splits)
    return Text(source, {shard.name: [shard] for shard in shards}, 5e6)


def known_text(source: Source, options: TextOptions) -> Text:
    """Download shards. The first is always `val`: every run has it, and the text is shuffled."""
    dataset, folder = DATASETS[source.name], paths.data_dir(source.folder)
    num_shards = options.num_shards
    if num_shards is None:
        num_shards = min(shards_for_depth(options.depth, options.vocab_size), dataset.num_shards)
    if not 2 <= num_shards <= dataset.num_shards:
        raise UserError(
            f"--num-shards must be between 2 (the first shard is for validation) and {dataset.num_shards} for "
            f"{source.name}, got {num_shards}"
        )
    names = [f"shard_{i:05d}.parquet" for i in range(num_shards)]
    # Token files take about as much disk space as the compressed text.
    files = fetch(str(dataset.repository), names, folder, verify=options.verify, disk_factor=2.0)
    size = format_bytes(sum(file.size for file in files))
    print(f"{source.name}: {len(files)} shards, {size}, all checksums verified; license: {dataset.license}")
    parts = [Part(Path(file.name).stem, (Span(folder / file.name),)) for file in files]
    shards = [
        TextShard(part.name, file.sha256, partial(documents.read, part))
        for part, file in zip(parts, files, strict=True)
    ]
    return Text(source, {"val": shards[:1], "train": shards[1:]}, len(files) * SHARD_CHARS)


def local_files(location: Path) -> list[Path]:
    """List the text in a file or folder. Raises UserError if there is none."""
    every = [location] if location.is_file() else sorted(path for path in location.rglob("*") if path.is_file())
    found = [path for path in every if documents.text_format(path) in documents.FORMATS and path.stat().st_size]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(location).parts)]
    if not found:
        formats = f"{', '.join(documents.FORMATS)}, each also with {' or '.join(documents.COMPRESSIONS)}"
        raise UserError(f"no text in {location}: expected {formats}, found {len(every)} other or empty files")
    return found


def hub_text(source: Source, options: TextOptions, others: Sequence[Text]) -> Text:
    """Download as many files of a dataset on the hub as the depth needs."""
    hub = source.record.get("hub", {})
    if hub.get("split") != options.split:
        hub = resolve(source, options.split)
    folder, names = paths.data_dir(source.folder), hub["files"]

    def download(count: int) -> list[Path]:
        large = [name for name in names[:count] if name not in hub["in_git"]]
        fetch(str(source.repository), large, folder, revision=hub["revision"], verify=options.verify, disk_factor=2.0)
        for name in set(names[:count]) & set(hub["in_git"]):  # small, and without a sha256
            try:
                hf_hub_download(
                    str(source.repository), name, repo_type="dataset", revision=hub["revision"], local_dir=folder,
                    tqdm_class=stop_above(0),
                )  # fmt: skip
            except (OSError, HTTPError) as error:
                raise UserError(f"cannot download {name} of {source.name} ({one_line(error)}): run again") from None
        return [folder / name for name in names[:count]]

    count = options.num_shards
    if count is None:
        first = in_processes(
            f"reading {source.name}", documents.scan, documents.find_parts(folder, download(1), options.text_column)
        )
        share = source.weight / sum(s.weight or 0 for s in parse(options.dataset)) if source.weight else 1.0
        needed = SPARE * share * CHARS_PER_TOKEN * tokens_for_depth(options.depth, options.vocab_size)
        count = math.ceil(needed / max(1, sum(scan.characters for scan in first)))
    files = download(count)
    print(f"{source.name}: {len(files)} of {len(names)} files; license: {hub['license'] or 'not stated'}")
    return file_text(source, folder, files, options, others, {"hub": hub, "license": hub["license"]})


def resolve(source: Source, split: str) -> dict[str, Any]:
    """Ask the hub for the files, revision and license of a dataset. Raises UserError if it has no such text."""
    import datasets  # a second to load

    repository, configuration, revision = HUB_NAME.fullmatch(source.name).groups()  # type: ignore[union-attr]
    try:
        builder = datasets.load_dataset_builder(repository, configuration, revision=revision)
        info = HfApi().dataset_info(repository, revision=builder.hash, files_metadata=True)
    except (OSError, ValueError, HTTPError) as error:
        reason = " ".join(str(error).split("Example of usage")[0].split())
        raise UserError(
            f"cannot use {source.name} from the hub ({reason}): names are owner/name[/configuration][@revision]"
        ) from None
    splits = builder.config.data_files or {}
    if split not in splits:
        raise UserError(f"{source.name} has no split {split}: pass --split with one of {', '.join(splits)}")
    names = [name.split("@", 1)[1].split("/", 1)[1] for name in splits[split]]
    if other := [name for name in names if documents.text_format(Path(name)) not in documents.FORMATS]:
        raise UserError(f"{source.name} has files such as {other[0]}: try {repository}@refs/convert/parquet")
    in_git = [file.rfilename for file in info.siblings or [] if not file.lfs]
    license = info.card_data.get("license") if info.card_data else None
    return {"split": split, "files": names, "in_git": in_git, "revision": builder.hash, "license": license}


def file_text(
    source: Source,
    root: Path,
    files: Sequence[Path],
    options: TextOptions,
    others: Sequence[Text],
    facts: Mapping[str, Any] | None = None,
) -> Text:
    """Read files once, and divide their documents into splits by their digests: other documents do not matter.

    Leaves out empty documents and those that occurred before, in these files or in `others`. `facts` to record.
    Raises UserError if too few are left.
    """
    parts = documents.find_parts(root, files, options.text_column)
    workers = 1 if sum(path.stat().st_size for path in files) < ONE_PROCESS_CHARS else None
    scans = in_processes(f"reading {source.name}", documents.scan, parts, workers)
    digests = np.concatenate([scan.digests for scan in scans])
    kept = np.zeros(len(digests), bool)
    kept[np.unique(digests, return_index=True)[1]] = True
    kept &= ~np.isin(digests, np.concatenate([np.empty(0, np.uint64), *(text.digests for text in others)]))
    report_problems(source, [scan.problems for scan in scans], int((~kept).sum()))
    if kept.sum() < 2:
        raise UserError(
            f"{source.name} has {kept.sum()} documents: at least 2 are needed, one of which is held out (files of more "
            f"than {documents.SECTION_CHARS:,} characters are several documents)"
        )
    below = source.record.get("held_out_below", 0)
    if not 0 < (digests[kept] < below).sum() < kept.sum():  # new text, or most documents have been replaced
        count = min(MIN_HELD_OUT, math.ceil(kept.sum() / 10))
        below = max(int(np.sort(digests[kept])[count - 1]) + 1, int(HELD_OUT_SHARE * 2**64))
    masks = {"val": kept & (digests < below), "train": kept & (digests >= below)}
    splits: dict[str, list[TextShard]] = {split: [] for split in masks}
    starts = accumulate((len(scan.digests) for scan in scans), initial=0)
    for part, (start, stop) in zip(parts, pairwise(starts), strict=True):
        for split, mask in masks.items():
            if (chosen := mask[start:stop]).any():
                origin = hashlib.sha256(digests[start:stop][chosen].tobytes()).hexdigest()
                texts = partial(documents.read_chosen, part, chosen)
                splits[split].append(TextShard(f"{part.name}.{split}", origin, texts))
    record = {
        **(facts or {}),
        "location": str(source.location) if source.location else None,
        "license": options.license or (facts or {}).get("license") or source.record.get("license"),
        "held_out_below": below,
        "after": [text.source.name for text in others if text.record],
    }
    if not record["license"]:
        print(f"{source.name}: its license is not known; pass --license before you share models trained on it")
    return Text(source, splits, sum(scan.characters for scan in scans), record, digests[kept])


def report_problems(source: Source, found: Sequence[Problems], duplicates: int) -> None:
    empty, invalid, unreadable = (sum(getattr(p, n) for p in found) for n in ("empty", "invalid_utf8", "unreadable"))
    print(f"{source.name}: left out {empty:,} empty documents and {duplicates:,} exact duplicates")
    if invalid:
        first = next(p.first_invalid for p in found if p.invalid_utf8)
        print(
            f"{source.name}: {invalid:,} documents are not valid UTF-8, their invalid bytes became U+FFFD; see "
            f"{first}; iconv converts from other encodings"
        )
    if unreadable:
        first = next(p.first_unreadable for p in found if p.unreadable)
        print(
            f"{source.name}: left out {unreadable:,} lines that are not JSON objects with a text, or longer than "
            f"{format_bytes(MAX_LINE_BYTES)}; the first is {first}"
        )
