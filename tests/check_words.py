"""Reject the words in .wordlist.txt: `python tests/check_words.py [--count] [FILE or FOLDER ...]`.

Without paths it checks the whole repository. --count prints the number of matches per folder instead of each one.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("nanochat", "scripts", "benchmarks", "tests", "docs", ".ci", ".github")
SUFFIXES = {".py", ".md", ".sh", ".html", ".js", ".css", ".toml", ".yml", ".yaml"}

Rule = tuple[re.Pattern[str], str]


def load_rules() -> list[Rule]:
    """Parse .wordlist.txt into compiled expressions and their suggestions."""
    lines = (ROOT / ".wordlist.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.rsplit(" -> ", 1) for line in lines if line and not line.startswith("#"))
    return [(re.compile(rf"(?<!\w)(?:{pattern})(?!\w)", re.IGNORECASE), suggestion) for pattern, suggestion in pairs]


def find_files(paths: list[str]) -> Iterator[Path]:
    """Yield the text files below `paths`, or those of the repository if there are no paths."""
    at_root = [path for path in ROOT.iterdir() if path.is_file()]
    for root in [Path(path) for path in paths] or [*at_root, *(ROOT / folder for folder in FOLDERS)]:
        found = sorted(root.rglob("*")) if root.is_dir() else [root]
        yield from (path.resolve() for path in found if path.suffix in SUFFIXES and path.is_file())


def find_words(text: str, rules: list[Rule]) -> Iterator[tuple[int, str, str]]:
    """Yield line number, matched words and suggestion for every match in `text`."""
    for number, line in enumerate(text.splitlines(), start=1):
        if "words:ignore" not in line:
            for pattern, suggestion in rules:
                yield from ((number, match[0], suggestion) for match in pattern.finditer(line))


def main(arguments: list[str]) -> int:
    rules = load_rules()
    counts: Counter[str] = Counter()
    for path in find_files([argument for argument in arguments if argument != "--count"]):
        for number, words, suggestion in find_words(path.read_text(encoding="utf-8"), rules):
            name = path.relative_to(ROOT)
            counts[str(name.parent)] += 1
            if "--count" not in arguments:
                print(f"{name}:{number}: {words} -> {suggestion}")
    if "--count" in arguments:
        print(*(f"{count:5} {folder}" for folder, count in sorted(counts.items())), sep="\n")
    return int(bool(counts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
