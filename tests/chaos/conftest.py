from __future__ import annotations

import os
import random

import pytest


@pytest.fixture
def seed() -> int:
    """Printed when a test fails; ``PENSTOCK_TEST_SEED`` repeats it."""
    value = int(os.environ.get("PENSTOCK_TEST_SEED", "") or random.SystemRandom().randrange(10**6))
    print(f"seed: PENSTOCK_TEST_SEED={value}")
    return value
