"""What a test needs and may not find; CI has all of it."""

import os
import shutil
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """Skips the test, naming what is not there; fails it under CI."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is missing")
    pytest.skip(f"{what} is missing")


def needed(tool: str) -> str:
    """The tool's path."""
    return shutil.which(tool) or missing(tool)
