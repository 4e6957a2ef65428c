"""The quick groups of attacks and a sample of those with files; the others are in the tests of what they attack."""

from pathlib import Path

import pytest

from benchmarks.attack import Group
from benchmarks.attacks import files, local


@pytest.mark.parametrize("group", [local.tags, local.report, local.terminal])
def test_no_attack_succeeds(group: Group, base_dir: Path) -> None:
    outcomes = dict(group(base_dir))
    assert len(outcomes) > 50 and not [name for name, success in outcomes.items() if success]


@pytest.mark.slow
def test_mutated_files_get_one_line(tmp_path: Path) -> None:
    outcomes = list(files.files(tmp_path, mutations=25, seed=7))
    assert len(outcomes) == 25
    assert [name for name, succeeded in outcomes if succeeded] == []
