"""The command `hvae-ebm-prior`, one command or family of them a file, and the page to play with.

May import from everywhere; nothing imports from here but the short name `hvae_ebm_prior.demo`.
"""

from .main import main, make_parser

__all__ = ["main", "make_parser"]
