"""The distortions: what holds for every kind in the tables, so for a new one too, and what each looks like."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from distortions import DISTORTIONS, UNSEEN

KINDS = DISTORTIONS | UNSEEN


def photo(width=250, height=250):
    """Soft colours with fine detail over them, all values in 30..225."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(50, 206, (5, 5, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR), float)
    detail = Image.fromarray(generator.integers(0, 256, (height, width), dtype=np.uint8))
    detail = np.asarray(detail.filter(ImageFilter.BoxBlur(1)), float)[..., None] - 127
    return Image.fromarray((pixels + 0.5 * detail).clip(30, 225).astype(np.uint8))


def grey(value, width=250, height=250):
    return Image.new("RGB", (width, height), (value, value, value))


def distort(kind, image, severity, seed=1):
    return KINDS[kind](image, severity, np.random.default_rng(seed))


def pixels_of(kind, image, severity=0.5):
    return np.asarray(distort(kind, image, severity), float)


def distance(first, second):
    return np.abs(np.asarray(first, float) - np.asarray(second, float)).mean()


def test_each_kind_is_named_as_its_function_and_none_for_testing_is_one_to_train_on():
    assert [kind.__name__ for kind in KINDS.values()] == [*DISTORTIONS, *UNSEEN]
    assert len(set(KINDS.values())) == len(DISTORTIONS) + len(UNSEEN)


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_decides_the_pixels_unless_a_kind_says_that_it_is_deterministic(kind):
    generator = np.random.default_rng(5)
    before = generator.bit_generator.state
    first = KINDS[kind](photo(), 0.6, generator)
    assert (generator.bit_generator.state == before) == ("Deterministic." in KINDS[kind].__doc__)
    assert distance(first, distort(kind, photo(), 0.6, seed=5)) == 0
    assert (distance(first, distort(kind, photo(), 0.6, seed=6)) > 0.5) == (generator.bit_generator.state != before)


@pytest.mark.parametrize("kind", KINDS)
def test_any_size_stays_rgb_and_as_large_as_it_was_and_the_input_is_left_alone(kind):
    for size in ((40, 40), (8, 8), (31, 97), (301, 400)):
        image = photo(*size)
        for severity in (0, np.float64(0.5), 1):
            distorted = distort(kind, image, severity)
            assert (distorted.size, distorted.mode) == (size, "RGB")
        assert image.tobytes() == photo(*size).tobytes()


@pytest.mark.parametrize("kind", DISTORTIONS)
@pytest.mark.parametrize("size", [(250, 250), (160, 220), (100, 100)])
def test_the_mildest_shows_and_the_distance_to_the_original_grows_with_severity(kind, size):
    image = photo(*size)
    distances = [distance(distort(kind, image, severity), image) for severity in (0, 0.25, 0.5, 0.75, 1)]
    assert distances[0] > 0 and distances == sorted(set(distances))


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_a_tiny_photo_is_changed_by_the_heaviest_and_never_less_than_by_a_milder_one(kind):
    image = photo(40, 40)
    distances = [distance(distort(kind, image, severity), image) for severity in (0, 0.5, 1)]
    assert distances == sorted(distances) and distances[-1] > 1.5 * distances[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_severity_outside_0_to_1_and_an_image_that_is_not_rgb_are_refused(kind):
    for severity in (-0.01, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"severity=.*: expected a number in 0\.\.1"):
            distort(kind, photo(), severity)
    with pytest.raises(ValueError, match=r"mode L: expected RGB; call image\.convert"):
        distort(kind, photo().convert("L"), 0.5)


@pytest.mark.parametrize("side", [125, 250, 500])
def test_blurred_spreads_an_edge_with_a_radius_that_follows_the_side(side):
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[:, side // 2 :] = 255  # a step: its slope at the edge is 255 / (radius sqrt(2 pi))
    slope = np.diff(pixels_of("blurred", Image.fromarray(pixels))[0, :, 0])
    assert 255 / slope.max() / np.sqrt(2 * np.pi) == pytest.approx(3.25 * side / 250, rel=0.12)


def test_foggy_is_half_the_image_and_half_a_bright_smooth_haze():
    haze = (pixels_of("foggy", photo()) - 0.5 * np.asarray(photo(), float)) / 0.5 / 255
    assert haze.min() > 0.72 - 0.005 and haze.max() < 0.88 + 0.005
    assert haze.std() > 0.01, "the haze has clouds"
    assert np.abs(np.diff(haze.mean(2), axis=1)).max() < 0.01, "and no edges"


def test_lowlight_keeps_three_tenths_of_the_brightness_and_gammadark_less_of_the_shadows_at_half_severity():
    assert np.abs(pixels_of("lowlight", photo()) - 0.3 * np.asarray(photo(), float)).max() <= 0.5 + 1e-9
    for value in (60, 200):
        assert pixels_of("gammadark", grey(value)).max() / value == pytest.approx((value / 255) ** 2.5, abs=0.01)


def black_and_white(image):
    """Shares of black and of white pixels."""
    return [(np.asarray(image) == value).all(2).mean() for value in (0, 255)]


def test_noisy_turns_four_to_ten_percent_of_the_pixels_black_or_white_in_equal_parts():
    for severity, share in ((0.2, 0.04), (0.8, 0.10)):
        after = distort("noisy", photo(), severity)
        assert black_and_white(after) == pytest.approx([share / 2, share / 2], abs=0.004)
        changed = (np.asarray(after) != np.asarray(photo())).any(2).mean()
        assert changed == pytest.approx(sum(black_and_white(after)), abs=1e-9), "every other pixel stays"
    large = distort("noisy", grey(128, 1000, 1000), 0.5).resize((250, 250), Image.Resampling.BOX)
    assert sum(black_and_white(large)) == pytest.approx(0.07, abs=0.01), "grains grow, so shrinking keeps them"


def test_rainy_darkens_everything_between_the_streaks():
    pixels, background = pixels_of("rainy", grey(150)), round(0.79 * 150 - 0.06 * 255)
    assert (pixels == background).mean() > 0.6 and pixels.min() == background and pixels.mean() < 150


def test_rainy_streaks_are_bright_long_downwards_thin_sideways_and_lean_to_one_side():
    pixels = pixels_of("rainy", grey(150), severity=0)[..., 0]
    bright = pixels > pixels.min() + 10
    assert pixels.max() > pixels.min() + 50
    assert 0.04 < bright.mean() < 0.12  # 0.8 % of the pixels seed a streak of 12
    below = (bright[:-4] & bright[4:]).sum() + (bright[:-4, :-1] & bright[4:, 1:]).sum()
    assert below > 4 * (bright[:, :-4] & bright[:, 4:]).sum()
    right, left = (bright[:-10, :-2] & bright[10:, 2:]).sum(), (bright[:-10, 2:] & bright[10:, :-2]).sum()
    chance = bright.mean() ** 2 * bright[10:, 2:].size  # two streaks that happen to lie so
    assert right - chance > 5 * abs(left - chance)


def test_rainy_looks_alike_on_a_small_and_a_large_copy_of_a_photo():
    small, other = (distort("rainy", grey(150), 0.5, seed=seed) for seed in (0, 1))
    large = distort("rainy", grey(150, 1000, 1000), 0.5, seed=0).resize((250, 250), Image.Resampling.BOX)
    assert distance(small, large) < 6 < distance(small, other)


def test_resized_by_five_equals_going_down_to_50_pixels_and_up_again():
    small = photo().resize((50, 50), Image.Resampling.BILINEAR)
    assert distance(distort("resized", photo(), 0.5), small.resize((250, 250), Image.Resampling.BILINEAR)) == 0


def test_sunny_burns_the_centre_white_and_leaves_the_corners_untouched():
    before, after = np.asarray(photo()), pixels_of("sunny", photo())
    y, x = np.mgrid[:250, :250] + 0.5
    radius = np.hypot(x - 125, y - 125) / 250
    assert (after[radius < 0.299] == 255).all() and (after[radius > 0.401] == before[radius > 0.401]).all()
    ring = (radius > 0.32) & (radius < 0.38)
    assert (after[ring] > before[ring]).all() and (after[ring] < 255).all()
    white = (pixels_of("sunny", grey(100, 300, 200)) == 255).all(2)  # a circle on an oblong photo too
    assert white.any(0).sum() == white.any(1).sum() == pytest.approx(2 * 0.30 * 200, abs=2)


def test_motionblur_spreads_a_point_along_a_line_and_keeps_its_light():
    point = grey(0)
    point.putpixel((125, 125), (255, 255, 255))
    pixels = pixels_of("motionblur", point)[..., 0]
    rows, columns = pixels.nonzero()
    assert 13 <= len(rows) <= 15 and np.ptp(columns) >= np.ptp(rows)  # 9 + 12 / 2 px, up to 45 degrees from level
    assert pixels.sum() == pytest.approx(255, abs=0.5 * 15)


def test_pixelated_makes_squares_of_one_colour():
    steps = np.abs(np.diff(pixels_of("pixelated", photo(), severity=1), axis=1)).sum((0, 2))  # squares of 8 px
    assert (steps > 0).sum() <= 250 / 8


def test_colournoise_is_of_its_deviation_and_differs_between_the_channels():
    pixels = pixels_of("colournoise", grey(128))
    assert pixels.std() / 255 == pytest.approx(0.16, abs=0.01)
    assert abs(np.corrcoef(pixels[..., 0].ravel(), pixels[..., 1].ravel())[0, 1]) < 0.02
