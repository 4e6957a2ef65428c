"""The quick demo, every stage of it, from the scripts a person types; and what they say to a mistake."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"base": "base", "mid": "mid", "sft": "chatsft", "rl": "chatrl"}

pytestmark = pytest.mark.timeout(600)


def script(name: str, *args: str, base: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(base), "COLUMNS": "80", "WANDB_MODE": "disabled"}
    return subprocess.run(
        [ROOT / name, *args], env=environment, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The base directory and output of one ./demo.sh --quick."""
    base = tmp_path_factory.mktemp("base dir")
    result = script("demo.sh", "--quick", base=base)
    assert result.returncode == 0, result.stdout + result.stderr
    yield base, result.stdout


@pytest.mark.slow
def test_every_stage_trains_and_its_loss_falls(demo: tuple[Path, str]) -> None:
    base, _ = demo
    for source, folder in STAGES.items():
        (model,) = (base / "demo" / f"{folder}_checkpoints").iterdir()
        meta = json.loads(next(model.glob("step_*/meta.json")).read_text())
        assert meta["source"] == source and meta["step"] == meta["num_iterations"] > 0
        assert (meta["parent"] or {}).get("source") == (
            None if source == "base" else list(STAGES)[list(STAGES).index(source) - 1]
        )
        rows = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, meta["step"] + 1))
        if source != "rl":
            assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.slow
def test_the_summary_shows_the_table_the_answers_and_what_to_type(demo: tuple[Path, str]) -> None:
    _, out = demo
    assert all(re.search(rf"│ {source} +│", out) for source in STAGES)
    assert "Who are you?" in out and "./chat.sh --demo" in out and "GiB" in out


@pytest.mark.slow
def test_run_again_it_has_nothing_to_train(demo: tuple[Path, str]) -> None:
    base, _ = demo
    before = sorted(base.rglob("step_*/meta.json"))
    stamps = [path.stat().st_mtime_ns for path in before]
    again = script("demo.sh", "--quick", base=base)
    assert again.returncode == 0 and again.stdout.count("complete") == 4
    assert [path.stat().st_mtime_ns for path in sorted(base.rglob("step_*/meta.json"))] == stamps


@pytest.mark.slow
def test_the_terminal_chat_answers_with_the_most_advanced_model(demo: tuple[Path, str]) -> None:
    base, _ = demo
    result = script("chat_cli.sh", "--demo", "-p", "Who are you?", "--temperature", "0", base=base)
    assert result.returncode == 0 and result.stdout.strip()
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["chat_cli.sh", "--demo", "--source", "best", "-p", "x"], "best"),
        (["chat_cli.sh", "--demo", "-p", " "], "-p"),
        (["chat_cli.sh", "--source", "sft", "-p", "x"], "./sft.sh"),
        (["pretrain.sh", "--demo", "--depth", "0"], "--depth"),
        (["pretrain.sh", "--demo", "--total-batch-size", "1000"], "1024"),
        (["pretrain.sh", "--demo", "--device-batch-size", "none"], "device-batch-size"),
        (["prepare.sh", "--demo", "--vocab-size", "8192"], "--vocab-size"),
        (["rl.sh", "--demo", "--num-samples", "1"], "--num-samples"),
        (["sft.sh", "--demo", "--compile", "True", "--fresh"], "--compile"),
    ],
)
def test_a_mistake_gets_a_sentence_and_exit_code_2(demo: tuple[Path, str], command: list[str], sentence: str) -> None:
    base, _ = demo
    result = script(*command, base=base)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert sentence in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_an_unwritable_base_directory_gets_a_sentence() -> None:
    result = script("pretrain.sh", "--demo", base=Path("/proc/nowhere"))
    assert result.returncode == 2 and "NANOCHAT_BASE_DIR" in result.stderr


@pytest.mark.slow
def test_any_stage_is_scored_on_core_in_one_command(demo: tuple[Path, str]) -> None:
    base, _ = demo
    if not (shared := os.environ.get("NANOCHAT_SHARED")):
        pytest.skip("NANOCHAT_SHARED does not name the folder with the evaluation bundle")
    asked = ("--benchmarks", "core", "--max-per-task", "2", "--eval-bundle", f"{shared}/hub/eval_bundle")
    result = script("eval.sh", "--quick", "--source", "sft", *asked, base=base)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^CORE +0 +-?\d\.\d{3}±\d\.\d{3} *$", result.stdout, re.MULTILINE)
    (kept,) = (base / "demo" / "report").glob("sft-*-core.json")
    assert len(json.loads(kept.read_text())["result"]["scores"]) == 22
