"""Make the environment and run all tests, on all cores: python3 tests/run.py [--cpu | --cuda] [pytest arguments].

Give `-n 0` to run them in this process, as a debugger needs it.

`--cpu` and `--cuda` choose the build of PyTorch that is installed where there is none.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from bootstrap import run_in_environment  # noqa: E402

run_in_environment(__file__, "dev")

import pytest  # noqa: E402

os.chdir(ROOT)
# Plugins of a Python whose PyTorch is used are none of ours.
os.environ.setdefault("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
# Every file's tests stay together, as they share what is slow to make.
raise SystemExit(pytest.main(["-p", "xdist.plugin", "-n", "auto", "--dist", "loadfile", *sys.argv[1:]]))
