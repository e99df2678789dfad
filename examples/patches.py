"""Cut photographs into patches of 32x32: images for the recipe `cifar10-hvae` where CIFAR-10 is out of reach.

    apt install mate-backgrounds lomiri-wallpapers-16.04
    python examples/patches.py /usr/share/backgrounds/*.jpg /usr/share/backgrounds/mate/nature --out data/patches
    python examples/recipes.py cifar10-hvae --data-dir data/patches --preset default

Every photograph is made --height pixels high, and patches begin at every --stride of them. Its right fifth is held out:
the folders `train` and `test` that are written share no pixel.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

SIZE = 32
HELD_OUT = 0.2
KINDS = {".jpg", ".jpeg", ".png", ".webp"}


def photographs(sources: list[Path]) -> list[Path]:
    """Files among `sources`, and those in its folders, sorted within each."""
    found = []
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"{source}: no such file or folder of photographs")
        inside = sorted(source.iterdir()) if source.is_dir() else [source]
        found += [path for path in inside if path.suffix.lower() in KINDS]
    if not found:
        raise ValueError(f"expected photographs ({', '.join(sorted(KINDS))}), found none in {[*map(str, sources)]}")
    return found


def patches(photograph: Image.Image, stride: int) -> Iterator[tuple[bool, Image.Image]]:
    """Whether a patch is held out, and the patch, row by row; none lies across the border."""
    border = round((1 - HELD_OUT) * photograph.width)
    for top in range(0, photograph.height - SIZE + 1, stride):
        for held_out, first, last in ((False, 0, border), (True, border, photograph.width)):
            for left in range(first, last - SIZE + 1, stride):
                yield held_out, photograph.crop((left, top, left + SIZE, top + SIZE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, nargs="+", help="files, or folders of them")
    parser.add_argument("--height", type=int, default=256, help="pixels of a photograph (%(default)s)")
    parser.add_argument("--stride", type=int, default=8, help="pixels from patch to patch (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("data/patches"), help="folder to write (%(default)s)")
    options = parser.parse_args()
    if options.out.exists():
        raise FileExistsError(f"{options.out}: exists; name another folder with --out, or remove it")
    paths = photographs(options.photographs)
    counts = {False: 0, True: 0}
    folders = {False: options.out / "train", True: options.out / "test"}
    for folder in folders.values():
        folder.mkdir(parents=True)
    for path in paths:
        photograph = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        width = round(photograph.width * options.height / photograph.height)
        photograph = photograph.resize((width, options.height), Image.Resampling.LANCZOS)
        for held_out, patch in patches(photograph, options.stride):
            patch.save(folders[held_out] / f"{counts[held_out]:06}.png")
            counts[held_out] += 1
    print(f"{options.out}: {counts[False]} patches to train on, {counts[True]} held out")


if __name__ == "__main__":
    main()
