"""The adapters under the name users import; they live in the repository's adapters/ folder."""

from hvae_ebm_prior_adapters import *  # noqa: F403
from hvae_ebm_prior_adapters import __all__ as __all__
