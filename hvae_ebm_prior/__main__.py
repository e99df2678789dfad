"""`python -m hvae_ebm_prior`, the command line by another name."""

from .cli import main

raise SystemExit(main())
