"""A run can be watched while it trains."""

from pathlib import Path

from rich.console import Console

from nanochat.report.history import newest_stages
from scripts import watch


def test_the_screen_shows_progress_and_fits_80_columns(trained: Path) -> None:
    stages = newest_stages()
    mid = stages[-1]
    mid.facts["num_iterations"] = 103
    for row in mid.rows:
        row["seconds"] = 10.0 * row["step"]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(watch.screen(stages, mid.logged_at + 4))
    lines = capture.get().splitlines()
    assert "base → mid  test on" in lines[0]
    assert "step 3 of 103, last one 4s ago, 16m40s left at 10.00 s/step" in lines
    assert any(line.startswith("loss") and line.rstrip().endswith(f"{mid.rows[-1]['loss']:,.4g}") for line in lines)
    assert max(map(len, lines)) <= 80


def test_control_characters_of_samples_and_names_are_left_out(trained: Path) -> None:
    stages = newest_stages()
    stages[-1].facts["tag"] = "d2\x1b]0;title\x07"
    stages[-1].samples[-1]["samples"] = ["red \x1b[31m \x9b2J \x08 \ud800 end"]
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(watch.screen(stages, 0.0))
    assert not set("\x1b\x07\x9b\x08\ud800") & set(capture.get()) and "end" in capture.get()


def test_a_finished_run_is_shown_as_finished(trained: Path) -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(watch.screen(newest_stages(), 0.0))
    assert "step 3 of 3, finished in" in capture.get()


def test_a_curve_in_a_line() -> None:
    assert watch.sparkline([1.0, 2.0, 3.0, 8.0]) == "▁▂▃█"
    assert watch.sparkline([5.0, 5.0]) == "▁▁"
    assert len(watch.sparkline([float(i) for i in range(1000)])) <= watch.CURVE_WIDTH
