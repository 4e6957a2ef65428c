"""The checks of benchmarks/gpu_check.sh run in isolation."""

import io

from benchmarks.gpu_check import run_alone


def test_figures_measured_before_an_error_are_kept() -> None:
    log = io.StringIO()
    script = (
        """echo '{"a": 1}'; echo noise; echo '{"b": 2.5}'; echo 'first line' >&2; echo 'RuntimeError: b' >&2; exit 1"""
    )
    assert run_alone(["bash", "-c", script], 30, log) == {"a": 1, "b": 2.5, "error": "RuntimeError: b"}
    assert "first line" in log.getvalue()


def test_a_check_that_hangs_is_stopped() -> None:
    figures = run_alone(["bash", "-c", """echo '{"a": 1}'; sleep 60"""], 2, io.StringIO())
    assert figures == {"a": 1, "error": "took more than 2 s"}
