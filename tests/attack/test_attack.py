"""A short attack; `make attack` runs for as long as asked."""

import pytest

from tests.attack.attack import attack


@pytest.mark.slow
def test_no_outcome_is_wrong():
    wrong: list[str] = []
    counts = attack(0.3, 1, wrong.append)
    assert wrong == []
    for name, found in counts.items():
        assert found["right"] > 0, name
