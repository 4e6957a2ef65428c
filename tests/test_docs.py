"""The documents name only files, commands, functions and classes that exist; links resolve; the example runs."""

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "HUGGINGFACE_UPLOAD.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
EXAMPLES = {"nanochat/tasks/backwards.py", "tests/tasks/test_backwards.py"}
"""Files that a reader of CONTRIBUTING.md writes."""
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"[\w.-]+/[\w./-]+\.(?:py|sh|jinja|toml|js|css)")
NAME = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*[a-z]\w*(?:\.\w+)*(?:\(\))?|(?:\w+\.)*\w+\(\)")
"""`ClassName`, `ClassName.method()`, `function()` or `module.function()`."""

all_documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def anchors(path: Path) -> set[str]:
    """Return the fragment identifiers that GitHub gives to the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@functools.cache
def names_in_code() -> set[str]:
    """Return all names that the repository's Python code defines, uses or imports."""
    names = set()
    for folder in ("nanochat", "scripts", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.alias):
                    names.add(node.name)
                elif isinstance(node, ast.Name):
                    names.add(node.id)
                elif isinstance(node, ast.Attribute):
                    names.add(node.attr)
    return names


@all_documents
def test_links_resolve(path: Path) -> None:
    broken = []
    for link in LINK.findall(path.read_text()):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
            broken.append(link)
    assert not broken


@all_documents
def test_files_and_commands_exist(path: Path) -> None:
    text = path.read_text()
    files = {code for code in CODE.findall(text) if FILE.fullmatch(code)} - EXAMPLES
    files |= set(re.findall(r"(?<![\w/])\./(\w+\.(?:sh|py))", text))
    if path.name != "experiments.md":  # a log: it quotes the commands of the day
        modules = set(re.findall(r"python -m ((?:scripts|benchmarks|nanochat)[\w.]*)", text)) - {"benchmarks.NAME"}
        files |= {module.replace(".", "/") + ".py" for module in modules}
    assert not [name for name in files if not (ROOT / name).exists()]
    commands = re.findall(r"^#   (\w+) ", (ROOT / "nanochat.sh").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"nanochat\.sh (\w+)", text)) <= set(commands)


@all_documents
def test_functions_and_classes_exist(path: Path) -> None:
    if path.name == "experiments.md":
        return
    named = {code for code in CODE.findall(path.read_text()) if NAME.fullmatch(code)}
    assert not [code for code in named if not set(code.removesuffix("()").split(".")) <= names_in_code()]


@pytest.mark.slow
def test_the_example_of_a_task_passes_its_tests(tmp_path: Path) -> None:
    task, test = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    (tmp_path / "backwards.py").write_text(task)
    (tmp_path / "test_backwards.py").write_text(test)
    (tmp_path / "conftest.py").write_text(f"import nanochat.tasks\nnanochat.tasks.__path__.append({str(tmp_path)!r})\n")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
