"""What a folder of downloaded files holds: from which repository and revision, and the sha256 of every file."""

import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class HubFile:
    """A file as the hub describes it."""

    name: str
    """its path in the repository, and in the folder"""
    size: int
    """bytes"""
    sha256: str


@dataclass
class Manifest:
    """The files of a folder that were whole when they were last looked at. Every change is saved at once."""

    folder: Path
    repository: str
    revision: str | None = None
    """commit of the repository that the files are from"""
    files: dict[str, HubFile] = field(default_factory=dict)
    checked: dict[str, int] = field(default_factory=dict)
    """by name, the file's st_ctime_ns when its sha256 was right: no later write leaves that as it is"""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def load(cls, folder: Path, repository: str) -> "Manifest":
        """What the folder's manifest says; an empty one if there is none, or of another repository."""
        manifest = cls(folder, repository)
        try:
            kept = json.loads((folder / MANIFEST_FILE).read_text())
            if kept["repository"] == repository:
                manifest.revision = kept["revision"]
                for name, entry in kept["files"].items():
                    manifest.files[name] = HubFile(name, entry["size"], entry["sha256"])
                    manifest.checked[name] = entry["checked"]
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError):  # damaged: the files' own digests are asked for again
            return cls(folder, repository)
        return manifest

    def is_unchanged(self, name: str) -> bool:
        """Whether the file is as it was when its sha256 was last right; costs no reading."""
        try:
            stat = (self.folder / name).stat()
        except FileNotFoundError:
            return False
        file = self.files.get(name)
        return file is not None and stat.st_size == file.size and stat.st_ctime_ns == self.checked[name]

    def add(self, file: HubFile) -> None:
        """Note a file whose sha256 has just been found right."""
        with self._lock:
            self.files[file.name] = file
            self.checked[file.name] = (self.folder / file.name).stat().st_ctime_ns
            self._save()

    def forget(self, name: str) -> None:
        """Note that a file is not what it should be."""
        with self._lock:
            self.files.pop(name, None)
            self.checked.pop(name, None)
            self._save()

    def _save(self) -> None:
        content = {
            "repository": self.repository,
            "revision": self.revision,
            "files": {
                name: {"size": file.size, "sha256": file.sha256, "checked": self.checked[name]}
                for name, file in sorted(self.files.items())
            },
        }
        partial = self.folder / f".{MANIFEST_FILE}.partial"
        with open(partial, "w") as out:
            out.write(json.dumps(content, indent=2) + "\n")
            out.flush()
            os.fsync(out.fileno())
        partial.replace(self.folder / MANIFEST_FILE)
