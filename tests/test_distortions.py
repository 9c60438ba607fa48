import numpy as np
import pytest
from PIL import Image, ImageFilter

from distortions import DISTORTIONS, UNSEEN, blurred, foggy, lowlight, noisy, rainy, resized, sunny

KINDS = sorted(DISTORTIONS | UNSEEN)
RANDOM_KINDS = ["foggy", "noisy", "rainy", "motionblur", "colournoise"]


def photo(width=250, height=250, seed=0):
    """Soft colours with fine detail over them, all values in 30..225."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(50, 206, (5, 5, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR), float)
    detail = Image.fromarray(generator.integers(0, 256, (height, width), dtype=np.uint8))
    detail = np.asarray(detail.filter(ImageFilter.BoxBlur(1)), float)[..., None] - 127
    return Image.fromarray((pixels + 0.5 * detail).clip(30, 225).astype(np.uint8))


def grey(value, width=250, height=250):
    return Image.new("RGB", (width, height), (value, value, value))


def distort(kind, image, severity, seed=1):
    return (DISTORTIONS | UNSEEN)[kind](image, severity, np.random.default_rng(seed))


def distance(first, second):
    return np.abs(np.asarray(first, float) - np.asarray(second, float)).mean()


def edges(image):
    """Mean step between neighbouring pixels: the high frequencies."""
    return np.abs(np.diff(np.asarray(image, float), axis=1)).mean()


def white_and_black_share(image):
    pixels = np.asarray(image)
    return (pixels == 255).all(2).mean(), (pixels == 0).all(2).mean()


def test_the_table_names_the_seven_kinds_in_alphabetical_order():
    assert list(DISTORTIONS) == ["blurred", "foggy", "lowlight", "noisy", "rainy", "resized", "sunny"]
    assert [kind.__name__ for kind in DISTORTIONS.values()] == list(DISTORTIONS)


def test_no_kind_for_testing_is_one_to_train_on():
    assert [kind.__name__ for kind in UNSEEN.values()] == list(UNSEEN)
    assert not DISTORTIONS.keys() & UNSEEN.keys() and not set(DISTORTIONS.values()) & set(UNSEEN.values())


def test_motion_blur_spreads_a_point_along_a_line_and_keeps_its_light():
    point = grey(0)
    point.putpixel((125, 125), (255, 255, 255))
    pixels = np.asarray(distort("motionblur", point, 0.5), float)[..., 0]
    rows, columns = pixels.nonzero()
    assert 13 <= len(rows) <= 15 and np.ptp(columns) >= np.ptp(rows)  # 9 + 12 / 2 px, up to 45 degrees from level
    assert pixels.sum() == pytest.approx(255, abs=0.5 * 15)


def test_pixelated_makes_squares_of_one_colour():
    pixels = np.asarray(distort("pixelated", photo(), 1.0), float)  # squares of 8 px
    assert (np.abs(np.diff(pixels, axis=1)).sum((0, 2)) > 0).sum() <= 250 / 8


def test_gammadark_darkens_the_shadows_more_than_the_lights():
    dark, light = (np.asarray(distort("gammadark", grey(value), 0.5)).max() / value for value in (60, 200))
    assert dark == pytest.approx((60 / 255) ** 2.5, abs=0.01) and light == pytest.approx((200 / 255) ** 2.5, abs=0.01)


def test_colour_noise_is_of_its_deviation_and_differs_between_the_channels():
    pixels = np.asarray(distort("colournoise", grey(128), 0.5), float)
    assert pixels.std() / 255 == pytest.approx(0.16, abs=0.01)
    assert abs(np.corrcoef(pixels[..., 0].ravel(), pixels[..., 1].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_generator_gives_the_same_pixels(kind):
    assert distance(distort(kind, photo(), 0.6, seed=5), distort(kind, photo(), 0.6, seed=5)) == 0


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_another_generator_gives_other_pixels(kind):
    assert distance(distort(kind, photo(), 0.6, seed=5), distort(kind, photo(), 0.6, seed=6)) > 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(250, 250), (40, 40), (8, 8), (31, 97), (97, 31), (301, 400)])
def test_any_size_stays_rgb_and_as_large_as_it_was(kind, size):
    for severity in (0, 0.5, 1):
        image = distort(kind, photo(*size), severity)
        assert (image.size, image.mode) == (size, "RGB")


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_image_is_left_as_it_was(kind):
    image = photo()
    distort(kind, image, 1.0)
    assert image.tobytes() == photo().tobytes()


@pytest.mark.parametrize("kind", DISTORTIONS)
@pytest.mark.parametrize("size", [(250, 250), (160, 220), (100, 100)])
def test_the_distance_to_the_original_grows_with_severity(kind, size):
    image = photo(*size)
    distances = [distance(distort(kind, image, severity), image) for severity in (0, 0.25, 0.5, 0.75, 1)]
    assert distances[0] > 0, "the mildest one must still be seen"
    assert distances == sorted(set(distances))


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_a_tiny_photo_is_changed_by_the_heaviest_and_never_less_than_by_a_milder_one(kind):
    image = photo(40, 40)
    distances = [distance(distort(kind, image, severity), image) for severity in (0, 0.5, 1)]
    assert distances == sorted(distances) and distances[-1] > 1.5 * distances[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("severity", [-0.01, 1.01, float("nan")])
def test_a_severity_outside_0_to_1_is_refused(kind, severity):
    with pytest.raises(ValueError, match=r"severity=.*: expected a number in 0\.\.1"):
        distort(kind, photo(), severity)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_is_not_rgb_is_refused_with_the_way_out(kind):
    with pytest.raises(ValueError, match=r"mode L: expected RGB; call image\.convert"):
        distort(kind, photo().convert("L"), 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_severity_from_numpy_works_as_well(kind):
    assert distance(distort(kind, photo(), np.float64(0.5)), distort(kind, photo(), 0.5)) < 0.01  # rounding


def test_lowlight_keeps_three_tenths_of_the_brightness_at_half_severity():
    image = photo()
    expected = 0.3 * np.asarray(image, float)
    assert np.abs(np.asarray(lowlight(image, 0.5, np.random.default_rng(0))) - expected).max() <= 0.5 + 1e-9


def test_sunny_burns_the_centre_white_and_leaves_the_corners_untouched():
    image = photo()
    before, after = np.asarray(image), np.asarray(sunny(image, 0.5, np.random.default_rng(0)))
    y, x = np.mgrid[:250, :250] + 0.5
    radius = np.hypot(x - 125, y - 125) / 250
    assert (after[radius < 0.299] == 255).all()
    assert (after[radius > 0.401] == before[radius > 0.401]).all()
    ring = (radius > 0.32) & (radius < 0.38)
    assert (after[ring] > before[ring]).all() and (after[ring] < 255).all()


def test_sunny_is_a_circle_on_a_photo_that_is_not_square():
    white = (np.asarray(sunny(grey(100, 300, 200), 0.5, np.random.default_rng(0))) == 255).all(2)
    assert white.any(0).sum() == white.any(1).sum() == pytest.approx(2 * 0.30 * 200, abs=2)


def test_noisy_turns_four_to_ten_percent_of_the_pixels_black_or_white_in_equal_parts():
    image = photo()
    for severity, share in ((0.2, 0.04), (0.5, 0.07), (0.8, 0.10)):
        after = noisy(image, severity, np.random.default_rng(3))
        white, black = white_and_black_share(after)
        assert white == pytest.approx(share / 2, abs=0.004) and black == pytest.approx(share / 2, abs=0.004)
        changed = (np.asarray(after) != np.asarray(image)).any(2).mean()
        assert changed == pytest.approx(white + black, abs=1e-9), "every other pixel stays"


def test_noisy_grains_grow_on_a_large_photo_so_that_shrinking_it_keeps_them():
    large = noisy(grey(128, 1000, 1000), 0.5, np.random.default_rng(3)).resize((250, 250), Image.Resampling.BOX)
    assert sum(white_and_black_share(large)) == pytest.approx(0.07, abs=0.01)


def test_foggy_is_half_the_image_and_half_a_bright_smooth_haze():
    image = photo()
    after = np.asarray(foggy(image, 0.5, np.random.default_rng(2)), float)
    haze = (after - 0.5 * np.asarray(image, float)) / 0.5 / 255
    assert haze.min() > 0.72 - 0.005 and haze.max() < 0.88 + 0.005
    assert haze.std() > 0.01, "the haze has clouds"
    assert np.abs(np.diff(haze.mean(2), axis=1)).max() < 0.01, "and no edges"


def test_foggy_raises_the_darkest_pixel_and_lowers_the_contrast():
    image, fog = photo(), foggy(photo(), 0.3, np.random.default_rng(2))
    assert np.asarray(fog).min() > np.asarray(image).min() + 40
    assert np.asarray(fog).std() < 0.75 * np.asarray(image).std()


@pytest.mark.parametrize("lose_detail", [blurred, resized])
def test_blurred_and_resized_lose_the_high_frequencies_but_not_the_colours(lose_detail):
    image = photo()
    after = lose_detail(image, 0.5, np.random.default_rng(0))
    assert edges(after) < 0.35 * edges(image)
    assert np.asarray(after).mean((0, 1)) == pytest.approx(np.asarray(image).mean((0, 1)), abs=1.5)


@pytest.mark.parametrize("side", [125, 250, 500])
def test_blurred_spreads_a_point_with_a_radius_that_follows_the_side(side):
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[:, side // 2 :] = 255  # a step: its slope at the edge is 255 / (radius sqrt(2 pi))
    slope = np.diff(np.asarray(blurred(Image.fromarray(pixels), 0.5, np.random.default_rng(0)))[0, :, 0].astype(float))
    assert 255 / slope.max() / np.sqrt(2 * np.pi) == pytest.approx(3.25 * side / 250, rel=0.12)


def test_resized_by_five_equals_going_down_to_50_pixels_and_up_again():
    image = photo()
    small = image.resize((50, 50), Image.Resampling.BILINEAR)
    expected = small.resize((250, 250), Image.Resampling.BILINEAR)
    assert distance(resized(image, 0.5, np.random.default_rng(0)), expected) == 0


def test_rainy_darkens_everything_between_the_streaks():
    pixels = np.asarray(rainy(grey(150), 0.5, np.random.default_rng(0)))
    background = round(0.79 * 150 - 0.06 * 255)
    assert (pixels == background).mean() > 0.6, "most of the frame"
    assert pixels.min() == background, "nothing is darker than the formula"
    assert pixels.mean() < 150


def test_rainy_streaks_are_bright_long_downwards_and_thin_sideways():
    pixels = np.asarray(rainy(grey(150), 0.0, np.random.default_rng(0)))[..., 0].astype(float)
    bright = pixels > pixels.min() + 10
    assert pixels.max() > pixels.min() + 50
    assert 0.04 < bright.mean() < 0.12  # 0.8 % of the pixels seed a streak of 12
    below = (bright[:-4] & bright[4:]).sum() + (bright[:-4, :-1] & bright[4:, 1:]).sum()
    beside = (bright[:, :-4] & bright[:, 4:]).sum()
    assert below > 4 * beside


def test_rainy_streaks_lean_to_one_side():
    pixels = np.asarray(rainy(grey(150), 0.0, np.random.default_rng(0)))[..., 0]
    bright = pixels > pixels.min() + 10
    right = (bright[:-10, :-2] & bright[10:, 2:]).sum()
    left = (bright[:-10, 2:] & bright[10:, :-2]).sum()
    chance = bright.mean() ** 2 * bright[10:, 2:].size  # two streaks that happen to lie so
    assert right - chance > 5 * abs(left - chance)


def test_rainy_looks_alike_on_a_small_and_a_large_copy_of_a_photo():
    small = rainy(grey(150, 250, 250), 0.5, np.random.default_rng(0))
    large = rainy(grey(150, 1000, 1000), 0.5, np.random.default_rng(0)).resize((250, 250), Image.Resampling.BOX)
    assert distance(small, large) < 6 < distance(small, rainy(grey(150), 0.5, np.random.default_rng(1)))
