"""A page to play with a trained prior: samples, labels, held layers, chains. `build_demo` makes it; what it computes
are plain functions.

Everything on the page follows from its settings: the same settings give the same pictures, and a sample keeps its
number when others join it. So the page keeps no state, and "sample 3" of one tab is sample 3 of the other. Requests are
bounded, as strangers make them.
"""

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..backbone.validation import check_count
from ..baselines.layerwise import LayerwisePrior
from ..chains.langevin import ChainDiverged
from ..control import resample
from ..evaluation.transitions import langevin_transitions
from ..extras import missing
from ..prior import DiffusionEBMPrior
from ..training.image_data import image_shape

if TYPE_CHECKING:
    import gradio  # type: ignore[import-not-found, unused-ignore]

MAX_COUNT, MAX_STEPS, MAX_CHAINS, MAX_SEED = 64, 100, 8, 2**32 - 1
TEMPERATURES, GUIDANCES = (0.5, 1.2), (0.0, 8.0)
# Small images are shown about this large, in pixels, by a whole factor.
SHOWN = 112
GAP = 0.04
ANY = "any"
STYLE = """<style>
.gradio-container { --slider-color: #4b5563; --color-accent: #374151; --checkbox-background-color-selected: #374151;
  --button-primary-background-fill: #1f2937; --button-primary-background-fill-hover: #374151; }
.crisp img { image-rendering: pixelated; width: 100%; }
.crisp { border: none !important; background: transparent !important; }
.crisp .icon-button-wrapper { opacity: 0; transition: opacity .15s; }
.crisp:hover .icon-button-wrapper { opacity: 1; }
.strip img { image-rendering: pixelated; max-width: 100%; height: auto; }
.go { max-width: 220px; }
.quiet { opacity: .65; }
footer { display: none !important; }
</style>"""


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

    def asked(self) -> dict[str, Any]:
        """Labels and guidance as `sample_noise` takes them."""
        return {"labels": dict(self.labels) or None, "guidance": self.guidance}


def check_bounds(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless `value` is in [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name}: this page takes {low:g} to {high:g}, got {value:g}")


def draw_noise(prior: DiffusionEBMPrior, settings: Settings, n: int) -> Tensor:
    """Noise (n, D) of the first `n` samples of these settings."""
    return prior.sample_noise(n, temperature=settings.temperature, generator=settings.generator, **settings.asked())


@torch.no_grad()
def draw_both(prior: DiffusionEBMPrior, settings: Settings) -> tuple[Tensor, Tensor]:
    """Pictures of the backbone's Gaussian prior and of `prior`, (count, C, H, W) each, at one temperature; labels are
    for ours alone.
    """
    noise = torch.randn(settings.count, prior.dim, generator=settings.generator).to(prior.device, prior.dtype)
    return prior.decode(settings.temperature * noise), prior.decode(draw_noise(prior, settings, settings.count))


@torch.no_grad()
def vary(prior: DiffusionEBMPrior, settings: Settings, hold: list[int], source: int | Tensor) -> Tensor:
    """A picture, and others with the noise of some of its layers held and the rest drawn anew.

    Args:
        prior: the prior.
        settings: of the sample, and of what is drawn; resampling knows no temperature but 1.
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
    variations = resample(prior, u.expand(settings.count, -1), hold, generator=generator, **settings.asked())
    return prior.decode(torch.cat((u, variations)))


@torch.no_grad()
def watch(prior: DiffusionEBMPrior, settings: Settings, steps: int) -> tuple[Tensor, list[int]]:
    """What a few chains go through, decoded, from noise to samples.

    Within the levels' chains of `steps` Langevin steps where nothing else is asked for; under labels, at another
    temperature, and for a prior without chains, the state that every level ends with.

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
    check_count(steps, "steps")
    check_bounds("steps", steps, 1, MAX_STEPS)
    n = min(settings.count, MAX_CHAINS)
    if settings.labels or settings.temperature != 1 or isinstance(prior, LayerwisePrior):
        states = prior.sample_noise(
            n, temperature=settings.temperature, trajectory=True, generator=settings.generator, **settings.asked()
        ).flip(0)
        levels = list(reversed(range(len(states))))
    else:
        run = langevin_transitions(prior, n, steps=steps, generator=settings.generator)
        states = run.states.flip(0).flatten(0, 1)
        levels = [t for t in reversed(range(len(run.states))) for _ in run.shown]
    return torch.stack([prior.decode(u) for u in states]), levels


def fit_image(prior: DiffusionEBMPrior, pixels: Any) -> Tensor:
    """An upload, uint8 (H, W, 3), as an image (1, C, H, W) in [0, 1] of the backbone's shape; cropped to it about the
    centre.
    """
    channels, height, width = image_shape(prior)
    image = torch.as_tensor(pixels).float().permute(2, 0, 1)[None, :3] / 255
    factor = max(height / image.shape[2], width / image.shape[3])
    size = max(height, round(factor * image.shape[2])), max(width, round(factor * image.shape[3]))
    image = interpolate(image, size, mode="bilinear", antialias=True).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    image = image[:, :, top : top + height, left : left + width]
    return image.mean(1, keepdim=True) if channels == 1 else image


def tile(images: Tensor, columns: int, *, wide: list[int] | None = None) -> Any:
    """A grid for the screen.

    Args:
        images: (N, C, H, W) in [0, 1], row by row.
        columns: images in a row.
        wide: columns with a wider gap before them.

    Returns:
        Pixels, uint8 (height, width, 4): small images enlarged by a whole factor, what lies between them transparent.
    """
    pixels = images.detach().float().cpu().clamp(0, 1).mul(255).round().byte()
    pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels[:, :3]
    factor = max(1, SHOWN // max(pixels.shape[-2:]))
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    height, width = pixels.shape[-2:]
    gap = max(1, round(GAP * width))
    columns = min(columns, len(pixels))
    lefts = [i * (width + gap) + 4 * gap * sum(i >= j for j in wide or ()) for i in range(columns)]
    rows = -(-len(pixels) // columns)
    canvas = torch.zeros(rows * (height + gap) - gap, lefts[-1] + width, 4, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + gap), lefts[i % columns]
        canvas[top : top + height, left : left + width, :3] = image.permute(1, 2, 0)
        canvas[top : top + height, left : left + width, 3] = 255
    return canvas.numpy()


def animate(frames: Tensor, milliseconds: int = 180) -> str:
    """An `<img>` that shows frames (S, N, C, H, W), N images side by side, one after the other, and rests on the last."""
    from PIL import Image  # comes with gradio

    pictures = [Image.fromarray(tile(images, len(images))) for images in frames]
    held = [milliseconds] * (len(pictures) - 1) + [2000]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=held, loop=0, lossless=True)
    return f'<img alt="the chains, step by step" src="data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def layer_names(prior: DiffusionEBMPrior) -> list[str]:
    """Layers for the eye, top to bottom."""
    ends = {0: "top", len(prior.latent_shapes) - 1: "bottom"}
    return [
        f"{i}: {'×'.join(map(str, shape))}{f', {ends[i]}' if i in ends else ''}"
        for i, shape in enumerate(prior.latent_shapes)
    ]


def read_settings(
    prior: DiffusionEBMPrior, count: Any, seed: Any, temperature: Any, guidance: Any = 1.0, *categories: Any
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


def build_demo(prior: DiffusionEBMPrior, *, title: str | None = None) -> "gradio.Blocks":
    """The page, a Gradio app; `.launch()` serves it.

    Args:
        prior: a trained prior.
        title: the heading; None for the library's name.

    Returns:
        The app. Its endpoints are `sample`, `hold` and `watch`.

    Raises:
        TypeError: no prior of this library.
        ImportError: gradio is missing.
    """
    if not isinstance(prior, DiffusionEBMPrior):
        raise TypeError(
            f"demo: expected a trained DiffusionEBMPrior, got {type(prior).__name__}; load it with DiffusionEBMPrior.from_pretrained"
        )
    gr = import_gradio()
    layers, sets = layer_names(prior), prior.coupling.sets if prior.coupling else {}

    def told(compute: Callable[..., Any]) -> Callable[..., Any]:
        """What the visitor can mend becomes a message on the page."""

        @wraps(compute)
        def run(*given: Any) -> Any:
            try:
                return compute(*given)
            except (ValueError, TypeError, ChainDiverged) as error:
                raise gr.Error(str(error), print_exception=False) from error

        return run

    @told
    def on_sample(*controls: Any) -> tuple[Any, Any]:
        settings = read_settings(prior, *controls)
        gaussian, ours = draw_both(prior, settings)
        columns = 4 if settings.count <= 16 else 8
        return tile(gaussian, columns), tile(ours, columns)

    @told
    def on_hold(number: Any, upload: Any, held: list[str], *controls: Any) -> tuple[Any, Any]:
        settings = read_settings(prior, *controls)
        source = int(number) - 1 if upload is None else fit_image(prior, upload)
        images = vary(prior, settings, [layers.index(name) for name in held], source)
        return tile(images[:1], 1), tile(images[1:], 8)

    @told
    def on_watch(steps: Any, *controls: Any) -> tuple[str, Any, str]:
        frames, levels = watch(prior, read_settings(prior, *controls), steps)
        begins = [i for i in range(1, len(levels)) if levels[i] != levels[i - 1]]
        # All levels' ends: there is nothing to set apart.
        strip = tile(
            frames.transpose(0, 1).flatten(0, 1), len(frames), wide=begins if len(begins) < len(levels) - 1 else None
        )
        return animate(frames), strip, f"Levels {', '.join(str(t) for t in dict.fromkeys(levels))}"

    with gr.Blocks(title=title or "hvae-ebm-prior", fill_width=True, analytics_enabled=False) as page:
        gr.HTML(STYLE)
        gr.Markdown(f"## {title or 'hvae-ebm-prior'}")
        with gr.Row():
            with gr.Column(scale=1, min_width=240):
                count = gr.Slider(1, MAX_COUNT, 16, step=1, label="Pictures")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                temperature = gr.Slider(*TEMPERATURES, 1.0, step=0.05, label="Temperature")
                guidance = gr.Slider(*GUIDANCES, 4.0 if sets else 1.0, step=0.5, label="Guidance", visible=bool(sets))
                choices = [
                    gr.Dropdown(
                        [
                            (ANY, ANY),
                            *(
                                (str(c), c)
                                for c in (range(s.categories) if isinstance(s.categories, int) else s.categories)
                            ),
                        ],
                        value=ANY,
                        label=name.capitalize(),
                    )
                    for name, s in sets.items()
                ]
            controls = [count, seed, temperature, guidance, *choices]
            with gr.Column(scale=4), gr.Tabs():
                with gr.Tab("Sample"):
                    go = gr.Button("Sample", variant="primary", elem_classes="go")
                    with gr.Row():
                        shown = [picture(gr, "Gaussian prior"), picture(gr, "This prior")]
                    on(go.click, on_sample, controls, shown, "sample")
                    on(page.load, on_sample, controls, shown, False)
                with gr.Tab("Hold layers"):
                    with gr.Row():
                        number = gr.Slider(1, MAX_COUNT, 1, step=1, label="Sample, by its number")
                        held = gr.CheckboxGroup(layers, value=layers[:1], label="Layers to hold")
                    again = gr.Button("Draw the rest anew", variant="primary", elem_classes="go")
                    with gr.Row():
                        with gr.Column(scale=1, min_width=160):
                            original = picture(gr, "Held")
                            upload = gr.Image(
                                label="Or your own",
                                type="numpy",
                                image_mode="RGB",
                                sources=["upload", "clipboard"],
                                height=160,
                            )
                        with gr.Column(scale=5):
                            varied = picture(gr, "The rest drawn anew")
                    on(again.click, on_hold, [number, upload, held, *controls], [original, varied], "hold")
                with gr.Tab("Watch a chain"):
                    steps = gr.Slider(1, MAX_STEPS, 15, step=1, label="Langevin steps per level")
                    run = gr.Button("Run", variant="primary", elem_classes="go")
                    moving = gr.HTML(elem_classes="strip")
                    note = gr.Markdown(elem_classes="quiet")
                    strip = picture(gr, "From noise, left, to samples, right")
                    on(run.click, on_watch, [steps, *controls], [moving, strip, note], "watch")
    # One request computes at a time, whoever asks; so many may wait.
    return page.queue(max_size=32)


def on(event: Any, compute: Callable[..., Any], inputs: list[Any], outputs: list[Any], name: str | bool) -> None:
    """Bind a function to an event; all functions share one worker."""
    event(compute, inputs, outputs, api_name=name, concurrency_limit=1, concurrency_id="prior")


def picture(gr: Any, label: str) -> Any:
    """A place for a picture, kept as it is, under its name."""
    with gr.Column(min_width=160):
        gr.Markdown(f"**{label}**", elem_classes="quiet")
        return gr.Image(
            label=label, show_label=False, format="png", image_mode="RGBA", interactive=False, elem_classes="crisp"
        )


def run_demo(prior: object, *, port: int | None = None, share: bool = False) -> None:
    """Serve the page until it is interrupted.

    Args:
        prior: what the command's loader returned, or the prior that was loaded onto it.
        port: of the server; None takes the first free one from 7860 on.
        share: ask Gradio for a public address, good for some days.

    Raises:
        TypeError, ImportError: as of `build_demo`.
        OSError: the port is taken.
    """
    build_demo(prior).launch(server_port=port, share=share)  # type: ignore[arg-type]
