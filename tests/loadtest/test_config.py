from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from loadtest.config import RunConfig
from tests.support.load_tests import planned


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arms": ("student", "student")}, "arms are student, student; each may be given once"),
        ({"arrival": "trace"}, "belong together"),
        ({"trace": Path("times.txt")}, "belong together"),
        ({"rates_rps": (1.0, 0.0)}, "all must be above 0"),
        ({"rates_rps": ()}, "at least one"),
        ({"rates_rps": (2.0, 2.0)}, "each may be given once"),
        ({"concurrency": (0,)}, "all must be above 0"),
        ({"concurrency": ()}, "at least one"),
        ({"concurrency": (4, 4)}, "each may be given once"),
        ({"pass_at_k": (2,)}, "each is 1 to 1"),
        ({"rates_rps": (float("nan"),)}, "finite"),
        ({"speed": 2}, "speed"),
        ({"slo": "ttft_p95=soon"}, "'soon' is no limit"),
        ({"journal": Path("j"), "protocol": "oip"}, "--journal takes --protocol tandem"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig(out=Path("run"), **settings)


def test_load_of_a_request_is_its_rate_or_the_requests_at_a_time() -> None:
    assert planned(rate_rps=0.5).load == 0.5
    assert planned(rate_rps=None, concurrency=4).load == 4
    with pytest.raises(AssertionError):
        _ = planned(rate_rps=None).load
