"""Curves, levels and histograms, read back from their files."""

import matplotlib
import pytest
import torch
from helpers import find_color, seed

from hvae_ebm_prior.evaluation.pictures import save_histograms, save_progress, spread
from hvae_ebm_prior.saving.grid import GREY, line_style


def test_what_takes_no_training_is_a_dashed_line_at_its_height(tmp_path):
    """On a logarithmic axis 5 is half-way between 2.5 and 10."""
    save_progress(tmp_path / "a.png", {"ours": [[(1.0, 10.0), (2.0, 2.5)]]}, {"mixture": 5.0}, "distance")
    curve, dashes = (find_color(tmp_path / "a.png", color, tolerance=0.1) for color in ("C0", GREY))
    start, end = (curve[curve[:, 1] == column][:, 0].mean() for column in (curve[:, 1].min(), curve[:, 1].max()))
    rows = torch.tensor(dashes[:, 0]).bincount()
    assert rows.max() > 200
    assert int(rows.argmax()) == pytest.approx((start + end) / 2, abs=4)


def test_names_of_lines_do_not_lie_over_one_another():
    assert spread([0.5, 0.1, 0.51, 0.9], 0.05) == pytest.approx([0.5, 0.1, 0.55, 0.9])
    assert spread([], 0.05) == []


@pytest.mark.parametrize(("n", "bars"), [(8, 6), (300, 13), (10**5, 30)])
def test_few_scores_make_few_bars_which_both_sets_share(tmp_path, monkeypatch, n, bars):
    drawn = []
    monkeypatch.setattr(matplotlib.axes.Axes, "hist", lambda self, values, bins, **_: drawn.append((values, bins)))
    save_histograms(tmp_path / "a.png", torch.randn(n, 1, generator=seed(0)), torch.randn(n, 1, generator=seed(1)) + 3)
    assert [len(edges) - 1 for _, edges in drawn] == [bars] * 4
    assert all(edges == drawn[0][1] for _, edges in drawn)
    # Every score is counted.
    assert all(((edges[0] <= values) & (values <= edges[-1])).all() for values, edges in drawn)
    assert sum(len(values) for values, _ in drawn) == 4 * n


def test_the_settings_of_the_users_own_matplotlib_stay(tmp_path):
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    save_histograms(tmp_path / "a.png", torch.zeros(5, 2), torch.ones(5, 2))
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []


def test_no_two_of_sixteen_curves_look_the_same():
    assert len({tuple(line_style(i).values()) for i in range(16)}) == 16
