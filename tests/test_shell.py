"""The scripts that a person types: from any folder, with any arguments, and what set-up does when it cannot."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.sh"))
COMMANDS = ("doctor", "plan", "watch", "report", "checkpoints", "cluster", "benchmark", "import")
# The words that start one Python module each, and that module.
MODULES: dict[tuple[str, ...], str] = {
    (path.name,): match[1]
    for path in SCRIPTS
    if path.name not in ("setup.sh", "demo.sh", "test.sh", "nanochat.sh")
    and (match := re.search(r"^(?:launch|exec python -m) (\S+)", path.read_text(), re.MULTILINE))
} | {("nanochat.sh", name): f"scripts.{'import_hf' if name == 'import' else name}" for name in COMMANDS}
# Stands for a stage's module: says what reached it, without the seconds that loading torch takes.
ECHO = """
import os, sys
import nanochat
said = [sys.prefix, nanochat.__file__, os.getcwd(), os.environ["NANOCHAT_BASE_DIR"], *sys.argv[1:]]
said.append(f"rank {os.environ.get('RANK')}")
os.write(1, "".join(f"{line}\\n" for line in said).encode())  # at once: several processes share the pipe
if "--fail" in sys.argv:
    sys.exit(2)
if "--wait" in sys.argv:
    try:
        sys.stdin.read()
    except KeyboardInterrupt:
        sys.exit(130)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output. The keywords are added to the environment."""
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


def copy_project(to: Path) -> Path:
    """A copy of the shell, with a stand-in for each stage, and no .venv."""
    (to / "scripts").mkdir(parents=True)
    (to / "nanochat").mkdir()
    for path in [*SCRIPTS, ROOT / "pyproject.toml", ROOT / "constraints.txt"]:
        shutil.copy(path, to)
    for path in [*ROOT.glob("scripts/*.sh"), ROOT / "scripts/launch.py"]:
        shutil.copy(path, to / "scripts")
    shutil.copy(ROOT / "nanochat/host.py", to / "nanochat")
    (to / "nanochat/__init__.py").touch()
    (to / "scripts/__init__.py").touch()
    for module in [*MODULES.values(), "scripts.demo_summary"]:
        (to / f"{module.replace('.', '/')}.py").write_text(ECHO)
    return to


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project in a folder with a space in its name, with the .venv of this one."""
    if not (ROOT / ".venv/complete-run").exists():
        pytest.skip("there is no .venv yet: ./setup.sh makes it")
    copy = copy_project(tmp_path / "a b")
    (copy / ".venv").symlink_to(ROOT / ".venv")
    return copy


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A copy of the project as cloned, with no .venv."""
    return copy_project(tmp_path / "clone")


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci/run"], ids=lambda path: path.name)
def test_scripts_can_be_run_and_are_named_as_bash(path: Path) -> None:
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: sudo apt install shellcheck")
    result = run(shellcheck, *SCRIPTS, *ROOT.glob("scripts/*.sh"), ROOT / ".ci/run", cwd=ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("words", sorted(MODULES))
def test_a_script_names_a_module_that_exists(words: tuple[str, ...]) -> None:
    assert (ROOT / f"{MODULES[words].replace('.', '/')}.py").exists()


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_the_commands_are_listed_with_a_line_each(arguments: tuple[str, ...], bare: Path) -> None:
    result = run(bare / "nanochat.sh", *arguments, cwd=bare)
    assert (result.returncode, result.stderr) == (0, "")
    assert tuple(re.findall(r"^  (\w+)   +\S", result.stdout, re.MULTILINE)) == COMMANDS
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_an_unknown_command_is_one_line_and_exit_code_2(bare: Path) -> None:
    result = run(bare / "nanochat.sh", "docter", cwd=bare)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and "docter" in result.stderr


def test_help_names_the_command_as_it_was_typed(project: Path, tmp_path: Path) -> None:
    (project / "scripts/doctor.py").write_text('import os\nprint(os.environ["NANOCHAT_COMMAND"])\n')
    result = run(project / "nanochat.sh", "doctor", cwd=tmp_path, NANOCHAT_BASE_DIR=str(tmp_path))
    assert result.stdout.splitlines()[-1] == "./nanochat.sh doctor"


@pytest.mark.parametrize("words", sorted(MODULES))
def test_a_script_runs_its_own_code_from_another_folder(words: tuple[str, ...], project: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    (elsewhere / "scripts").mkdir(parents=True)
    (elsewhere / "scripts/__init__.py").touch()  # must not hide the project's own package
    base = tmp_path / "base dir"
    script, *command = words
    result = run(
        project / script, *command, "--demo", "two words", cwd=elsewhere, NANOCHAT_BASE_DIR=str(base), NPROC="1"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        str(project / ".venv"),
        str(project / "nanochat/__init__.py"),
        str(elsewhere),
        str(base),
        "--demo",
        "two words",
        "rank None",
    ]


def test_the_exit_code_is_that_of_python(project: Path, tmp_path: Path) -> None:
    assert run(project / "pretrain.sh", "--fail", cwd=tmp_path, NANOCHAT_BASE_DIR=str(tmp_path)).returncode == 2


def test_nproc_starts_that_many_processes(project: Path, tmp_path: Path) -> None:
    result = run(project / "pretrain.sh", "--depth=4", cwd=tmp_path, NANOCHAT_BASE_DIR=str(tmp_path), NPROC="2")
    assert result.returncode == 0, result.stderr
    assert sorted(re.findall(r"rank \d", result.stdout)) == ["rank 0", "rank 1"]
    assert result.stdout.splitlines().count("--depth=4") == 2


@pytest.mark.parametrize("nproc", ["0", "two", "-1", "2 3"])
def test_nproc_that_is_no_number_of_processes_is_refused(nproc: str, project: Path, tmp_path: Path) -> None:
    result = run(project / "rl.sh", cwd=tmp_path, NANOCHAT_BASE_DIR=str(tmp_path), NPROC=nproc)
    assert result.returncode == 2
    assert result.stderr.startswith("error: NPROC") and nproc in result.stderr


def test_ctrl_c_reaches_python_and_ends_the_demo(project: Path, tmp_path: Path) -> None:
    (project / "scripts/prepare.py").write_text(ECHO.replace('"--wait" in sys.argv', "True"))
    demo = subprocess.Popen(
        [project / "demo.sh"],
        cwd=tmp_path,
        env=os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert demo.stdout is not None
    while "rank" not in demo.stdout.readline():
        assert demo.poll() is None
    os.killpg(demo.pid, signal.SIGINT)  # as a terminal does: to all of its foreground processes
    rest, _ = demo.communicate(timeout=30)
    assert demo.returncode in (130, -signal.SIGINT)
    assert rest == ""


def test_the_demo_passes_its_options_to_every_stage(project: Path, tmp_path: Path) -> None:
    result = run(project / "demo.sh", "--quick", "--fresh", cwd=tmp_path, NANOCHAT_BASE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    runs = result.stdout.split(f"{project / '.venv'}\n")[1:]
    common, tag = ["--demo", "--quick", "--fresh"], ["--model-tag", "d2"]
    assert [run.splitlines()[3:-1] for run in runs] == [
        common, *[[*common, *tag]] * 4, ["--demo", "--quick", *tag], ["--demo", *tag],
    ]  # fmt: skip


def test_an_option_that_the_demo_does_not_have_is_refused(project: Path, tmp_path: Path) -> None:
    result = run(project / "demo.sh", "--fast", cwd=tmp_path, NANOCHAT_BASE_DIR=str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "--fast" in result.stderr


def test_an_unwritable_base_directory_is_refused_before_anything_is_installed(bare: Path, tmp_path: Path) -> None:
    result = run(bare / "prepare.sh", cwd=tmp_path, NANOCHAT_BASE_DIR="/proc/nope")
    assert result.returncode == 2
    assert re.fullmatch("error: .*/proc/nope.*NANOCHAT_BASE_DIR.*\n", result.stderr)
    assert not (bare / ".venv").exists()


def test_set_up_notices_at_once_that_nothing_changed(project: Path, tmp_path: Path) -> None:
    assert run(project / "setup.sh", cwd=tmp_path).returncode == 0
    start = time.monotonic()
    result = run(project / "setup.sh", cwd=tmp_path)
    assert time.monotonic() - start < 2
    assert result.returncode == 0 and "nothing to do" in result.stdout


@pytest.mark.parametrize("version", [None, "3.10", "3.14"])
def test_set_up_without_a_python_that_will_do_says_which_ones_will(version: str | None, bare: Path) -> None:
    python = bare / "python"
    if version is not None:
        executable(python, f"#!/bin/sh\necho {version}\n")
    result = run(bare / "setup.sh", cwd=bare, PYTHON=str(python))
    assert result.returncode == 2
    assert re.match("error: .*3.11.*3.13", result.stderr)
    assert "Traceback" not in result.stderr


def test_set_up_without_the_venv_module_says_which_package_brings_it(bare: Path) -> None:
    python = executable(bare / "python", '#!/bin/sh\ncase "$2" in *venv*) exit 1 ;; esac\necho 3.12\n')
    result = run(bare / "setup.sh", cwd=bare, PYTHON=str(python))
    assert result.returncode == 2
    assert re.fullmatch("error: .*sudo apt install python3.12-venv\n", result.stderr)


def test_set_up_without_ensurepip_borrows_the_pip_of_that_python(bare: Path, tmp_path: Path) -> None:
    """As on a Debian with python3-pip and no python3-venv; the borrowed pip stops here, without a network."""
    log = tmp_path / "log"
    script = (
        "#!/bin/sh\n"
        f'echo "$@" >>"{log}"\n'
        'case "$*" in\n'
        '  *"import ensurepip"*) exit 1 ;;\n'
        '  "-m pip"*) echo "no network" >&2; exit 1 ;;\n'
        '  "-m venv"*) for venv; do :; done; mkdir -p "$venv/bin" ;;\n'
        "  *) echo 3.12 ;;\n"
        "esac\n"
    )
    result = run(bare / "setup.sh", cwd=bare, PYTHON=str(executable(bare / "python", script)))
    assert result.returncode == 1
    assert "no network" in result.stderr and "virtual environment" in result.stderr
    made, borrowed = log.read_text().splitlines()[-2:]
    assert made == f"-m venv --clear --without-pip {bare / '.venv'}"
    assert borrowed.startswith(f"-m pip --python {bare / '.venv'}/bin/python install ") and borrowed.endswith(" pip")


def test_a_version_manager_s_shim_without_a_python_is_passed_over(bare: Path) -> None:
    for name in ("python3", "python3.13", "python3.11"):
        executable(bare / "bin" / name, "#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    executable(bare / "bin/python3.12", '#!/bin/sh\ncase "$2" in *venv*) exit 1 ;; esac\necho 3.12\n')
    result = run(bare / "setup.sh", cwd=bare, PYTHON="", PATH=f"{bare / 'bin'}:{os.environ['PATH']}")
    assert "python3.12-venv" in result.stderr


def test_what_an_interrupted_set_up_left_is_made_anew(bare: Path) -> None:
    executable(bare / ".venv/bin/python", "#!/bin/sh\nexit 1\n")  # and no mark that it was completed
    result = run(bare / "setup.sh", cwd=bare, PYTHON="/bin/false")
    assert result.returncode == 2
    assert result.stderr.startswith("error: no Python")


def test_a_failing_installation_is_shown_and_can_be_run_again(bare: Path) -> None:
    python = executable(bare / "python", '#!/bin/sh\n[ "$1" = -m ] && echo "disk full" >&2 && exit 1\necho 3.12\n')
    for _ in range(2):
        result = run(bare / "setup.sh", cwd=bare, PYTHON=str(python))
        assert result.returncode == 1
        assert "disk full" in result.stderr
        assert "virtual environment" in result.stderr


def test_an_unknown_option_of_set_up_is_refused(bare: Path) -> None:
    result = run(bare / "setup.sh", "--devel", cwd=bare)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "--devel" in result.stderr


def test_the_pins_name_no_address_and_no_build() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert pins
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    assert any(pin.startswith("torch==") for pin in pins)


def test_pip_s_settings_in_the_environment_do_not_reach_set_up(bare: Path, tmp_path: Path) -> None:
    executable(bare / ".venv/bin/python", '#!/bin/sh\nenv | grep -E "^(PIP|PYTHON)" >"$LOG"; echo "$@" >>"$LOG"\n')
    text = (bare / "setup.sh").read_text()
    functions = text[: text.index("\nextras=()")]
    settings = {
        "PIP_CONSTRAINT": "others.txt", "PIP_REQUIRE_HASHES": "1", "PIP_TARGET": "/x", "PIP_PREFIX": "/x",
        "PIP_ROOT": "/x", "PIP_USER": "1", "PIP_INDEX_URL": "https://mirror/simple", "PYTHONPATH": "/x",
    }  # fmt: skip
    (bare / "setup-functions.sh").write_text(functions + "\npip_install name\n")
    log = tmp_path / "log"
    run("bash", bare / "setup-functions.sh", cwd=bare, LOG=str(log), **settings)
    lines = log.read_text().splitlines()
    assert {"PIP_INDEX_URL=https://mirror/simple", "PIP_USER=0", "PIP_CONSTRAINT=/dev/null"} <= set(lines)
    assert not any("/x" in line or "others.txt" in line for line in lines)
    assert lines[-1].startswith("-m pip install") and lines[-1].endswith("constraints.txt name")


def test_the_commands_of_a_copied_venv_are_changed_to_the_copy(bare: Path, tmp_path: Path) -> None:
    home = tmp_path / "a b"
    shutil.copytree(bare, home)
    pip = executable(home / ".venv/bin/pip", "#!/original/.venv/bin/python\nimport sys\nprint(sys.executable)\n")
    shared = tmp_path / "pip of the original"
    os.link(pip, shared)
    (home / ".venv/bin/python").symlink_to(sys.executable)
    (home / ".venv/pyvenv.cfg").write_text("command = /usr/bin/python3 -m venv --clear /original/.venv\n")
    text = (home / "setup.sh").read_text()
    (home / "setup-functions.sh").write_text(text[: text.index("\nextras=()")] + "\nadopt_venv\n")
    first = run("bash", home / "setup-functions.sh", cwd=home)
    assert first.stdout.startswith("setup: .venv was made in /original") and first.returncode == 0
    assert run("bash", home / "setup-functions.sh", cwd=home).stdout == ""
    assert run(pip, cwd=home).stdout.strip() == str(home / ".venv/bin/python")
    assert shared.read_text().startswith("#!/original/")


@pytest.mark.parametrize("variables", [{"HOME": ""}, {"PYTHONHOME": "/nowhere"}, {"LC_ALL": "xx_YY"}])
def test_odd_environments_do_not_matter(project: Path, tmp_path: Path, variables: dict[str, str]) -> None:
    result = run(project / "midtrain.sh", cwd=tmp_path, **variables, NANOCHAT_BASE_DIR=str(tmp_path / "base"))
    assert result.returncode == 0, result.stderr
