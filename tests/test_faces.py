"""The detector on drawn faces, the crop, and labelled pictures."""

import numpy as np
import pytest
import torch
from facenet_pytorch.models.utils import detect_face
from PIL import Image

import faces
from common import UserError
from faces import Face, FaceDetector, Label, choose, crop_face, draw_labels
from tools import sample_faces

GREEN = "#1b7f3b"


@pytest.fixture(scope="module")
def detector():
    return FaceDetector("cpu")


@pytest.fixture(scope="module")
def drawn():
    """A drawn person of 250 x 250 pixels; its face lies about at (72, 56, 183, 203)."""
    identity = sample_faces.random_identity(np.random.default_rng((0, 1)))
    return sample_faces.draw_face(identity, np.random.default_rng((0, 1, 1)), 250)


def test_faces_are_found_where_they_were_drawn_the_largest_first(detector, drawn):
    (face,) = detector.find(drawn)
    assert face.box == pytest.approx((72, 56, 183, 203), abs=12) and 0.9 <= face.probability <= 1
    both = Image.new("RGB", (450, 250), (120, 120, 120))
    both.paste(drawn.resize((180, 180)), (0, 40))
    both.paste(drawn, (200, 0))
    found = detector.find(both)
    middles = [(face.box[0] + face.box[2]) / 2 for face in found]
    assert middles == pytest.approx([200 + 127, 0.72 * 127], abs=15) and found[0].area > found[1].area


def test_boxes_of_a_large_photo_are_in_its_own_pixels(detector, drawn, monkeypatch):
    monkeypatch.setattr(faces, "DETECT_SIDE", 250)
    seen = []
    detect = detector.mtcnn.detect
    monkeypatch.setattr(detector.mtcnn, "detect", lambda image: (seen.append(image.size), detect(image))[1])
    (face,) = detector.find(drawn.resize((1500, 1500)))
    assert seen == [(250, 250)]
    assert face.box == pytest.approx([6 * value for value in (72, 56, 183, 203)], abs=72)


def test_a_face_below_min_probability_is_left_out(drawn, detector):
    probability = detector.find(drawn)[0].probability
    assert len(FaceDetector("cpu", min_probability=probability).find(drawn)) == 1
    assert FaceDetector("cpu", min_probability=1.0).find(drawn.resize((60, 60)).resize((250, 250))) == []


@pytest.mark.parametrize("size", [(1, 1), (250, 3), (20, 20), (64, 64)])
def test_no_face_is_found_in_a_tiny_or_empty_image(detector, size):
    assert detector.find(Image.new("RGB", size, (90, 120, 90))) == []


def test_a_candidate_outside_the_image_does_not_stop_the_detector(detector, drawn, monkeypatch):
    refine = detector.mtcnn.rnet.forward

    def push_one_out(crops):
        moves, scores = refine(crops)
        scores[0] = torch.tensor([0.0, 1.0])
        moves[0] = 50.0  # the box moves by 50 times its side
        return moves, scores

    expected = detector.find(drawn)
    monkeypatch.setattr(detector.mtcnn.rnet, "forward", push_one_out)
    assert detector.find(drawn)[0].box == pytest.approx(expected[0].box, abs=12)
    assert detect_face.pad.__module__ == "faces"  # or facenet-pytorch would stop with an IndexError


def test_a_detector_setting_out_of_range_is_refused():
    with pytest.raises(UserError, match="MIN_FACE = 11: expected 12"):
        FaceDetector("cpu", min_face=11)
    with pytest.raises(UserError, match=r"MIN_PROBABILITY = 1\.1: expected"):
        FaceDetector("cpu", min_probability=1.1)


def test_central_and_largest_choose_different_faces():
    large, central = Face((0, 0, 50, 50), 0.9), Face((80, 80, 110, 110), 0.9)
    assert choose([large, central], (200, 200), "largest") is large
    assert choose([large, central], (200, 200), "central") is central
    assert choose([], (200, 200), "central") is None and choose([], (200, 200), "largest") is None
    with pytest.raises(UserError, match="WHICH = 'best': expected one of 'largest', 'central'"):
        choose([large], (200, 200), "best")


def numbered(width: int, height: int) -> Image.Image:
    """Red counts columns, green counts rows."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], 2).astype(np.uint8))


def test_a_crop_is_the_square_around_the_box_and_keeps_its_pixels():
    crop = np.asarray(crop_face(numbered(100, 80), (30, 20, 50, 60), margin=0.25))  # side 50 around (40, 40)
    assert crop.shape == (50, 50, 3)
    assert crop[0, 0].tolist() == [15, 15, 0] and crop[-1, -1].tolist() == [64, 64, 0]
    assert crop_face(numbered(100, 80), (30, 20, 50, 60), margin=0.2, size=33).size == (33, 33)


def test_at_the_border_the_outermost_pixels_are_repeated_and_the_face_stays_central():
    crop = np.asarray(crop_face(numbered(100, 80), (-10, 60, 30, 90), margin=0))  # columns -10..29, rows 55..94
    assert crop.shape == (40, 40, 3)
    assert crop[0, :, 0].tolist() == [0] * 10 + list(range(30))
    assert crop[:, 0, 1].tolist() == list(range(55, 80)) + [79] * 15


@pytest.mark.parametrize("box, margin", [((5, 5, 5, 9), 0.1), ((5, 9, 9, 5), 0.1), ((1, 1, 9, 9), -1)])
def test_an_empty_box_is_refused(box, margin):
    with pytest.raises(UserError, match="nothing to cut"):
        crop_face(numbered(20, 20), box, margin)


def green_rows(picture: Image.Image) -> np.ndarray:
    """The rows of the pixels in GREEN."""
    green = np.array(Image.new("RGB", (1, 1), GREEN))[0, 0].astype(int)
    return np.nonzero((np.abs(np.array(picture).astype(int) - green) < 30).all(2))[0]


@pytest.mark.parametrize("text", ["Zoë 李小龍 محمد 🙂", "a\nb\udcff", "x" * 300, "e\u0308" * 40])
def test_any_text_can_be_drawn_on_any_picture(text):
    labels = [Label(text, GREEN, box) for box in ((-5.0, -5.0, 20.0, 2500.0), None)]
    for size in ((40, 40), (1000, 20), (3, 2000)):
        picture = draw_labels(Image.new("RGB", size), labels, side=600)
        assert max(picture.size) == 600 and len(green_rows(picture)) > 0


def test_a_text_is_drawn_below_its_box_where_another_one_is_above_it():
    labels = [Label("a rather long name", GREEN, (left, 100.0, left + 100, 200.0)) for left in (100.0, 130.0)]
    one, both = (draw_labels(Image.new("RGB", (400, 400)), labels[:count], side=800) for count in (1, 2))
    below = [int((green_rows(picture) > 2 * 200 + 5).sum()) for picture in (one, both)]
    assert below[0] == 0 and below[1] > 1000
