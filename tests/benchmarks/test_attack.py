"""The quick groups of attacks; the others are parts of the tests of what they attack."""

from pathlib import Path

import pytest

from benchmarks.attack import Group
from benchmarks.attacks import local


@pytest.mark.parametrize("group", [local.tags, local.report, local.terminal])
def test_no_attack_succeeds(group: Group, base_dir: Path) -> None:
    outcomes = dict(group(base_dir))
    assert len(outcomes) > 50 and not [name for name, success in outcomes.items() if success]
