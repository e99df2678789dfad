"""Fail unless a wheel holds our two packages, with their type markers, and the licence, and nothing else: python
.ci/check_wheel.py file.whl
"""

import re
import sys
from zipfile import ZipFile

names = set(ZipFile(sys.argv[1]).namelist())
packages = ("hvae_ebm_prior", "hvae_ebm_prior_adapters")
code = rf"({'|'.join(packages)})/(\w+/)*(\w+\.py|py\.typed)"
metadata = r"hvae_ebm_prior-[\w.]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/LICENSE)"
stray = sorted(name for name in names if not re.fullmatch(f"{code}|{metadata}", name))
missing = sorted({f"{package}/py.typed" for package in packages} - names)
if not any(name.endswith("licenses/LICENSE") for name in names):
    missing.append("LICENSE")
print(f"{len(names)} files in the wheel")
if stray or missing:
    raise SystemExit(f"wheel: stray files {stray}, missing {missing}")
