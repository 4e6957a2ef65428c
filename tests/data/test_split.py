import pytest

from nanochat.data.split import held_out


@pytest.mark.parametrize("share", [0.0, 0.04, 0.5, 1.0])
def test_share_of_keys_is_held_out(share: float) -> None:
    count = sum(held_out(f"key {i}", share) for i in range(5000))
    assert count / 5000 == pytest.approx(share, abs=0.02)


def test_the_rule_never_changes() -> None:
    # Fixed for ever: if this fails, held-out problems of trained models have moved into training.
    assert [key for key in ("a", "b", "c", "d", "e", "f", "g", "h") if held_out(key, 0.3)] == ["b", "c", "d", "e", "f"]
