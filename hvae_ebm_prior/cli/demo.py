"""A page to play with a trained prior: samples, labels, held layers, chains. `build_demo` makes it of plain functions.

Everything on the page follows from its settings: the same settings give the same pictures, and a sample keeps its
number when others join it. So the page keeps no state, and "sample 3" of one tab is sample 3 of the other. Requests are
bounded, as strangers make them.
"""

import base64
import html
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbone.validation import check_count, check_pictures
from ..baselines import NCPPrior
from ..chains.langevin import ChainDiverged
from ..control import resample
from ..density.sampling import supported_options
from ..energies.coupling import LabelSet
from ..evaluation.transitions import langevin_transitions
from ..prior import DiffusionEBMPrior
from ..saving.extras import missing
from ..saving.grid import tile
from ..training.learned_prior import LearnedPrior
from .demo_parts import STYLE, on, picture, picture_with_figure, upload_area
from .uploads import fit_image, read_upload

if TYPE_CHECKING:
    import gradio  # type: ignore[import-not-found, unused-ignore]

# Bounds of what one request may ask for.
MAX_COUNT = 64
MAX_STEPS = 100
MAX_CHAINS = 8
MAX_SEED = 2**32 - 1
TEMPERATURES = (0.5, 1.2)
GUIDANCES = (0.0, 8.0)
# Small images are enlarged by a whole factor to about this size, in pixels.
DISPLAY_SIZE = 112
# Between images, in widths of one.
GAP = 0.04
ANY = "any"


@dataclass(frozen=True)
class Settings:
    """What all tabs share.

    Attributes:
        count: number of pictures.
        seed: of all randomness.
        temperature: factor on the std of the backbone's Gaussian layers.
        labels: label set -> category, by index or name; empty for none.
        guidance: strength of the labels.

    Raises:
        TypeError, ValueError: a count or seed that is no whole number, or a figure beyond the page's bounds.
    """

    count: int = 16
    seed: int = 0
    temperature: float = 1.0
    labels: Mapping[str, int | str] = field(default_factory=dict)
    guidance: float = 1.0

    def __post_init__(self) -> None:
        check_count(self.count, "count")
        check_bounds("count", self.count, 1, MAX_COUNT)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f"seed: expected a whole number, got {self.seed!r}")
        check_bounds("seed", self.seed, 0, MAX_SEED)
        check_bounds("temperature", self.temperature, *TEMPERATURES)
        check_bounds("guidance", self.guidance, *GUIDANCES)

    @property
    def generator(self) -> torch.Generator:
        """A new source of randomness, the same every time."""
        return torch.Generator().manual_seed(self.seed)

    def label_arguments(self) -> dict[str, Any]:
        """Labels and guidance as `sample_noise` takes them."""
        return {"labels": dict(self.labels) or None, "guidance": self.guidance}


def check_bounds(name: str, value: float, low: float, high: float) -> None:
    """Raise TypeError or ValueError unless `value` is a number in [low, high]."""
    if not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: this page takes {low:g} to {high:g}, got {value:g}")


def draw_noise(prior: LearnedPrior, settings: Settings, n: int) -> Tensor:
    """Noise (n, D) of the first `n` samples of these settings."""
    given = supported_options(prior, temperature=settings.temperature, **settings.label_arguments())
    return prior.sample_noise(n, generator=settings.generator, **given)


@torch.no_grad()
def draw_both(prior: LearnedPrior, settings: Settings) -> tuple[Tensor, Tensor]:
    """Pictures (count, C, H, W) of the Gaussian prior, and of ours, at one temperature; labels are for ours."""
    gaussian, ours = draw_both_noises(prior, settings)
    return prior.decode(gaussian), prior.decode(ours)


@torch.no_grad()
def draw_both_noises(prior: LearnedPrior, settings: Settings) -> tuple[Tensor, Tensor]:
    """Noise (count, D) of the same."""
    noise = torch.randn(settings.count, prior.dim, generator=settings.generator, device="cpu", dtype=torch.float32)
    gaussian = settings.temperature * noise.to(prior.device, prior.dtype)
    return gaussian, draw_noise(prior, settings, settings.count)


@torch.no_grad()
def say_energy(prior: LearnedPrior, u: Tensor) -> str:
    """The mean energy of noise (N, D) in words: low where the prior has learned that data are."""
    return f"mean energy {prior.energy(u, 0).mean().item():.1f} nats"


@torch.no_grad()
def vary(prior: LearnedPrior, settings: Settings, hold: list[int], source: int | Tensor) -> Tensor:
    """A picture, and others with the noise of some of its layers held and the rest drawn anew.

    Args:
        prior: the prior.
        settings: of the sample, and of what is drawn; resampling is at temperature 1.
        hold: indices of the layers to hold, 0 the top.
        source: number of a sample of these settings, from 0, or an image (1, C, H, W) in [0, 1].

    Returns:
        Images (1 + count, C, H, W), the picture first.

    Raises:
        TypeError, ValueError: a layer or sample that does not exist, or a wrong image.
        ChainDiverged: a chain left the finite numbers.
    """
    if isinstance(source, Tensor):
        u = prior.encode(source.to(prior.device, prior.dtype), generator=settings.generator)
    else:
        check_bounds("sample", source + 1, 1, settings.count)
        u = draw_noise(prior, settings, source + 1)[-1:]
    # Another seed than the samples', whose first one would otherwise come again.
    generator = torch.Generator().manual_seed(MAX_SEED - settings.seed)
    copies = u.expand(settings.count, -1)
    variations = resample(prior, copies, hold, generator=generator, **settings.label_arguments())
    return prior.decode(torch.cat((u, variations)))


@torch.no_grad()
def watch(prior: LearnedPrior, settings: Settings, steps: int) -> tuple[Tensor, list[int]]:
    """What a few chains go through, decoded, from noise to samples.

    Within the levels' chains of `steps` Langevin steps where samples are drawn by such and nothing else is asked for;
    of energies with context, under labels and at another temperature, the state that every level ends with. Of a prior
    that has no such states, the samples alone.

    Args:
        prior: the prior.
        settings: of the samples; `count` up to `MAX_CHAINS` of them.
        steps: Langevin steps per level.

    Returns:
        Images (S, count, C, H, W) in time, and the level t of each of the S.

    Raises:
        TypeError, ValueError: a number beyond the page's bounds.
        ChainDiverged: a chain left the finite numbers.
    """
    steps = check_count(steps, "steps")
    check_bounds("steps", steps, 1, MAX_STEPS)
    n = min(settings.count, MAX_CHAINS)
    has_chains = not (isinstance(prior, NCPPrior) and prior.sampler == "sir")
    if has_chains and not prior.has_context and not settings.labels and settings.temperature == 1:
        run = langevin_transitions(prior, n, steps=steps, generator=settings.generator)
        states = run.states.flip(0).flatten(0, 1)
        levels = [t for t in reversed(range(len(run.states))) for _ in run.shown]
    elif isinstance(prior, DiffusionEBMPrior):
        states = prior.sample_noise(
            n,
            temperature=settings.temperature,
            trajectory=True,
            generator=settings.generator,
            **settings.label_arguments(),
        ).flip(0)
        levels = list(reversed(range(len(states))))
    else:
        states, levels = draw_noise(prior, settings, n)[None], [0]
    return torch.stack([prior.decode(u) for u in states]), levels


def screen_grid(images: Tensor, columns: int, *, breaks: list[int] | None = None) -> Any:
    """A grid for the screen.

    Args:
        images: (N, C, H, W) in [0, 1], row by row.
        columns: images in a row.
        breaks: columns, in order, with a wider gap before them.

    Returns:
        Pixels, uint8 (height, width, 4): small images enlarged by a whole factor, what lies between them transparent.
    """
    pixels = images.detach().float().cpu().clamp(0, 1).mul(255).round().byte()
    pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels[:, :3]
    factor = max(1, DISPLAY_SIZE // max(pixels.shape[-2:]))
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    opaque = F.pad(pixels, (0, 0, 0, 0, 0, 1), value=255)
    width = opaque.shape[3]
    gap = max(1, round(GAP * width))
    # Every image has its gap at the right and below; the last ones' go again.
    canvas = tile(F.pad(opaque, (0, gap, 0, gap)), columns)[:, :-gap, :-gap]
    first, *others = canvas.tensor_split([i * (width + gap) for i in breaks or ()], dim=2)
    return torch.cat([first, *(F.pad(part, (4 * gap, 0)) for part in others)], dim=2).permute(1, 2, 0).numpy()


def animate(frames: Tensor, milliseconds: int = 180) -> str:
    """An `<img>` of frames (S, N, C, H, W), N images side by side, one after the other; it rests on the last."""
    # It comes with gradio.
    from PIL import Image

    pictures = [Image.fromarray(screen_grid(images, len(images))) for images in frames]
    durations = [milliseconds] * (len(pictures) - 1) + [2000]
    file = io.BytesIO()
    pictures[0].save(file, "WEBP", save_all=True, append_images=pictures[1:], duration=durations, loop=0, lossless=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="the chains, step by step" src="data:image/webp;base64,{data}">'


def layer_names(prior: LearnedPrior) -> list[str]:
    """Layers for the eye, top to bottom."""
    names = [f"{i}: {'×'.join(map(str, shape))}" for i, shape in enumerate(prior.latent_shapes)]
    if len(names) > 1:
        names[0] += ", top"
    names[-1] += ", bottom"
    return names


def read_settings(
    prior: LearnedPrior, count: Any, seed: Any, temperature: Any, guidance: Any = 1.0, *categories: Any
) -> Settings:
    """Settings of the page's controls, in their order; labels that are to be any are left out."""
    sets = prior.coupling.sets if prior.coupling else {}
    chosen = {name: value for name, value in zip(sets, categories, strict=False) if value not in (None, ANY)}
    return Settings(count, seed, temperature, chosen, guidance)


def import_gradio() -> Any:
    """The module; ImportError that names the extra where it is missing."""
    try:
        import gradio
    except ImportError as error:
        raise missing("the demo needs gradio", "demo") from error
    return gradio


def build_demo(prior: LearnedPrior, *, title: str | None = None) -> "gradio.Blocks":
    """The page, a Gradio app; `.launch()` serves it.

    Args:
        prior: a trained prior.
        title: the heading; None for the library's name.

    Returns:
        The app. Its endpoints are `sample`, `hold` and `watch`.

    Raises:
        TypeError: no prior of this library.
        ValueError: the prior of a model of plain tensors.
        ImportError: gradio is missing.
    """
    if not isinstance(prior, LearnedPrior):
        raise TypeError(
            f"demo: expected a trained DiffusionEBMPrior, got {type(prior).__name__}; "
            "load it with DiffusionEBMPrior.from_pretrained"
        )
    check_pictures(prior.backbone, "demo")
    gr = import_gradio()
    layers = layer_names(prior)
    sets = prior.coupling.sets if prior.coupling else {}

    def with_messages(compute: Callable[..., Any]) -> Callable[..., Any]:
        """What the visitor can mend becomes a message on the page."""

        @wraps(compute)
        def run(*values: Any) -> Any:
            try:
                return compute(*values)
            except (ValueError, TypeError, OverflowError, ChainDiverged) as error:
                # The page would take marks in a name for HTML.
                raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error

        return run

    @with_messages
    @torch.no_grad()
    def on_sample(*controls: Any) -> tuple[Any, ...]:
        settings = read_settings(prior, *controls)
        noises = draw_both_noises(prior, settings)
        columns = 4 if settings.count <= 16 else 8
        grids = (screen_grid(prior.decode(u), columns) for u in noises)
        return *grids, *(say_energy(prior, u) for u in noises)

    @with_messages
    def on_hold(number: Any, upload: Any, held: list[str], *controls: Any) -> tuple[Any, Any]:
        settings = read_settings(prior, *controls)
        source = int(number) - 1 if upload is None else fit_image(prior, read_upload(upload))
        images = vary(prior, settings, [layers.index(name) for name in held], source)
        return screen_grid(images[:1], 1), screen_grid(images[1:], 8)

    @with_messages
    def on_watch(steps: Any, *controls: Any) -> tuple[str, Any, str]:
        frames, levels = watch(prior, read_settings(prior, *controls), steps)
        breaks = [i for i in range(1, len(levels)) if levels[i] != levels[i - 1]]
        # Where every frame is the end of a level there is nothing to set apart.
        if len(breaks) == len(levels) - 1:
            breaks = []
        strip = screen_grid(frames.transpose(0, 1).flatten(0, 1), len(frames), breaks=breaks)
        return animate(frames), strip, f"Noise levels {', '.join(str(t) for t in dict.fromkeys(levels))}"

    with gr.Blocks(title=title or "hvae-ebm-prior", fill_width=True, analytics_enabled=False) as page:
        gr.HTML(STYLE)
        gr.Markdown(f"## {title or 'hvae-ebm-prior'}")
        with gr.Row():
            with gr.Column(scale=1, min_width=240):
                controls = settings_column(gr, sets)
            with gr.Column(scale=4), gr.Tabs():
                with gr.Tab("Sample"):
                    go = gr.Button("Sample", variant="primary", elem_classes="go")
                    with gr.Row():
                        places = [picture_with_figure(gr, label) for label in ("Gaussian prior", "This prior")]
                    shown = [image for image, _ in places] + [figure for _, figure in places]
                    on(go.click, on_sample, controls, shown, "sample")
                    on(page.load, on_sample, controls, shown, False)
                    on(controls[1].submit, on_sample, controls, shown, False)  # Enter in the field of the seed
                with gr.Tab("Hold layers") as hold_tab:
                    with gr.Row():
                        number = gr.Slider(1, MAX_COUNT, 1, step=1, label="Sample, by its number")
                        held = gr.CheckboxGroup(layers, value=layers[:1], label="Layers to hold")
                    again = gr.Button("Draw the rest anew", variant="primary", elem_classes="go")
                    with gr.Row():
                        with gr.Column(scale=1, min_width=160):
                            original = picture(gr, "Held")
                            upload = upload_area(gr)
                        with gr.Column(scale=5):
                            varied = picture(gr, "The rest drawn anew")
                    chosen = [number, upload, held, *controls]
                    on(again.click, on_hold, chosen, [original, varied], "hold")
                    on(hold_tab.select, on_hold, chosen, [original, varied], False)
                with gr.Tab("From noise to samples") as watch_tab:
                    # Energies with context are drawn by the flow.
                    steps = gr.Slider(
                        1, MAX_STEPS, 15, step=1, label="Langevin steps per level", visible=not prior.has_context
                    )
                    run = gr.Button("Run", variant="primary", elem_classes="go")
                    moving = gr.HTML(elem_classes="strip")
                    note = gr.Markdown(elem_classes="quiet")
                    strip = picture(gr, "Level after level")
                    shown = [moving, strip, note]
                    on(run.click, on_watch, [steps, *controls], shown, "watch")
                    on(watch_tab.select, on_watch, [steps, *controls], shown, False)
    # One request computes at a time, whoever asks; so many may wait.
    return page.queue(max_size=32)


def settings_column(gr: Any, sets: Mapping[str, LabelSet]) -> list[Any]:
    """The controls of what all tabs share, in the order of `read_settings`."""
    controls = [
        gr.Slider(1, MAX_COUNT, 16, step=1, label="Pictures"),
        gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED),
        gr.Slider(*TEMPERATURES, 1.0, step=0.05, label="Temperature"),
        gr.Slider(*GUIDANCES, 4.0 if sets else 1.0, step=0.5, label="Guidance", visible=bool(sets)),
    ]
    for name, label_set in sets.items():
        given = label_set.categories
        categories = range(given) if isinstance(given, int) else given
        choices = [(ANY, ANY), *((str(category), category) for category in categories)]
        controls.append(gr.Dropdown(choices, value=ANY, label=name.capitalize()))
    return controls
