"""The families of degradations: what holds for each, so for a new one too; and the chains that are drawn of them."""

import itertools
import math
import pickle
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import write_photo
from PIL import Image
from test_distortions import distance, grey, photo

from common import UserError
from degradations import (
    FAMILIES,
    RandomDegradation,
    families_without,
    motion,
    out_of_focus,
    rain,
    validation_degradations,
)
from distortions import DISTORTIONS
from tools import degradation_sheet
from transforms import load_image


def degrade(family, image, severity, seed=1):
    return FAMILIES[family](image, severity, np.random.default_rng(seed))


# --- families ---------------------------------------------------------------------------------------------------------


def test_each_family_is_named_as_its_function():
    assert [family.__name__ for family in FAMILIES.values()] == [*FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_generator_decides_the_form_and_the_pixels(family):
    forms = [degrade(family, photo(), 0.7, seed) for seed in range(12)]
    assert all(distance(form, degrade(family, photo(), 0.7, seed)) == 0 for seed, form in enumerate(forms))
    assert len({form.tobytes() for form in forms}) >= 8  # loss of colour has no details, so two may be equal


@pytest.mark.parametrize("family", FAMILIES)
def test_any_size_stays_rgb_and_as_large_as_it_was_and_the_input_is_left_alone(family):
    for size in ((1, 1), (2, 40), (16, 16), (17, 300), (301, 97)):
        image = photo(*size)
        for seed in range(15):
            for severity in (0.0, np.float64(0.5), 1):
                degraded = degrade(family, image, severity, seed)
                assert (degraded.size, degraded.mode) == (size, "RGB")
        assert image.tobytes() == photo(*size).tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_on_average_the_mildest_is_barely_seen_and_each_step_of_severity_moves_the_pixels_further(family):
    image = photo(200, 240)
    distances = [
        np.mean([distance(degrade(family, image, severity, seed), image) for seed in range(40)])
        for severity in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert 0 < distances[0] < 8  # of 255
    assert all(later > 1.05 * earlier for earlier, later in itertools.pairwise(distances))
    assert distances[-1] > 9


@pytest.mark.parametrize("family", FAMILIES)
def test_no_single_photo_is_changed_much_less_by_a_higher_severity(family):
    image = photo(120, 120)
    for seed in range(40):
        mild, heavy = (distance(degrade(family, image, severity, seed), image) for severity in (0.2, 0.9))
        assert heavy > 0.9 * mild


@pytest.mark.parametrize("family", FAMILIES)
def test_a_photo_looks_alike_at_twice_its_size(family):
    """On grey: lengths follow the side, so that both copies of a photo are equally bad."""
    small, large = grey(120, 154, 154), grey(120, 308, 308)
    changes = [np.mean([distance(degrade(family, i, 0.6, seed), i) for seed in range(40)]) for i in (small, large)]
    assert changes[0] == pytest.approx(changes[1], rel=0.25, abs=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_severity_outside_0_to_1_and_an_image_that_is_not_rgb_are_refused(family):
    for severity in (-0.01, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"severity=.*: expected a number in 0\.\.1"):
            degrade(family, photo(), severity)
    with pytest.raises(ValueError, match=r"mode L: expected RGB; call image\.convert"):
        degrade(family, photo().convert("L"), 0.5)


def test_defocus_turns_a_point_into_a_disc_of_its_radius_and_keeps_its_light():
    points = np.zeros((320, 320, 3), np.uint8)
    points[156:165, 156:165] = 255  # 9 px square: a single pixel would fade below one level
    pixels = np.asarray(out_of_focus(Image.fromarray(points), 1.0, form=0, angle=0, narrow=1), float)[..., 0]
    assert pixels.sum() == pytest.approx(81 * 255, rel=0.03)
    y, x = np.mgrid[:320, :320] - 160.0
    spread = np.sqrt((pixels * (x**2 + y**2)).sum() / pixels.sum())
    assert spread == pytest.approx(16 / math.sqrt(2), rel=0.25)  # a disc of radius 5 % of 320


@pytest.mark.parametrize("angle", [0.0, 0.6, math.pi / 2, 2.5])
def test_motion_spreads_a_point_along_its_angle_alone_and_where_it_was(angle):
    points = np.zeros((200, 200, 3), np.uint8)
    points[98:103, 98:103] = 255
    pixels = np.asarray(motion(Image.fromarray(points), 0.8, angle), float)[..., 0]
    length = 0.01 * 18**0.8 * 200
    y, x = np.mgrid[:200, :200] - 100.0
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    deviation = [np.sqrt((pixels * part**2).sum() / pixels.sum()) for part in (along, across)]
    assert deviation[0] == pytest.approx(math.sqrt(length**2 / 12 + 2), rel=0.12)  # 2: of a square of 5 px
    assert deviation[1] < 2
    assert abs((pixels * along).sum() / pixels.sum()) < 1.5


def test_the_lowest_resolution_leaves_twenty_pixels_in_squares_or_smooth():
    squares = smooth = 0
    for seed in range(60):
        pixels = np.asarray(degrade("resolution", photo(308, 308), 1.0, seed), int)
        edges = (np.abs(np.diff(pixels, axis=1)).sum((0, 2)) > 0).sum()
        squares, smooth = squares + (edges <= 20), smooth + (edges > 200)
    assert squares + smooth == 60 and 10 < squares < 32  # nearest or box up: a third


def test_a_family_has_forms_of_opposite_direction():
    brightness = [np.asarray(degrade("exposure", grey(120), 0.8, seed), float).mean() for seed in range(60)]
    assert min(brightness) < 50 and max(brightness) > 200
    noisy = [np.asarray(degrade("noise", grey(120), 0.8, seed), float) for seed in range(30)]
    coloured = [bool((pixels.max(2) > pixels.min(2)).any()) for pixels in noisy]
    assert 5 < sum(coloured) < 25


def test_rain_leans_to_either_side_and_glare_lies_anywhere():
    centres = []
    for seed in range(60):
        light = np.asarray(degrade("glare", grey(20), 0.3, seed), float).sum(2) - 60
        y, x = np.mgrid[:250, :250] / 250
        centres.append([(light * x).sum() / light.sum(), (light * y).sum() / light.sum()])
    assert (np.min(centres, 0) < 0.25).all() and (np.max(centres, 0) > 0.75).all()
    leanings = []
    for seed in range(30):
        pixels = np.asarray(rain(grey(60), 0.3, np.random.default_rng(seed)), float)[..., 0]
        bright = pixels > pixels.min() + 30
        right, left = (bright[:-6, :-4] & bright[6:, 4:]).sum(), (bright[:-6, 4:] & bright[6:, :-4]).sum()
        leanings.append((right - left) / max(1, right + left))
    assert min(leanings) < -0.5 and max(leanings) > 0.5


# --- chains of them ---------------------------------------------------------------------------------------------------


class Recorder:
    """Families that change nothing and record (name, size, severity) of what they are given."""

    def __init__(self, names: str):
        self.seen: list[tuple[str, tuple[int, int], float]] = []
        self.families = {name: self.family(name) for name in names}

    def family(self, name: str):
        def degrade(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
            assert isinstance(severity, float) and isinstance(generator, np.random.Generator)
            self.seen.append((name, image.size, severity))
            return image.copy()

        return degrade

    def calls(self, times: int, *, probability=1.0, most=1, size=(8, 8), seed=0) -> list[list[tuple]]:
        """What each of `times` calls passed to the families."""
        degrade = RandomDegradation(self.families, probability, most, side=100)
        torch.manual_seed(seed)
        calls = []
        for _ in range(times):
            self.seen = []
            degrade(Image.new("RGB", size))
            calls.append(self.seen)
        return calls


def test_a_degradation_of_probability_0_returns_the_image_itself_in_its_size():
    image = photo(300, 200)
    degrade = RandomDegradation(FAMILIES, probability=0, most=4, side=100)
    assert all(degrade(image) is image for _ in range(200)) and image.size == (300, 200)


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_photos_are_degraded_with_the_given_probability(probability):
    calls = Recorder("ab").calls(1000, probability=probability)
    assert sum(map(bool, calls)) == pytest.approx(1000 * probability, abs=64)  # 4 standard deviations of at most 16


def test_a_chain_follows_torchs_seed_whatever_numpys_and_the_order_of_the_families_and_differs_by_call():
    def chain(families, seed):
        torch.manual_seed(seed)
        degrade = RandomDegradation(families, probability=1, most=4, side=120)
        return [degrade(photo()).tobytes() for _ in range(6)]

    first = chain(FAMILIES, 0)
    np.random.seed(1)
    assert len(set(first)) == 6
    assert chain(dict(reversed(FAMILIES.items())), 0) == first != chain(FAMILIES, 1)


def test_a_chain_is_the_same_after_a_journey_to_another_process():
    degrade = RandomDegradation(FAMILIES, probability=1, most=4, side=120)
    torch.manual_seed(0)
    here = degrade(photo()).tobytes()
    torch.manual_seed(0)
    assert pickle.loads(pickle.dumps(degrade))(photo()).tobytes() == here


@pytest.mark.parametrize("most", [1, 4])
def test_1_to_most_different_families_are_chained_in_any_order_each_number_equally_often(most):
    calls = [[name for name, *_ in call] for call in Recorder("abcd").calls(800, most=most)]
    assert all(len(set(call)) == len(call) for call in calls)
    numbers = Counter(map(len, calls))
    assert numbers == {number: pytest.approx(800 / most, abs=60) for number in range(1, most + 1)}
    for place in range(most):
        families = Counter(call[place] for call in calls if len(call) > place)
        assert set(families) == set("abcd") and min(families.values()) > 0.17 * families.total()  # a quarter each


def test_severities_fill_0_to_1_and_are_milder_the_more_families_are_chained():
    calls = Recorder("abcd").calls(1600, most=4)
    for number in range(1, 5):
        severities = np.array([severity for call in calls if len(call) == number for *_, severity in call])
        mean = 2 / (number + 3)  # of u^((n + 1) / 2)
        assert severities.mean() == pytest.approx(mean, abs=0.06)
        assert 0 <= severities.min() < 0.03 and 0.9 < severities.max() < 1
    assert all(len({severity for *_, severity in call}) == len(call) for call in calls)  # each family its own


def test_each_family_acts_on_the_result_of_the_one_before():
    def add(image, severity, generator):
        return image.point(lambda value: value + 1)

    torch.manual_seed(0)
    degrade = RandomDegradation(dict.fromkeys("abcd", add), probability=1, most=4, side=100)
    black = Image.new("RGB", (8, 8))
    assert {degrade(black).getpixel((3, 3)) for _ in range(100)} == {(n, n, n) for n in (1, 2, 3, 4)}


@pytest.mark.parametrize(
    "size, seen",
    [((300, 600), (100, 200)), ((5000, 120), (4167, 100)), ((100, 300), (100, 300)), ((99, 3000), (99, 3000))],
)
def test_a_photo_is_shrunk_until_its_shorter_side_has_no_more_than_side_pixels(size, seen):
    recorder = Recorder("ab")
    assert {shape for call in recorder.calls(5, size=size, most=2) for _, shape, _ in call} == {seen}
    assert RandomDegradation(recorder.families, 1, 1, side=100)(Image.new("RGB", size)).size == seen


def test_a_shrunk_photo_shows_the_same_scene():
    ramp = np.tile(np.linspace(0, 250, 400).astype(np.uint8)[None, :, None], (400, 1, 3))
    small = RandomDegradation(Recorder("a").families, 1, 1, side=50)(Image.fromarray(ramp))
    assert np.asarray(small)[25, ::10, 0] == pytest.approx(ramp[200, 4::80, 0], abs=4)


def test_families_left_out_are_never_drawn_and_a_name_that_none_has_is_refused():
    left = families_without(("glare", "weather"))
    assert [*left] == [name for name in FAMILIES if name not in ("glare", "weather")]
    assert families_without(()) == FAMILIES and families_without(()) is not FAMILIES
    for names in (("sunny",), "glare", ("blur", "sunny")):
        with pytest.raises(UserError, match=r"^WITHOUT_FAMILIES = .*: expected names of .*; there are blur, "):
            families_without(names)


@pytest.mark.parametrize("probability, most", [(-0.1, 1), (1.1, 1), (math.nan, 1), (0.5, 0), (0.5, 9)])
def test_a_degradation_out_of_range_is_refused_by_the_name_of_its_constant(probability, most):
    probable = f"DISTORT = {probability}: expected a probability" if probability != 0.5 else f"DISTORT_MOST = {most}: "
    with pytest.raises(UserError, match=probable):
        RandomDegradation(FAMILIES, probability, most, side=100)


def test_a_distortion_of_the_files_can_be_chained_too():
    dark = RandomDegradation({"lowlight": DISTORTIONS["lowlight"]}, probability=1, most=1, side=100)
    assert np.asarray(dark(grey(200, 50, 50))).max() <= 100


def test_a_photo_of_308_pixels_takes_a_few_milliseconds():
    degrade, image = RandomDegradation(FAMILIES, probability=1, most=4, side=308), photo(308, 308)
    torch.manual_seed(0)
    start = time.process_time()
    for _ in range(60):
        degrade(image)
    assert (time.process_time() - start) / 60 < 0.030  # 0.005 on one core of 2026; slack for a busy machine


# --- the sheet of samples ---------------------------------------------------------------------------------------------


@pytest.fixture
def sheet(monkeypatch, tmp_path):
    for name, value in {"COLUMNS": 2, "SIDE": 40, "CELL": 16, "REPEATS": 2, "OUT": tmp_path / "new" / "a.jpg"}.items():
        monkeypatch.setattr(degradation_sheet, name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # it would hold for the tests that follow
    return degradation_sheet


@pytest.mark.parametrize("drawn", [True, False])
def test_the_sheet_has_a_row_for_each_family_and_a_time_for_each_in_a_table(
    sheet, monkeypatch, tmp_path, capsys, drawn
):
    if not drawn:
        photo(80, 50).save(tmp_path / "one.png")
        monkeypatch.setattr(sheet, "PHOTOS_DIR", tmp_path)
    sheet.main()
    with Image.open(sheet.OUT) as image:
        assert image.size == (90 + 2 * 16, (len(FAMILIES) + 2) * 16)
    printed = capsys.readouterr().out
    assert all(f"| {name} | " in printed for name in [*FAMILIES, "a chain of 1 to 4"])


def test_a_sheet_of_an_empty_folder_is_refused(sheet, monkeypatch, tmp_path):
    monkeypatch.setattr(sheet, "PHOTOS_DIR", tmp_path)
    with pytest.raises(UserError, match=r"^PHOTOS_DIR = .*: no photo found"):
        sheet.main()


def test_a_fixed_degradation_depends_on_the_photos_name_alone_and_leaves_torch_s_draws(tmp_path):
    first_photo, twin, other = (tmp_path / name for name in ("a/1.png", "b/1.png", "a/2.png"))
    for path in (first_photo, twin, other):
        write_photo(path, (120, 90, 60), seed=1, side=60)
    made, another, *_ = validation_degradations((), most=4, side=60)
    torch.manual_seed(5)
    following = torch.rand(3)
    torch.manual_seed(5)
    first, again, same, different = (
        np.asarray(made(load_image(path))) for path in (first_photo, first_photo, twin, other)
    )
    assert torch.equal(torch.rand(3), following)
    assert (first == again).all() and (first == same).all() and (first != different).any()
    assert (first != np.asarray(another(load_image(first_photo)))).any()
    assert set(validation_degradations(("glare",), most=4, side=60)[0].degradation.families) == {"glare"}
