"""The input backend 'fast': timm's transforms on arrays of uint8 instead of PIL images.

The draws are those of timm's transform, in its order, so an image gets the same augmentation from both backends. Crop
and resize are torch's kernels for uint8, colour jitter is Pillow's arithmetic (`Blend.c`) on whole planes, and JPEG
files are decoded by simplejpeg where it is installed. Pixels differ by rounding. A step that is not known here runs on
a PIL image, by timm.
"""

import io
import random
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import transforms

from .decode import read_image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

__all__ = ['FastTransform', 'collate', 'has_jpeg_decoder', 'read_array']

Step = Callable[[Tensor], Tensor]

JPEG = b'\xff\xd8\xff'
ON_TENSORS = (transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip, transforms.CenterCrop, MaybePILToTensor)
MODES = {'bilinear', 'bicubic'}  # of resizing, that torch has antialiased kernels for
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # ITU-R 601, as Pillow converts to 'L'
EPSILON = 1e-3  # keeps the sums of a blend of equal values from falling below them


def has_jpeg_decoder() -> bool:
    """Return True if simplejpeg is installed."""
    return simplejpeg is not None


def read_array(file: BinaryIO) -> np.ndarray:
    """Read an image file as RGB (height, width, 3) in uint8, with the pixels of :func:`.decode.read_image`.

    What simplejpeg refuses or warns about, Pillow decodes or refuses.

    Raises:
        Exception: Any error of Pillow's decoders for a damaged file.
    """
    content = file.read()
    if simplejpeg is not None and content.startswith(JPEG):
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(content)
            if space in ('YCbCr', 'Gray') and height * width <= (Image.MAX_IMAGE_PIXELS or 0):
                return simplejpeg.decode_jpeg(content, 'RGB')
        except ValueError:
            pass
    return np.array(read_image(io.BytesIO(content), 'RGB'))


def collate(samples: Sequence[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Return the images and targets of a batch; in a worker they are written into shared memory.

    The copies of an image in several augmentation splits come one split after the other, as with timm.
    """
    images: tuple[Any, ...]
    images, targets = zip(*samples, strict=True)
    if isinstance(images[0], tuple):
        targets *= len(images[0])
        images = tuple(image for split in zip(*images, strict=True) for image in split)
    return default_collate(list(images)), default_collate(list(targets))


class FastTransform:
    """timm's transform for RGB images, with the same draws: PIL image or array (H, W, 3) -> uint8 (3, H, W).

    Args:
        transform: Transform of ``timm.data.create_transform``.
    """

    def __init__(self, transform: transforms.Compose):
        self.steps = [(step, _on_tensor(step)) for step in transform.transforms]

    def __call__(self, image: Any) -> Any:
        """Apply all steps."""
        for step, on_tensor in self.steps:
            image = step(_to_pil(image)) if on_tensor is None else on_tensor(_to_tensor(image))
        return image.contiguous() if isinstance(image, Tensor) else image


def _to_tensor(image: Any) -> Tensor:
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(np.array(image) if isinstance(image, Image.Image) else image).permute(2, 0, 1)


def _to_pil(image: Any) -> Any:
    if isinstance(image, Tensor) and image.dtype == torch.uint8:
        image = image.permute(1, 2, 0).numpy()
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def _on_tensor(step: Any) -> Step | None:
    """Return a function that does the same to tensors, or None if there is none."""
    if isinstance(step, RandomResizedCropAndInterpolation) and _modes(step) <= MODES:
        return lambda image: _random_resized_crop(step, image)
    if isinstance(step, transforms.Resize) and _modes(step) <= MODES and step.max_size is None:
        return lambda image: _resize(image, _size(step.size, image), step.interpolation.value)
    if isinstance(step, transforms.ColorJitter) and step.hue is None:
        return lambda image: _jitter(step, image)
    return step if isinstance(step, ON_TENSORS) else None


def _modes(step: Any) -> set[str]:
    chosen = step.interpolation if isinstance(step.interpolation, tuple | list) else (step.interpolation,)
    return {mode.value for mode in chosen}


def _random_resized_crop(step: Any, image: Tensor) -> Tensor:
    top, left, height, width = step.get_params(image, step.scale, step.ratio)
    mode = step.interpolation
    if isinstance(mode, tuple | list):
        mode = random.choice(mode)
    return _resize(image[:, top:top + height, left:left + width], step.size, mode.value)


def _size(size: int | Sequence[int], image: Tensor) -> Sequence[int]:
    """Return (height, width) as torchvision's ``Resize`` understands a size: a single number is the shorter edge."""
    if not isinstance(size, int) and len(size) > 1:
        return size
    edge = size if isinstance(size, int) else size[0]
    height, width = image.shape[-2:]
    longer = int(edge * max(height, width) / min(height, width))
    return (longer, edge) if width <= height else (edge, longer)


def _resize(image: Tensor, size: Sequence[int], mode: str) -> Tensor:
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image[None], tuple(size), mode=mode, antialias=True, align_corners=False)[0]


def _jitter(step: transforms.ColorJitter, image: Tensor) -> Tensor:
    order, brightness, contrast, saturation, _ = step.get_params(step.brightness, step.contrast, step.saturation, None)
    planes = torch.empty(image.shape).copy_(image)
    blends = ((brightness, _black), (contrast, _mean_grey), (saturation, _grey))
    for index in order.tolist():
        if index < len(blends) and blends[index][0] is not None:
            factor, other = blends[index]
            _blend(planes, other(planes), factor)
    return torch.from_numpy(planes.numpy().astype(np.uint8))  # three times as fast as torch's conversion


def _blend(planes: Tensor, other: Tensor | float, factor: float) -> None:
    """Replace each value x by other + factor · (x - other), clamped to 0 … 255 and rounded down."""
    planes.mul_(factor)
    if isinstance(other, Tensor):
        planes.add_(other.mul_(1 - factor).add_(EPSILON))
    elif other:
        planes.add_(other * (1 - factor) + EPSILON)
    if factor > 1:  # otherwise it lies between the two
        planes.clamp_(0, 255)
    planes.floor_()


def _black(planes: Tensor) -> float:
    return 0.0


def _mean_grey(planes: Tensor) -> float:
    """Return the rounded mean, from sums without a rounding error, which depend on no order."""
    grey = _grey(planes)
    return float(int(grey.sum(1).sum(dtype=torch.float64).item() / grey.numel() + 0.5))


def _grey(planes: Tensor) -> Tensor:
    red, green, blue = planes
    return torch.mul(red, LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).add_(0.5).floor_()
