"""The structure of the code: imports point one way, the pretraining entry stays small, lists exist once."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GENERATED = re.compile(r"__pycache__|.*\.egg-info|hf_models|wandb")
STAGE_NAMES = {"base", "mid", "sft", "rl"}


@cache
def modules() -> dict[str, Path]:
    """The project's modules, by dotted name."""
    found = {}
    for package in ("nanochat", "scripts", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str, inside_functions: bool = True) -> frozenset[str]:
    """The project's modules that `module` imports, those under `if TYPE_CHECKING` excluded."""
    found = set()
    for node in statements(ast.parse(modules()[module].read_text()), inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules if submodules <= modules().keys() else submodules | {node.module}
    return frozenset(found & modules().keys())


def statements(node: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
            continue
        yield child
        yield from statements(child, inside_functions)


def closure(module: str) -> set[str]:
    """`module` and everything it imports, directly or not, inside functions too."""
    found: set[str] = set()
    pending = [module]
    while pending:
        if (name := pending.pop()) not in found:
            found.add(name)
            pending += imports(name)
    return found


def test_imports_form_no_cycle() -> None:
    left = {module: set(imports(module)) for module in modules()}
    while free := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"these modules import each other, or something that does: {sorted(left)}"


def test_the_package_imports_no_script_and_no_benchmark() -> None:
    wrong = {
        (module, needed)
        for module in modules()
        if module.startswith("nanochat")
        for needed in imports(module)
        if not needed.startswith("nanochat")
    }
    assert not wrong


def test_no_script_imports_another() -> None:
    scripts = {module for module in modules() if module.startswith("scripts.")}
    assert not {(module, needed) for module in scripts for needed in imports(module) & scripts}


def test_pretraining_imports_few_files() -> None:
    files = [modules()[module] for module in closure("scripts.base_train")]
    assert len(files) <= 45
    assert sum(len(path.read_text().splitlines()) for path in files) <= 6500


def test_pretraining_loads_no_report_and_no_chat_tasks() -> None:
    code = "import sys, scripts.base_train; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split()) | closure("scripts.base_train")
    unwanted = ("matplotlib", "transformers", "nanochat.report", "nanochat.tasks")
    assert not {name for name in loaded if name.startswith(unwanted)}


def test_the_root_is_short() -> None:
    """At most 22 files next to the five folders of code, tests and documentation."""
    visible = [path for path in ROOT.iterdir() if not path.name.startswith(".") and not GENERATED.fullmatch(path.name)]
    assert {path.name for path in visible if path.is_dir()} == {"benchmarks", "docs", "nanochat", "scripts", "tests"}
    assert len([path for path in visible if path.is_file()]) <= 22


def test_stages_are_listed_once() -> None:
    """A tuple, list, set, dictionary or Literal with three of the four names lists the stages."""
    found = set()
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            items: list[ast.expr | None] = []
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                items = list(node.elts)
            elif isinstance(node, ast.Dict):
                items = list(node.keys)
            names = {item.value for item in items if isinstance(item, ast.Constant)}
            if len(names & STAGE_NAMES) >= 3:
                found.add(module)
    assert found == {"nanochat.stages"}
