"""Make the environment and run all tests: python3 tests/run.py [pytest arguments]."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from bootstrap import run_in_environment  # noqa: E402

run_in_environment(__file__)

import pytest  # noqa: E402

os.chdir(ROOT)
raise SystemExit(pytest.main(sys.argv[1:]))
