"""What every test needs: no network, and few threads so that parallel processes do not fight."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging  # noqa: E402

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples each time, so that a change is what turns a test red; HYPOTHESIS_PROFILE=default draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def _levels_of_logging():
    """A program that a test calls sets what is logged; the next test's caplog wants it as it was."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("", "run_squad", "trainer_qa", "qa"))}
    yield
    for logger, level in levels.items():
        logger.setLevel(level)
