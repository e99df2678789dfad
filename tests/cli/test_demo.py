"""The page: what it computes, and the app itself through Gradio's client and in a browser, where they are installed."""

import gc
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import seed

from hvae_ebm_prior import Coupling, DiffusionEBMPrior, EnergyConfig, LabelSet, LangevinConfig
from hvae_ebm_prior.adapters import HVAE, HVAEConfig
from hvae_ebm_prior.baselines import LatentDiffusionPrior, NCPPrior
from hvae_ebm_prior.cli import demo as page
from hvae_ebm_prior.cli.demo import Settings, build_demo, draw_both, fit_image, read_settings, screen_grid, vary, watch
from hvae_ebm_prior.cli.main import main
from hvae_ebm_prior.saving.extras import install_command, where

ROOT = Path(__file__).parents[2]
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason=f"gradio is not installed; {install_command('demo')}{where()}"
)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def make_prior(kind=DiffusionEBMPrior, coupled=True, channels=1, context=False, **own):
    """A tiny prior that is not the Gaussian one: its energies' last layers do not start at zero."""
    torch.manual_seed(0)
    model = HVAE(HVAEConfig(image_size=8, image_channels=channels, widths=(8, 8), latent_channels=(2, 1)))
    energy = EnergyConfig(context=context, vector_width=4)
    prior = kind(model, energy=energy, langevin=LangevinConfig(steps=2), **own)
    if coupled:
        prior.couple(Coupling({"class": LabelSet(("cup", "hat"), layers=(0,)), "smile": LabelSet(3)}))
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_((0.05 if context else 0.3) * torch.randn_like(parameter))
    return prior


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "context"])
def prior(request):
    return make_prior(context=request.param)


def test_same_settings_give_the_same_pictures_and_samples_keep_their_number(prior):
    gaussian, ours = draw_both(prior, Settings(6, seed=3))
    again = draw_both(prior, Settings(6, seed=3))
    assert torch.equal(gaussian, again[0])
    assert torch.equal(ours, again[1])
    torch.testing.assert_close(draw_both(prior, Settings(4, seed=3))[1], ours[:4])
    assert not torch.equal(draw_both(prior, Settings(6, seed=4))[1], ours)
    torch.testing.assert_close(ours, prior.sample(6, generator=seed(3)))
    # The two differ, and the Gaussian one is the backbone's.
    u = torch.randn(6, prior.dim, generator=seed(3))
    torch.testing.assert_close(gaussian, prior.decode(u).detach())
    assert not torch.allclose(gaussian, ours)


def test_energies_are_of_the_pictures_noise(prior):
    settings = Settings(3, seed=1, temperature=0.9)
    gaussian, ours = page.draw_both_noises(prior, settings)
    for u, images in zip((gaussian, ours), draw_both(prior, settings), strict=True):
        torch.testing.assert_close(prior.decode(u).detach(), images)
        assert page.say_energy(prior, u) == f"mean energy {prior.energy(u, 0).mean().item():.1f} nats"


def test_labels_guidance_and_temperature_reach_the_prior(prior):
    plain = draw_both(prior, Settings(4))
    under = draw_both(prior, Settings(4, labels={"class": "hat", "smile": 2}, guidance=3.0))
    assert torch.equal(plain[0], under[0])
    expected = prior.sample(4, labels={"class": "hat", "smile": 2}, guidance=3.0, generator=seed(0))
    torch.testing.assert_close(under[1], expected)
    assert not torch.allclose(plain[1], under[1])
    cold = draw_both(prior, Settings(4, temperature=0.5))
    assert not torch.allclose(plain[0], cold[0])
    torch.testing.assert_close(cold[1], prior.sample(4, temperature=0.5, generator=seed(0)))


def test_held_layers_are_those_of_the_sample_and_the_others_are_new(prior):
    settings = Settings(5, seed=2, labels={"class": "cup"}, guidance=2.0)
    ours = draw_both(prior, settings)[1]
    images = vary(prior, settings, [], 3)
    assert images.shape == (6, 1, 8, 8)
    torch.testing.assert_close(images[0], ours[3])
    # All held: nothing is left to draw. None held: new ones, and not the samples over again.
    torch.testing.assert_close(vary(prior, settings, [0, 1], 3)[1:], images[:1].expand(5, -1, -1, -1))
    assert not any(torch.allclose(image, other) for image in images[1:] for other in ours)
    seen = []
    decode = prior.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(prior), "decode", lambda self, u: seen.append(u) or decode(u))
        vary(prior, settings, [1], 3)
    top, bottom = prior.split(seen[0])
    assert torch.equal(bottom, bottom[:1].expand_as(bottom))
    assert len(top.flatten(1).unique(dim=0)) == 6


def test_an_upload_takes_the_shape_of_the_backbone(prior):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, 10:50] = 255  # what is kept of it, cropped about the centre
    image = fit_image(prior, pixels)
    assert image.shape == (1, 1, 8, 8)
    assert image.min() > 0.85
    assert fit_image(make_prior(coupled=False, channels=3), np.full((5, 5, 3), (255, 0, 0), np.uint8))[
        0, :, 4, 4
    ].tolist() == [1, 0, 0]
    assert vary(prior, Settings(2), [0], image).shape == (3, 1, 8, 8)


def test_a_chain_ends_in_the_samples(prior):
    settings = Settings(12, seed=5)
    frames, levels = watch(prior, settings, prior.langevin.steps)
    assert frames.shape[1] == page.MAX_CHAINS
    assert levels == sorted(levels, reverse=True)
    assert set(levels) == set(range(prior.schedule.steps + prior.has_context))
    torch.testing.assert_close(frames[-1], draw_both(prior, settings)[1][:8])
    # Under labels: the state after every level, and the noise before them.
    settings = Settings(3, labels={"smile": 1}, guidance=2.0)
    frames, levels = watch(prior, settings, 9)
    assert levels == list(reversed(range(prior.schedule.steps + 1)))
    torch.testing.assert_close(frames[-1], draw_both(prior, settings)[1])


def test_priors_without_labels_are_shown_as_far_as_they_go():
    """By proposals there are no chains to watch, and by chains no states in between at another temperature."""
    by_proposals = make_prior(NCPPrior, coupled=False)
    by_chains = make_prior(NCPPrior, coupled=False, sampler="langevin")
    diffusion_of_z = make_prior(LatentDiffusionPrior, coupled=False)
    for prior in (by_proposals, by_chains, diffusion_of_z):
        expected = prior.sample(3, generator=seed(5))
        torch.testing.assert_close(draw_both(prior, Settings(3, seed=5))[1], expected)
        frames, levels = watch(prior, Settings(3, seed=5), prior.langevin.steps)
        torch.testing.assert_close(frames[-1], expected)
        assert (len(levels) > 1) == (prior is not by_proposals)
        assert vary(prior, Settings(2), [0], 1).shape == (3, 1, 8, 8)
        with pytest.raises(TypeError, match=rf"labels: {type(prior).__name__}\.sample takes no labels"):
            draw_both(prior, Settings(labels={"class": 1}))
    for prior in (by_proposals, by_chains):
        frames, levels = watch(prior, Settings(3, seed=5, temperature=0.5), 9)
        assert levels == [0]
        torch.testing.assert_close(frames[0], prior.sample(3, temperature=0.5, generator=seed(5)))
    with pytest.raises(TypeError, match="temperature: LatentDiffusionPrior.sample takes no temperature"):
        watch(diffusion_of_z, Settings(temperature=0.5), 9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 65}, "count: this page takes 1 to 64, got 65"),
        ({"count": 0}, "count: expected a positive integer"),
        ({"count": 2.5}, "count: expected a positive integer, got float"),
        ({"seed": -1}, "seed: this page takes 0 to"),
        ({"seed": None}, "seed: expected a whole number, got None"),
        ({"temperature": float("nan")}, "temperature: this page takes 0.5 to 1.2"),
        ({"guidance": 1e9}, "guidance: this page takes 0 to 8"),
    ],
)
def test_requests_are_bounded(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Settings(**given)


def test_chains_and_samples_are_bounded(prior):
    with pytest.raises(ValueError, match="steps: this page takes 1 to 100, got 101"):
        watch(prior, Settings(), 101)
    with pytest.raises(ValueError, match="sample: this page takes 1 to 4, got 5"):
        vary(prior, Settings(4), [0], 4)


def test_controls_are_read_in_order(prior):
    assert read_settings(prior, 3, 7, 0.9, 2.0, "hat", page.ANY) == Settings(3, 7, 0.9, {"class": "hat"}, 2.0)
    assert read_settings(prior, 3, 7, 0.9, 2.0, page.ANY, 0).labels == {"smile": 0}
    assert read_settings(make_prior(coupled=False), 3, 7, 0.9, 1.0) == Settings(3, 7, 0.9)


def test_tiles_are_crisp():
    images = torch.rand(5, 1, 28, 28)
    grid = screen_grid(images, 3)
    factor = page.DISPLAY_SIZE // 28
    gap = max(1, round(page.GAP * 28 * factor))
    assert grid.shape == (2 * 28 * factor + gap, 3 * 28 * factor + 2 * gap, 4)
    # Every pixel is a square of one colour, the second image begins after a transparent gap, and the last place is
    # empty.
    first = grid[: 28 * factor, : 28 * factor, 0]
    assert np.array_equal(first[::factor, ::factor], images[0, 0].mul(255).round().byte().numpy())
    assert np.array_equal(first, np.kron(first[::factor, ::factor], np.ones((factor, factor), np.uint8)))
    assert np.array_equal(grid[0, 28 * factor + gap, :3], [round(images[1, 0, 0, 0].item() * 255)] * 3)
    assert not grid[:, 28 * factor, 3].any()
    assert not grid[-1, -1, 3]
    assert screen_grid(torch.rand(2, 3, 256, 256), 2).shape[0] == 256
    assert screen_grid(images, 5, breaks=[2]).shape[1] == screen_grid(images, 5).shape[1] + 4 * gap


def test_a_missing_gradio_is_named(prior, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"install hvae-ebm-prior\[demo\]"):
        build_demo(prior)
    with pytest.raises(TypeError, match="expected a trained DiffusionEBMPrior, got HVAE"):
        build_demo(HVAE(HVAEConfig(image_size=8, widths=(8,), latent_channels=(2,))))
    (tmp_path / "mine.py").write_text("from test_demo import make_prior as load\n")
    assert main(["demo", f"{tmp_path / 'mine.py'}:load"]) == 2
    assert "hvae-ebm-prior[demo]" in capsys.readouterr().err


@pytest.fixture
def serve():
    """Puts an app on loopback and returns its address."""
    apps = []

    def start(app):
        apps.append(app)
        return app.launch(prevent_thread_lock=True, quiet=True, share=False)[1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield start
        for app in apps:
            app.close()
        # The server and its client leave sockets and event loops to the collector, which must not find them where
        # warnings are errors.
        gc.collect()


@needs_gradio
@pytest.mark.usefixtures("serve")
@pytest.mark.filterwarnings("ignore")
class TestApp:
    def test_pictures_come_through_the_client(self, prior, serve, tmp_path):
        from gradio_client import Client, handle_file
        from PIL import Image

        address = serve(build_demo(prior))
        client = Client(address, verbose=False)
        controls = [6, 1, 1.0, 2.0, "hat", "any"]
        *pictures, gaussian, ours = client.predict(*controls, api_name="/sample")
        assert all(re.fullmatch(r"mean energy -?\d+\.\d nats", figure) for figure in (gaussian, ours))
        expected = draw_both(prior, Settings(6, 1, labels={"class": "hat"}, guidance=2.0))
        for path, images in zip(pictures, expected, strict=True):
            assert np.array_equal(np.asarray(Image.open(path)), screen_grid(images, 4))
        held, rest = client.predict(2, None, page.layer_names(prior)[:1], *controls, api_name="/hold")
        assert Image.open(held).size == (112, 112)
        assert Image.open(rest).size[0] > 600
        pixels = torch.randint(256, (20, 30, 3), generator=seed(0), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "mine.png")
        upload = handle_file(str(tmp_path / "mine.png"))
        _, rest = client.predict(2, upload, page.layer_names(prior)[:1], *controls, api_name="/hold")
        settings = Settings(6, 1, labels={"class": "hat"}, guidance=2.0)
        expected = vary(prior, settings, [0], fit_image(prior, pixels))[1:]
        assert np.array_equal(np.asarray(Image.open(rest)), screen_grid(expected, 8))
        moving, strip, note = client.predict(2, 3, 0, 1.0, 1.0, "any", "any", api_name="/watch")
        assert "data:image/webp;base64," in str(moving)
        assert Image.open(strip).size[1] > 300
        assert "Noise levels" in str(note)

    @pytest.mark.parametrize(
        ("controls", "message"),
        [
            ([6, None, 1.0, 1.0, "any", "any"], "seed: expected a whole number"),
            ([6, 0, 1.0, 1.0, "shoe", "any"], "shoe"),
            ([6000, 0, 1.0, 1.0, "any", "any"], "6000|64"),
        ],
    )
    def test_errors_are_messages(self, prior, serve, controls, message):
        from gradio_client import Client
        from gradio_client.exceptions import AppError

        address = serve(build_demo(prior))
        with pytest.raises(AppError, match=message) as raised:
            Client(address, verbose=False).predict(*controls, api_name="/sample")
        assert "Traceback" not in str(raised.value)

    def test_enter_in_the_seed_samples(self, prior):
        """As the button does, so that the keyboard is enough."""
        config = build_demo(prior).get_config_file()
        (seed,) = [each["id"] for each in config["components"] if each["props"].get("label") == "Seed"]
        assert any([seed, "submit"] in [list(target) for target in each["targets"]] for each in config["dependencies"])

    def test_controls_are_hidden_where_they_do_nothing(self, prior):
        """Labels of a prior that knows none, and Langevin steps where the flow draws."""

        def shown(app, label):
            return [
                each["props"].get("visible", True)
                for each in app.get_config_file()["components"]
                if each["props"].get("label") == label
            ]

        assert shown(build_demo(prior), "Guidance") == [True]
        assert shown(build_demo(prior), "Smile") == [True]
        plain = build_demo(make_prior(coupled=False))
        assert shown(plain, "Guidance") == [False]
        assert shown(plain, "Smile") == []
        assert shown(build_demo(prior), "Langevin steps per level") == [not prior.has_context]

    def test_the_space_serves_a_saved_prior(self, tmp_path):
        """As a Space does: `app.py` by itself, with the prior's place in the environment."""
        sys.path.insert(0, str(ROOT / "examples"))
        from quickstart import make_prior as example

        example().save_pretrained(tmp_path / "prior")
        code = (
            f"import runpy; demo = runpy.run_path({str(ROOT / 'examples/space/app.py')!r})['demo']; "
            "print(type(demo).__name__, demo.title)"
        )
        environment = {**os.environ, "PRIOR": str(tmp_path / "prior")}
        done = subprocess.run(
            [sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Blocks")
        missing = subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            capture_output=True,
            text=True,
            env={**environment, "PRIOR": "./no"},
        )
        assert "there is no such folder" in missing.stderr

    @pytest.mark.skipif(
        BROWSER is None, reason="no browser: neither chromium, chromium-browser nor google-chrome is installed"
    )
    def test_the_page_in_a_browser(self, prior, serve, tmp_path):
        """Drawn by the scripts of the page, the pictures of the start are there: a screenshot has both panels' many
        grey values.
        """
        address = serve(build_demo(prior))
        screenshot(address, tmp_path)
        pixels = read_png(tmp_path / "page.png")
        assert pixels.shape == (900, 1400, 3)
        # A page that did not come up, or shows an error, has a few colours alone.
        left, right = pixels[250:800, 400:850], pixels[250:800, 900:1350]
        assert all(len(np.unique(panel.reshape(-1, 3), axis=0)) > 50 for panel in (left, right))


def screenshot(address, folder):
    """`page.png` of an address, by the browser alone, once its scripts have had ten seconds."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
    ]
    flags += [
        "--disable-sync",
        "--hide-scrollbars",
        "--window-size=1400,900",
        "--virtual-time-budget=10000",
        f"--user-data-dir={folder / 'profile'}",
    ]
    done = subprocess.run(
        [BROWSER, *flags, f"--screenshot={folder / 'page.png'}", address],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (folder / "page.png").exists(), done.stderr[-2000:]


def read_png(path):
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))
