"""A Hugging Face Space over a saved prior: set PRIOR to its repository, as owner/name, or put it in the folder `prior`
beside this file.
"""

import os
from pathlib import Path

from hvae_ebm_prior import DiffusionEBMPrior
from hvae_ebm_prior.adapters import HVAE
from hvae_ebm_prior.demo import build_demo

HERE = Path(__file__).parent
# In the Space the backbone lies beside this file; in the repository of the library, among the examples.
BACKBONE = next(
    path for path in (HERE / "hvae.safetensors", HERE.parent / "data" / "hvae.safetensors") if path.exists()
)

prior = DiffusionEBMPrior.from_pretrained(os.environ.get("PRIOR", HERE / "prior"), backbone=HVAE.load(BACKBONE))
demo = build_demo(prior, title="A better prior for a hierarchical VAE of Fashion-MNIST")

if __name__ == "__main__":
    demo.launch(max_file_size="10mb")
