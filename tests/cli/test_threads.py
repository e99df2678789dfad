"""Commands take the cores that are free."""

import os

import pytest
import torch

from hvae_ebm_prior.cli import threads


@pytest.mark.parametrize(
    ("cores", "busy", "taken"), [(4, 0, 4), (4, 1, 3), (4, 7, 1), (64, 30, 4)], ids=["idle", "one", "full", "container"]
)
def test_busy_cores_are_left_alone(cores, busy, taken, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "RUNNING", tmp_path / "loadavg")
    monkeypatch.setattr(threads, "PAUSE", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    threads.RUNNING.write_text(f"1.20 1.10 0.90 {busy + 1}/123 4711\n")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        threads.leave_busy_cores()
        assert torch.get_num_threads() == taken
        said = capsys.readouterr().err
        assert (f"going on with {taken} thread" in said) == (taken < 4)
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        torch.set_num_threads(4)
        threads.leave_busy_cores()
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
