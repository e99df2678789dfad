"""Parts of the page to play with: its look, places for pictures and figures, and what happens on events."""

from collections.abc import Callable
from typing import Any

STYLE = """<style>
.gradio-container { --slider-color: #4b5563; --color-accent: #374151; --checkbox-background-color-selected: #374151;
  --button-primary-background-fill: #1f2937; --button-primary-background-fill-hover: #374151; }
.crisp img { image-rendering: pixelated; width: 100%; }
.crisp { border: none !important; background: transparent !important; }
.crisp .icon-button-wrapper { opacity: 0; transition: opacity .15s; }
.crisp:hover .icon-button-wrapper { opacity: 1; }
.crisp .empty { visibility: hidden; }
.strip img { image-rendering: pixelated; max-width: 100%; height: auto; }
.go { max-width: 220px; }
.quiet { opacity: .65; }
@media (max-width: 640px) { .go { max-width: none; width: 100%; } .gradio-container { padding: 8px !important; } }
footer { display: none !important; }
</style>"""


def on(event: Any, compute: Callable[..., Any], inputs: list[Any], outputs: list[Any], name: str | bool) -> None:
    """Bind a function to an event; all functions share one worker."""
    event(compute, inputs, outputs, api_name=name, concurrency_limit=1, concurrency_id="prior")


def picture(gr: Any, label: str) -> Any:
    """A place for a picture, kept as it is, under its name."""
    with gr.Column(min_width=160):
        gr.Markdown(f"**{label}**")
        return gr.Image(
            label=label, show_label=False, format="png", image_mode="RGBA", interactive=False, elem_classes="crisp"
        )


def picture_with_figure(gr: Any, label: str) -> tuple[Any, Any]:
    """The same, and a place below it for a line about the picture."""
    with gr.Column(min_width=160):
        return picture(gr, label), gr.Markdown(elem_classes="quiet")


def upload_area(gr: Any) -> Any:
    """A place for an image of the visitor's, which comes as the path of its file: `read_upload` looks before it
    decodes.
    """
    return gr.Image(label="Or your own", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=160)
