import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from PIL import Image
from torchvision.transforms import Resize

from captioner.output import attention

LEVELS = [15, 31, 63, 127, 255]

# Powers of two are exact, so that these bytes are the codec's definition, not a machine's rounding.
MAPS = np.array(
    [
        [[0.5, 0.25, 0.0], [0.125, 0.375, 0.4375], [0.0625, 0.03125, 0.46875]],
        [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]],
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
    ],
    np.float32,
)
GOLDEN = {
    127: "7f4000205f6f100877" + "000000007f00000000" + "000000000000000000",
    255: "ff800040bfdf2010ef" + "00000000ff00000000" + "000000000000000000",
    15: "0f0800040b0d02010e" + "000000000f00000000" + "000000000000000000",
}


@pytest.mark.parametrize("levels", GOLDEN)
def test_the_bytes_are_those_of_version_1(levels):
    data, peaks = attention.encode(MAPS, levels)
    assert data.hex() == GOLDEN[levels]
    assert peaks == [0.5, 1.0, 0.0]


def test_the_usual_number_of_levels_is_127():
    assert attention.encode(MAPS) == attention.encode(MAPS, 127)
    data, peaks = attention.encode(MAPS)
    np.testing.assert_array_equal(
        attention.decode(data, peaks), attention.decode(data, peaks, grid=3, levels=127)
    )


def test_golden_bytes_are_read_back():
    maps = attention.decode(bytes.fromhex(GOLDEN[127]), [0.5, 1.0, 0.0])
    assert maps.dtype == np.float32
    assert maps.shape == (3, 3, 3)
    assert maps[0, 0, 0] == 0.5
    assert maps[0, 0, 1] == pytest.approx(64 * 0.5 / 127)
    assert maps[1, 1, 1] == 1
    assert maps[1].sum() == 1
    assert not maps[2].any()


@settings(deadline=None)
@given(
    data=st.data(),
    shape=st.tuples(st.integers(0, 6), *[st.shared(st.integers(1, 16), key="grid")] * 2),
    levels=st.sampled_from(LEVELS),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_a_value_is_off_by_half_a_level_at_most(data, shape, levels, dtype):
    width = np.dtype(dtype).itemsize * 8
    values = st.floats(0, 1, width=min(width, 32))
    maps = data.draw(arrays.arrays(dtype, shape, elements=values, fill=values))
    stored, peaks = attention.encode(maps, levels)
    assert len(stored) == maps.size
    assert peaks == [float(map_GG.max()) for map_GG in maps]
    read = attention.decode(stored, peaks, levels=levels)
    assert read.dtype == np.float32
    assert read.shape == (shape if shape[0] else (0, 0, 0))
    for map_GG, read_GG, peak in zip(maps.astype(np.float64), read, peaks, strict=True):
        rounding = 4 * np.finfo(np.float32).eps * peak + np.finfo(np.float32).tiny
        assert np.abs(map_GG - read_GG).max() <= peak / (2 * levels) + rounding


@pytest.mark.parametrize("levels", LEVELS)
def test_the_bound_is_reached(levels):
    """Half-way between two steps: a codec that rounded down, or to fewer levels, would be off."""
    steps = (np.arange(levels) + 0.5) / levels
    maps = np.append(steps, 1.0).astype(np.float32).reshape(1, 1, -1)
    data, _ = attention.encode(maps, levels)
    errors = np.abs(np.frombuffer(data, np.uint8) / levels - maps[0, 0])
    assert errors[:-1].max() == pytest.approx(1 / (2 * levels), rel=1e-4)


@pytest.mark.parametrize("levels", LEVELS)
def test_what_was_read_is_stored_the_same_again(levels):
    maps = np.random.default_rng(0).dirichlet(np.ones(49), 5).reshape(5, 7, 7)
    data, peaks = attention.encode(maps, levels)
    again, again_peaks = attention.encode(attention.decode(data, peaks, levels=levels), levels)
    assert again == data
    np.testing.assert_allclose(again_peaks, peaks, rtol=1e-6)


@pytest.mark.parametrize("levels", LEVELS)
def test_three_lines_of_numpy_read_the_maps(levels):
    maps = np.random.default_rng(1).dirichlet(np.ones(196), 9).reshape(9, 14, 14)
    data, peaks = attention.encode(maps, levels)
    row, grid = {"attention": data, "attention_peak": peaks}, 14

    quantised = np.frombuffer(row["attention"], np.uint8).reshape(-1, grid, grid)
    peak = np.array(row["attention_peak"], np.float32)
    read = quantised * (peak / np.float32(levels))[:, None, None]

    decoded = attention.decode(data, peaks, grid=14, levels=levels)
    assert read.dtype == decoded.dtype
    np.testing.assert_array_equal(read, decoded)


def test_a_caption_without_words_has_no_bytes():
    assert attention.encode(np.zeros((0, 14, 14))) == (b"", [])
    assert attention.decode(b"", [], grid=14).shape == (0, 14, 14)
    assert attention.decode(b"", []).shape == (0, 0, 0)


def test_tiny_values_do_not_overflow():
    maps = np.full((1, 2, 2), np.finfo(np.float32).smallest_subnormal)
    data, peaks = attention.encode(maps)
    assert data == b"\x7f" * 4
    assert peaks == [float(np.finfo(np.float32).smallest_subnormal)]


@pytest.mark.parametrize("value", [-1e-9, np.nan, np.inf, -np.inf])
def test_values_that_are_no_attention_are_refused(value):
    maps = np.full((2, 3, 3), 0.1)
    maps[1, 2, 0] = value
    with pytest.raises(ValueError, match=r"^attention maps must be finite and not negative$"):
        attention.encode(maps)


@pytest.mark.parametrize("levels", [0, -1, 256, 300])
def test_levels_that_a_byte_cannot_hold_are_refused(levels):
    with pytest.raises(ValueError, match=f"^levels must be from 1 to 255, not {levels}$"):
        attention.encode(MAPS, levels)


@pytest.mark.parametrize(
    ("size", "count", "grid"),
    [(26, 3, None), (27, 3, 2), (27, 2, 3), (1, 0, None), (0, 1, 3), (8, 1, None)],
)
def test_lengths_that_do_not_belong_together_are_refused(size, count, grid):
    with pytest.raises(ValueError, match=rf"^{size} bytes are not {count} maps of \d+×\d+$"):
        attention.decode(bytes(size), [0.5] * count, grid=grid)


# Maps over images.


def _map(grid: int = 7) -> np.ndarray:
    return np.random.default_rng(2).dirichlet(np.ones(grid * grid)).reshape(grid, grid)


def _notebook_heatmap(map_GG: np.ndarray, width: int, height: int) -> np.ndarray:
    """The notebook's ``T.Resize``, stretched as its ``plt.imshow`` does."""
    import torch

    enlarged = Resize((height, width))(torch.from_numpy(map_GG).float()[None])[0].numpy()
    return Normalize()(enlarged).filled()


@pytest.mark.parametrize("size", [(64, 64), (90, 40), (33, 70)])
def test_a_heatmap_is_the_notebooks(size):
    heat = attention.heatmap(_map(), size)
    assert heat.shape == size[::-1]
    assert (heat.min(), heat.max()) == (0, 1)
    np.testing.assert_allclose(heat, _notebook_heatmap(_map(), *size), atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_the_heatmap_of_a_map_without_a_peak_is_zero(value):
    heat = attention.heatmap(np.full((3, 3), value), (12, 9))
    assert heat.shape == (9, 12)
    assert not heat.any()


@pytest.mark.parametrize("size", [(64, 64), (90, 40), (33, 70)])
def test_an_overlay_is_the_notebooks(size):
    pixels = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    drawn = attention.overlay(Image.fromarray(pixels), _map())
    assert (drawn.size, drawn.mode) == (size, "RGB")
    viridis = ScalarMappable(Normalize(0, 1), "viridis")
    coloured = viridis.to_rgba(_notebook_heatmap(_map(), *size))[..., :3] * 255
    expected = 0.5 * coloured + 0.5 * pixels
    assert np.abs(np.asarray(drawn) - expected).max() <= 3


def test_the_word_is_seen_where_its_map_peaks():
    maps = np.zeros((4, 4))
    maps[3, 0] = 1
    drawn = np.asarray(attention.overlay(Image.new("RGB", (40, 40)), maps, alpha=1))
    high, low = (np.array(colormaps["viridis"](value)[:3]) * 255 for value in (1.0, 0.0))
    assert np.abs(drawn[-1, 0] - high).max() <= 1
    assert np.abs(drawn[0, -1] - low).max() <= 1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_an_overlay_of_any_mode_is_rgb(mode):
    image = Image.new("RGB", (20, 10), (10, 200, 30)).convert(mode)
    drawn = attention.overlay(image, _map(), alpha=0)
    assert (drawn.size, drawn.mode) == ((20, 10), "RGB")
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(image.convert("RGB")))
