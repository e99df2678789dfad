"""The page to play with, under the name users import; it lives in cli/demo.py."""

from .cli.demo import build_demo

__all__ = [
    "build_demo",
]
