"""Every format, depth and transparency is decoded to the picture that the file was made from."""

import io

import conformance
import numpy as np
import PIL
import pytest

CASES = {case.name: case for case in conformance.cases()}


def test_the_names_differ():
    assert len(CASES) == len(conformance.cases()) >= 200


@pytest.mark.parametrize("name", CASES)
def test_the_picture_is_decoded(name):
    case = CASES[name]
    if case.kind == "JPEG 2000" or (case.kind == "AVIF" and "8 bits" not in case.content):
        pytest.importorskip("imagecodecs")
    if name.startswith("TIFF, YCbCr") and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow reads uncompressed YCbCr since version 13")
    assert case.worst() <= case.slack


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, case in CASES.items()
        if case.kind == "TIFF" and case.samples is not None and "64-bit" not in name
    ],
)
def test_a_second_decoder_finds_the_same_samples_in_a_tiff(name):
    """The files are what the specification says: tifffile reads them alike."""
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    case = CASES[name]
    try:
        found = tifffile.imread(io.BytesIO(case.make()))
    except (ValueError, NotImplementedError) as error:
        pytest.skip(f"tifffile does not read it: {error}")
    if "planes" in name:
        found = np.moveaxis(found, 0, -1)
    expected = case.samples
    if found.dtype.kind == "f":
        expected = expected.view(f"f{expected.dtype.itemsize}")
    elif "24 bits" in name:  # which it puts into the high bytes of 32
        found = found >> 8
    elif found.dtype.kind == "i":
        expected = expected.astype(np.int64)
    np.testing.assert_array_equal(found, expected.reshape(found.shape))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.kind == "PNG"])
def test_a_second_decoder_shows_the_same_png(name):
    """libpng, by imagecodecs, expands depths, palettes and transparent colours."""
    imagecodecs = pytest.importorskip("imagecodecs")
    case = CASES[name]
    theirs = imagecodecs.png_decode(case.make())
    theirs = theirs / (257 if theirs.dtype == np.uint16 else 1)
    channels = theirs.shape[2] if theirs.ndim == 3 else 1
    theirs = theirs.reshape(*case.expected.shape[:2], channels)
    alpha = theirs[..., -1] if channels in (2, 4) else np.full(theirs.shape[:2], 255)
    shown = conformance.over_white(theirs[..., : 3 if channels > 2 else 1], alpha)
    expected = case.expected if case.expected.ndim == 3 else case.expected[..., None]
    assert np.abs(shown - expected).max() <= 2


def test_the_page_of_formats_is_current():
    """``python tests/data/formats/conformance.py`` writes it."""
    assert conformance.PAGE.read_text() == conformance.page()
