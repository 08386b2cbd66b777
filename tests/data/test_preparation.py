import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from captioner.data import images
from captioner.data.preparation import Preparation


@pytest.mark.parametrize(
    ("limits", "width", "height", "target"),
    [
        ({"size": 32}, 100, 50, (32, 32)),
        ({"size": 32}, 1, 1, (32, 32)),
        ({"max_side": 50}, 200, 100, (50, 25)),
        ({"max_side": 50}, 100, 200, (25, 50)),
        ({"max_side": 50}, 50, 30, (50, 30)),
        ({"max_side": 50}, 10, 5, (10, 5)),
        ({"max_side": 50, "enlarge": True}, 10, 5, (50, 25)),
        ({"max_side": 50}, 1000, 1, (50, 1)),
        ({"max_pixels": 5000}, 200, 100, (100, 50)),
        ({"max_pixels": 5000}, 70, 70, (70, 70)),
        ({"max_pixels": 16}, 5, 5, (4, 4)),
        ({"max_pixels": 10}, 1000, 1, (10, 1)),
        ({"max_pixels": 10}, 1, 100_000, (1, 10)),
        ({"max_pixels": 1}, 9, 7, (1, 1)),
        ({"max_side": 90, "max_pixels": 5000}, 200, 100, (90, 45)),
        ({"max_side": 190, "max_pixels": 5000}, 200, 100, (100, 50)),
    ],
)
def test_the_target_of_an_image(limits, width, height, target):
    assert Preparation(**limits).target(width, height) == target


def test_no_target_passes_its_limits():
    generator = np.random.default_rng(0)
    for width, height, most in generator.integers(1, 4000, (2000, 3)).tolist():
        across, down = Preparation(max_pixels=most).target(width, height)
        assert 1 <= across <= width
        assert 1 <= down <= height
        assert across * down <= most
        assert max(Preparation(max_side=most).target(width, height)) <= most


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"size": 9, "max_side": 9},
        {"size": 9, "max_pixels": 9},
        {"size": 0},
        {"size": -1},
        {"max_side": 0},
        {"max_pixels": 0},
        {"max_side": 9, "max_pixels": -1},
        {"enlarge": True},
        {"size": 9, "enlarge": True},
        {"max_pixels": 9, "enlarge": True},
    ],
)
def test_a_preparation_that_contradicts_itself_is_refused(fields):
    with pytest.raises(ValueError, match=r"size|side"):
        Preparation(**fields)


def test_an_image_that_is_small_enough_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    for preparation in (Preparation(max_side=40), Preparation(max_pixels=1200)):
        np.testing.assert_array_equal(
            images.decode(sink.getvalue(), preparation).pixels_HW3, pixels
        )


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_turned_image_keeps_its_aspect_and_its_limit(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    sink = io.BytesIO()
    Image.new("RGB", (400, 200)).save(sink, "JPEG", exif=exif)
    pixels_HW3 = images.decode(sink.getvalue(), Preparation(max_pixels=5000)).pixels_HW3
    assert pixels_HW3 is not None
    assert pixels_HW3.shape == ((50, 100, 3) if orientation == 1 else (100, 50, 3))
    assert pixels_HW3.flags.c_contiguous


def test_a_number_is_a_square():
    sink = io.BytesIO()
    Image.linear_gradient("L").save(sink, "PNG")
    square, number = (
        images.decode(sink.getvalue(), each).pixels_HW3 for each in (Preparation(size=24), 24)
    )
    assert square is not None
    np.testing.assert_array_equal(square, number)


def test_a_preparation_is_unpickled_without_torch():
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer), 'torch' in sys.modules)"
    preparation = Preparation(max_side=90, max_pixels=5000)
    ran = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(preparation), capture_output=True
    )
    assert ran.stdout.decode() == f"{preparation} False\n", ran.stderr
