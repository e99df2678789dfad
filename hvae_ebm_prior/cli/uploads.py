"""Pictures that visitors of the page bring: bounded before they are decoded, and made images as the backbone's."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..density.latent_prior import LatentPrior
from ..training.image_data import image_shape

# Bytes of a file, and pixels of a picture as it is and as it is scaled, that the page takes.
MAX_FILE = 10 * 2**20
MAX_PIXELS = 2**24
FORMATS = ("PNG", "JPEG", "WEBP")


def read_upload(path: str) -> np.ndarray:
    """The pixels of a picture's file, uint8 (H, W, 3); ValueError for one that is too large, or no picture."""
    # It comes with gradio.
    from PIL import Image, ImageOps

    if (size := Path(path).stat().st_size) > MAX_FILE:
        raise ValueError(f"upload: this page takes files of at most {MAX_FILE} bytes, got {size}")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height <= MAX_PIXELS:
                turned = ImageOps.exif_transpose(picture).convert("RGBA")
                # Colors behind transparent pixels are hidden.
                return np.array(Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned).convert("RGB"))
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes of them
        raise ValueError(
            f"upload: expected a picture, {', '.join(FORMATS)}, of at most {MAX_PIXELS} pixels; this one cannot be read"
        ) from error
    raise ValueError(f"upload: this page takes pictures of at most {MAX_PIXELS} pixels, got {width}x{height}")


def fit_image(prior: LatentPrior, pixels: Any) -> Tensor:
    """An upload, uint8 (H, W, 3), resized and cropped about its centre to an image (1, C, H, W) as the backbone's;
    ValueError for one that is too long and narrow.
    """
    channels, height, width = image_shape(prior)
    image = torch.as_tensor(pixels, device="cpu").float().permute(2, 0, 1)[None, :3] / 255
    factor = max(height / image.shape[2], width / image.shape[3])
    size = max(height, round(factor * image.shape[2])), max(width, round(factor * image.shape[3]))
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(
            f"upload: {image.shape[3]}x{image.shape[2]} pixels are too long and narrow; cut the picture first"
        )
    image = F.interpolate(image, size, mode="bilinear", antialias=True).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    image = image[:, :, top : top + height, left : left + width]
    return image.mean(1, keepdim=True) if channels == 1 else image
