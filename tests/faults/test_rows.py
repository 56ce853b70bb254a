"""Every row of the fault matrix, at the size of the tests."""

from __future__ import annotations

import pytest

from tests.faults.campaign import find_rows, load
from tests.faults.result import Size

ROWS = find_rows()


@pytest.mark.parametrize("row", ROWS)
def test_row_at_the_size_of_the_tests_is_sound(row: str) -> None:
    result = load(ROWS[row]).run(Size.CI)
    assert result.is_sound, [*result.leaks, *result.problems]
    assert result.num_requests > 0
