"""benchmarks/gpu_check.py on the CPU in tiny sizes: what a GPU is to run does not fail for reasons of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parent.parent / "benchmarks" / "gpu_check.py"
SLOW = ["graphs", "launches", "resume", "processes", "throughput", "main job"]


@pytest.mark.parametrize("checks", [["numerics", "bandwidth"], pytest.param(SLOW, marks=pytest.mark.slow)])
def test_every_check_runs_and_is_reported(checks, tmp_path):
    out = tmp_path / "report.json"
    command = [sys.executable, str(CHECK), "--device", "cpu", "--quick", "--out", str(out), "--only", *checks]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert list(report["checks"]) == checks
    rows = [row for check in report["checks"].values() for row in check["rows"]]
    assert len(rows) >= len(checks)
    for name, value in rows:
        assert f"| {name} | {value} |" in done.stdout
        assert "FAILED" not in value


def test_a_failed_check_is_reported_and_the_others_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(CHECK.parent.parent / "examples"))
    monkeypatch.syspath_prepend(str(CHECK.parent))
    import gpu_check

    def fail(args):
        raise AssertionError("off by one")

    checks = {"first": fail, "second": lambda args: [("a figure", "7")]}
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    monkeypatch.setattr(gpu_check.energy_model, "Graphs", gpu_check.energy_model.Graphs)
    out = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--quick", "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert end.value.code == 1
    found = json.loads(out.read_text())["checks"]
    assert found["first"]["rows"] == [["first", "FAILED: AssertionError: off by one"]]
    assert found["second"]["rows"] == [["a figure", "7"]]
