"""Views of a training image: itself, its mirror image, crops, changed colours."""

import math
import random
from dataclasses import replace

import numpy as np

from captioner import storage
from captioner.data import images
from captioner.data.preparation import Preparation

__all__ = ["load_view"]

_LEAST_CROP = 0.7  # of the height and of the width


_LARGEST_CHANGE = 0.35  # of brightness, contrast and saturation


_ERASED = 0.6  # of the views


_ERASED_AREA = (0.02, 0.12)  # of the image


_LUMA = np.array((0.299, 0.587, 0.114), np.float32)


def load_view(
    uri: str, preparation: Preparation | int, view: int, augmentation: str = "crops"
) -> np.ndarray | None:
    """One of the versions of an image that are trained on: pixels ``(size, size, 3)``.

    The preparation is a square; a number is a square of so many pixels a side.

    View 0 is the image itself. Odd views are mirrored; from view 2 on they are crops, chosen by the
    view's number and the file's name. With ``strong`` augmentation these crops differ in
    brightness, contrast and saturation too (not in hue: captions name colours), and most have a
    rectangle erased (Zhong et al. 2017). None where the image cannot be read or decoded.
    """
    try:
        data = storage.read(uri)
    except OSError:
        return None
    return _decode_view(data, uri, preparation, view, augmentation)


def _decode_view(
    data: bytes, uri: str, preparation: Preparation | int, view: int, augmentation: str
) -> np.ndarray | None:
    if isinstance(preparation, int):
        preparation = Preparation(size=preparation)
    size = preparation.size
    assert size is not None, "views are squares"
    if view < 2:
        pixels_HW3 = images.decode(data, preparation).pixels_HW3
    else:
        generator = random.Random(f"{view} {uri.rsplit('/', 1)[-1]}")  # noqa: S311
        enlarged = round(size / generator.uniform(_LEAST_CROP, 1))
        pixels_HW3 = images.decode(data, replace(preparation, size=enlarged)).pixels_HW3
        if pixels_HW3 is not None:
            top, left = (generator.randint(0, enlarged - size) for _ in range(2))
            pixels_HW3 = pixels_HW3[top : top + size, left : left + size]
            if augmentation == "strong":
                pixels_HW3 = _change(pixels_HW3, generator)
    if pixels_HW3 is not None and view % 2:
        pixels_HW3 = pixels_HW3[:, ::-1]
    return None if pixels_HW3 is None else np.ascontiguousarray(pixels_HW3)


def _change(pixels_HW3: np.ndarray, generator: random.Random) -> np.ndarray:
    brightness, contrast, saturation = (
        generator.uniform(1 - _LARGEST_CHANGE, 1 + _LARGEST_CHANGE) for _ in range(3)
    )
    grey_HW1 = (pixels_HW3 @ _LUMA)[..., None]
    values_HW3 = grey_HW1 + (pixels_HW3 - grey_HW1) * saturation
    middle = grey_HW1.mean()
    values_HW3 = (middle + (values_HW3 - middle) * contrast) * brightness
    if generator.random() < _ERASED:
        size = len(values_HW3)
        area, aspect = generator.uniform(*_ERASED_AREA), generator.uniform(0.5, 2)
        height, width = (round(size * math.sqrt(area * each)) for each in (aspect, 1 / aspect))
        top, left = generator.randint(0, size - height), generator.randint(0, size - width)
        values_HW3[top : top + height, left : left + width] = 127
    changed: np.ndarray = values_HW3.clip(0, 255).astype(np.uint8)
    return changed
