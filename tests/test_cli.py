"""Parsing of options, and errors as one line with exit code 2."""

import errno
import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanochat import cli, paths
from nanochat.errors import UserError


@dataclass
class Options:
    """An example."""

    depth: int = 20
    """layers"""
    device_batch_size: int | None = None
    fresh: bool = False


DEMO, QUICK = Options(depth=4), Options(depth=2)


def parse(*args: str) -> Options:
    return cli.parse(Options, list(args), demo=DEMO, quick=QUICK)


@pytest.mark.parametrize("spelling", ["--device-batch-size", "--device_batch_size"])
def test_dashes_and_underscores_are_the_same(spelling: str) -> None:
    assert parse(spelling, "8", "--fresh") == Options(device_batch_size=8, fresh=True)


def test_demo_has_defaults_and_a_folder_of_its_own(base_dir: Path) -> None:
    assert parse("--demo") == DEMO
    assert paths.base_dir() == base_dir / "demo"


def test_quick_demo_can_be_overridden(base_dir: Path) -> None:
    assert parse("--demo", "--quick", "--depth", "3") == Options(depth=3)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--depth", "x"), "--depth"),
        (("--dept", "3"), "--dept"),
        (("--depth",), "depth"),
    ],
)
def test_mistakes_are_one_line(args: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        parse(*args)
    assert "\n" not in str(caught.value)


def test_a_user_s_mistake_is_exit_code_2_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(options: Options) -> None:
        raise UserError("this is wrong: do that")

    with pytest.raises(SystemExit) as stop:
        cli.run(fails, Options, args=[])
    assert stop.value.code == 2 and capsys.readouterr().err == "error: this is wrong: do that\n"


def test_a_long_message_keeps_its_end_which_is_the_fix(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(options: Options) -> None:
        raise UserError(f"it is {'x' * 10**6}: do that")

    with pytest.raises(SystemExit):
        cli.run(fails, Options, args=[])
    message = capsys.readouterr().err
    assert len(message) < 1000 and message.startswith("error: it is xx") and message.endswith("xx: do that\n")


@pytest.mark.parametrize(("rank", "said"), [("0", "error: this"), ("3", "process 3: error: this")])
def test_each_of_several_processes_tells_its_own_mistake(
    rank: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(options: Options) -> None:
        raise UserError("this is wrong: do that")

    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stop:
        cli.run(fails, Options, args=[])
    assert stop.value.code == 2 and capsys.readouterr().err == f"{said} is wrong: do that\n"


def test_a_full_disk_is_a_sentence(base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fills(options: Options) -> None:
        Path("/dev/full").write_text("text")

    with pytest.raises(SystemExit) as stop:
        cli.run(fills, Options, args=[])
    assert stop.value.code == 2
    assert re.fullmatch(
        f"error: .*{base_dir} \\(No space left on device\\).*\n",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize("folder", ["/dev/null", "x" * 5000])
def test_a_cache_folder_that_torch_cannot_create_gets_one_line(folder: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "scripts.plan"], env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder},
        capture_output=True, text=True,
    )  # fmt: skip
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and "TORCHINDUCTOR_CACHE_DIR" in line and "unset" in line


@pytest.mark.parametrize("number", [errno.EACCES, errno.EEXIST, errno.ELOOP, errno.ENOTDIR, errno.EIO])
def test_a_file_that_the_system_refuses_is_named(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(options: Options) -> None:
        raise OSError(number, os.strerror(number), "/there/it is")

    with pytest.raises(SystemExit) as stop:
        cli.run(refused, Options, args=[])
    assert stop.value.code == 2
    assert f"/there/it is ({os.strerror(number)})" in capsys.readouterr().err


def test_other_trouble_keeps_its_traceback() -> None:
    def stumbles(options: Options) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/gone")

    with pytest.raises(FileNotFoundError):
        cli.run(stumbles, Options, args=[])


def test_ctrl_c_is_no_traceback_either() -> None:
    def interrupted(options: Options) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        cli.run(interrupted, Options, args=[])
    assert stop.value.code == 130


@pytest.mark.parametrize(
    "module", ["chat_cli", "chat_web", "hf_prepare", "hf_upload", "identity_data", "import_hf", "prepare"]
)
def test_help_of_every_program_tells_of_the_demo(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    program = importlib.import_module(f"scripts.{module}")
    options = type(program.DEMO)
    with pytest.raises(SystemExit):
        cli.parse(options, ["--help"], demo=program.DEMO)
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith("usage: "))
    text = " ".join(out.split())
    assert "--demo" in text and "--quick" not in text
    assert "<factory>" not in text


def test_help_shows_the_command_defaults_and_the_demo(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_COMMAND", "./pretrain.sh")
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = capsys.readouterr().out
    assert text.startswith("usage: ./pretrain.sh ")
    assert stop.value.code == 0 and "default: 20" in text and "--demo" in text


def test_demo_is_refused_where_there_is_none(base_dir: Path) -> None:
    with pytest.raises(UserError, match="--demo"):
        cli.parse(Options, ["--demo"])


@pytest.mark.parametrize("module", ["base_train", "mid_train", "chat_sft", "chat_rl"])
def test_help_of_every_stage_tells_how_to_start_it_on_several_machines(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program = importlib.import_module(f"scripts.{module}")
    with pytest.raises(SystemExit):
        cli.parse(type(program.DEMO), ["--help"], demo=program.DEMO)
    above_options = capsys.readouterr().out.split("─ options ─")[0]
    assert re.findall(r"^  (NPROC|--hosts|--print)\b.{4,}$", above_options, re.M) == ["NPROC", "--hosts", "--print"]


@pytest.mark.parametrize(
    ("variable", "value"), [("RANK", "x"), ("WORLD_SIZE", "9" * 5000), ("LOCAL_RANK", "-1"), ("WORLD_SIZE", "4")]
)
def test_variables_of_torchrun_left_by_a_cluster_get_one_line(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda options: None, Options, args=[])
    (line,) = capsys.readouterr().err.splitlines()
    assert variable in line and "unset" in line
