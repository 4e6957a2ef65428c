"""The report as Markdown and as one self-contained page."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from nanochat.errors import UserError
from nanochat.eval.results import STAGES_TABLE, result_file
from nanochat.report import build
from nanochat.report.history import newest_stages
from nanochat.report.plots import CURVES, downsample, draw_curves, smoothed
from nanochat.spark.plan import Tariff
from nanochat.train import checkpoint
from scripts import report


def keep_scores(source: str, arithmetic: float) -> None:
    found = checkpoint.find(source)
    effort = {"dataset": "encyclopedia", "eval_tokens": 1000, "problems": 100}
    shares = {"identity": 1.0, "arithmetic": arithmetic, "spelling": 0.5}
    scores = [{"task": task, "problems": 100, "accuracy": share, "baseline": 0.0} for task, share in shares.items()]
    result = {"scores": scores, "bits_per_byte": 1.5}
    file = result_file(found, STAGES_TABLE)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"key": {"saved_at": found.meta["saved_at"], **effort}, "result": result}))


def test_the_report_has_figures_scores_samples_data_and_options(trained: Path) -> None:
    keep_scores("base", 0.1)
    keep_scores("mid", 0.8)
    assert build.write() == trained / "report" / "report.html"
    text = (trained / "report" / "report.md").read_text()
    parameters = newest_stages()[0].facts["num_parameters"]
    assert f"{parameters:,} parameters: 2 layers of width 128" in text
    assert re.search(r"\| base \| 24 of 24 \| 6,144 \| \d+s \|", text)
    assert "| arithmetic | 100 | 0% | 10.0% ± 3.0 | 80.0% ± 4.0 |" in text
    assert "| `init_lr_frac` | `1.0` | `0.5` |" in text
    assert "few rows" in text and "step 24\nwell ..." in text
    assert re.search(r"\| stage \| min available memory \| max page cache \|\n.*\n\| base \| [\d.]+ GiB \|", text)
    for name in re.findall(r"\]\((plots/\S+)\)", text):
        assert (trained / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert {"loss", "bits-per-byte", "optimizer", "speed", "stages"} == {
        path.stem for path in (trained / "report" / "plots").glob("*.png")
    }


def test_the_page_is_self_contained_and_escapes_samples(trained: Path) -> None:
    page = build.write().read_text()
    assert set(re.findall(r'(?:src|href)="([^"]{,15})', page)) == {"data:image/png;"}
    assert "&lt;b&gt;bold&lt;/b&gt;" in page and "<b>bold" not in page
    assert "<h1>not a heading" not in page  # a fence in a sample ends no code block
    assert "{{" not in page


def test_a_report_that_fails_does_not_fail_the_stage(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "report").write_text("a file where the folder should be")
    report.main(report.ReportOptions(quiet=True))
    (line,) = capsys.readouterr().out.splitlines()
    assert "report" in line
    with pytest.raises(OSError, match="report"):
        report.main(report.ReportOptions())


def test_without_a_model_the_error_names_the_script(base_dir: Path) -> None:
    with pytest.raises(UserError, match=r"\./pretrain\.sh"):
        build.write()


def test_outdated_plots_are_removed(trained: Path) -> None:
    build.write()
    leftover = trained / "report" / "plots" / "reward.png"
    leftover.write_bytes(b"")
    build.write()
    assert not leftover.exists()


def test_energy_and_cost_follow_nanochat_watts(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = newest_stages()[0]
    assert base.kwh(Tariff()) is None
    assert base.kwh(Tariff(watts=3.6e6)) == pytest.approx(base.seconds)
    base.rows[-1]["energy_j"] = 7.2e6  # of the GPUs alone, so what the user names wins
    assert base.kwh(Tariff()) == 2.0
    base.facts["machines"] = 2
    assert base.kwh(Tariff(watts=3.6e6)) == pytest.approx(2 * base.seconds)
    monkeypatch.setenv("NANOCHAT_WATTS", "3.6e9")
    monkeypatch.setenv("NANOCHAT_PRICE_PER_KWH", "0.5")
    build.write()
    text = (trained / "report" / "report.md").read_text()
    assert "kWh" in text and "cost" in text
    monkeypatch.setenv("NANOCHAT_WATTS", "many")
    with pytest.raises(UserError, match=r"NANOCHAT_WATTS.*many"):
        Tariff.from_environment()


def test_one_column_per_stage_with_data(trained: Path) -> None:
    stages = newest_stages()
    loss = draw_curves(stages, CURVES["loss"])
    assert loss is not None
    assert [axes.get_title("left") for axes in loss.axes] == ["Training loss, base", "Training loss, mid"]
    assert draw_curves(stages, CURVES["reward"]) is None


def test_long_curves_are_averaged() -> None:
    steps, values = downsample(range(10), [float(i) for i in range(10)], max_points=4)
    assert steps.tolist() == [1.0, 4.0, 7.0, 9.0] == values.tolist()
    line = np.arange(100.0)
    assert smoothed(line)[10:-10] == pytest.approx(line[10:-10])  # no lag
    assert smoothed(np.full(30, 7.0)) == pytest.approx(np.full(30, 7.0))


def test_skipped_steps_are_reported(trained: Path) -> None:
    metrics = trained / "base_checkpoints/test/metrics.jsonl"
    for skipped, reported in ((0, False), (2, True)):
        metrics.write_text(re.sub(r'"skipped_steps": \d', f'"skipped_steps": {skipped}', metrics.read_text()))
        build.write()
        assert ("gradient: 2 in base." in (trained / "report" / "report.md").read_text()) == reported
