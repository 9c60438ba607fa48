"""Faces from loose photos: the detector on drawn faces, and the script, mostly with a detector that sees rectangles."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from facenet_pytorch.models.utils import detect_face
from PIL import Image, ImageDraw

import common
import faces
from common import UserError
from datasets import scan_persons
from faces import Face, FaceDetector, choose, crop_face
from tools import align_faces, sample_faces

RED, BLUE = (255, 0, 0), (0, 0, 255)
LFW = Path(__file__).parents[2] / "shared" / "lfw_faces" / "cross" / "val"


class SeesRectangles:
    """FaceDetector's interface: a face is the rectangle around all red pixels, another that around all blue ones."""

    searched: list = []  # noqa: RUF012  # sizes of all images searched; emptied by the fixture

    def __init__(self, device, min_face, min_probability):
        pass

    def find(self, image):
        self.searched.append(image.size)
        pixels, found = np.asarray(image), []
        for colour in (RED, BLUE):
            rows, columns = np.nonzero((abs(pixels - np.array(colour)) < 50).all(2))
            if len(rows):
                box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                found.append(Face(tuple(map(float, box)), 0.99))
        return sorted(found, key=lambda face: -face.area)


def write(path: Path, box=None, blue=None, size=(60, 40), ground=(90, 120, 90), mode="RGB", **options) -> Path:
    """A photo with a red face at `box` and a blue one at `blue` (left, top, right, bottom)."""
    image = Image.new("RGB", size, ground)
    for place, colour in ((box, RED), (blue, BLUE)):
        if place:
            image.paste(colour, place)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".jpg":
        options |= {"quality": 100, "subsampling": 0}  # keeps the edges of the rectangles
    image.convert(mode).save(path, **options)
    return path


@pytest.fixture
def script(tmp_path, monkeypatch):
    """align_faces from tmp_path/photos to tmp_path/out, with SeesRectangles and no margin."""
    SeesRectangles.searched.clear()
    monkeypatch.setattr(align_faces, "FaceDetector", SeesRectangles)
    constants = {"IN_DIR": tmp_path / "photos", "OUT_DIR": tmp_path / "out", "MARGIN": 0.0, "SHEET": 4}
    for name, value in constants.items():
        monkeypatch.setattr(align_faces, name, value)
    (tmp_path / "photos").mkdir()
    return align_faces


def rows_of(script) -> dict[str, dict]:
    with open(script.OUT_DIR / "align_faces.csv", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def tree(root: Path) -> dict[str, str]:
    """Every file below `root` with the hash of its content."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def photos_in(root: Path) -> list[str]:
    return [name for name in tree(root) if "/" in name]  # what lies directly in OUT_DIR is the script's report


# --- the detector -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector():
    return FaceDetector("cpu")


@pytest.fixture(scope="module")
def drawn():
    """A drawn person of 250 x 250 pixels; its face lies about at (72, 56, 183, 203)."""
    identity = sample_faces.random_identity(np.random.default_rng((0, 1)))
    return sample_faces.draw_face(identity, np.random.default_rng((0, 1, 1)), 250)


def test_a_drawn_face_is_found_where_it_was_drawn(detector, drawn):
    (face,) = detector.find(drawn)
    assert face.box == pytest.approx((72, 56, 183, 203), abs=12)
    assert 0.9 <= face.probability <= 1


def test_several_faces_are_found_the_largest_first(detector, drawn):
    both = Image.new("RGB", (450, 250), (120, 120, 120))
    both.paste(drawn.resize((180, 180)), (0, 40))
    both.paste(drawn, (200, 0))
    found = detector.find(both)
    middles = [(face.box[0] + face.box[2]) / 2 for face in found]
    assert middles == pytest.approx([200 + 127, 0.72 * 127], abs=15)
    assert found[0].area > found[1].area


def test_boxes_of_a_large_photo_count_in_its_own_pixels(detector, drawn, monkeypatch):
    monkeypatch.setattr(faces, "DETECT_SIDE", 250)
    seen = []
    detect = detector.mtcnn.detect
    monkeypatch.setattr(detector.mtcnn, "detect", lambda image: (seen.append(image.size), detect(image))[1])
    (face,) = detector.find(drawn.resize((1500, 1500)))
    assert seen == [(250, 250)]
    assert face.box == pytest.approx([6 * value for value in (72, 56, 183, 203)], abs=72)


def test_an_unlikely_face_is_passed_over(drawn, detector):
    probability = detector.find(drawn)[0].probability
    assert len(FaceDetector("cpu", min_probability=probability).find(drawn)) == 1
    assert FaceDetector("cpu", min_probability=1.0).find(drawn.resize((60, 60)).resize((250, 250))) == []


@pytest.mark.parametrize("size", [(1, 1), (5, 5), (250, 3), (20, 20), (64, 64)])
def test_no_face_in_a_tiny_or_empty_image_is_no_error(detector, size):
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
    assert detect_face.pad is faces._pixels_of


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"min_face": 11}, "MIN_FACE = 11: expected 12"), ({"min_probability": 1.1}, "MIN_PROBABILITY = 1.1: expected")],
)
def test_the_detector_refuses_a_setting_out_of_range(settings, told):
    with pytest.raises(ValueError, match=told):
        FaceDetector("cpu", **settings)


def test_central_and_largest_choose_different_faces():
    large, central = Face((0, 0, 50, 50), 0.9), Face((80, 80, 110, 110), 0.9)
    assert choose([large, central], (200, 200), "largest") is large
    assert choose([large, central], (200, 200), "central") is central
    assert choose([], (200, 200), "central") is None and choose([], (200, 200), "largest") is None
    with pytest.raises(ValueError, match="WHICH = 'best': expected one of 'largest', 'central'"):
        choose([large], (200, 200), "best")


# --- the crop ---------------------------------------------------------------------------------------------------------


def numbered(width: int, height: int) -> Image.Image:
    """Red counts columns, green counts rows."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], 2).astype(np.uint8))


def test_a_crop_is_the_square_around_the_box_and_keeps_its_pixels():
    crop = np.asarray(crop_face(numbered(100, 80), (30, 20, 50, 60), margin=0.25))  # side 50 around (40, 40)
    assert crop.shape == (50, 50, 3)
    assert crop[0, 0].tolist() == [15, 15, 0] and crop[-1, -1].tolist() == [64, 64, 0]


def test_at_the_border_the_outermost_pixels_are_repeated_and_the_face_stays_central():
    crop = np.asarray(crop_face(numbered(100, 80), (-10, 60, 30, 90), margin=0))  # columns -10..29, rows 55..94
    assert crop.shape == (40, 40, 3)
    assert crop[0, :, 0].tolist() == [0] * 10 + list(range(30))
    assert crop[:, 0, 1].tolist() == list(range(55, 80)) + [79] * 15


def test_a_resized_crop_has_the_size_asked_for():
    assert crop_face(numbered(100, 80), (30, 20, 50, 60), margin=0.2, size=33).size == (33, 33)


@pytest.mark.parametrize(("box", "margin"), [((5, 5, 5, 9), 0.1), ((5, 9, 9, 5), 0.1), ((1, 1, 9, 9), -1)])
def test_an_empty_box_is_refused(box, margin):
    with pytest.raises(ValueError, match="nothing to cut"):
        crop_face(numbered(20, 20), box, margin)


# --- the script: the tree ---------------------------------------------------------------------------------------------


def test_the_tree_is_mirrored_and_photos_of_a_person_go_to_clean(script):
    for name in ("train/ann/a_1.jpg", "train/ann/distortion/a_1_foggy.png", "val/bob/clean/b.JPG", "cy/deep/er/c.bmp"):
        write(script.IN_DIR / name, (20, 10, 40, 30))
    write(script.IN_DIR / ".hidden/x/x.jpg", (20, 10, 40, 30))
    assert script.main()["cut"] == 4
    assert photos_in(script.OUT_DIR) == [
        "cy/deep/er/clean/c.png",
        "train/ann/clean/a_1.jpg",
        "train/ann/distortion/a_1_foggy.png",
        "val/bob/clean/b.JPG",
    ]
    with Image.open(script.OUT_DIR / "val/bob/clean/b.JPG") as image:
        assert image.format == "JPEG" and image.size == (20, 20)
    (ann,) = scan_persons(script.OUT_DIR / "train")
    assert len(ann.clean) == len(ann.distorted) == 1


def test_what_no_other_script_would_read_is_left_out_aloud(script, capsys):
    for name in ("sheet.png", "ann/a.png", "ann/clean/b.png", "ann/clean/old/c.png", "bob/b.png"):
        write(script.IN_DIR / name, (20, 10, 40, 30))
    assert script.main()["left out"] == 3
    assert photos_in(script.OUT_DIR) == ["ann/clean/b.png", "bob/clean/b.png"]
    reasons = {path: row["reason"] for path, row in rows_of(script).items() if row["done"] == "left out"}
    assert reasons == {
        "sheet.png": "lies beside the folders of persons",
        "ann/a.png": "lies beside clean/, which counts",
        "ann/clean/old/c.png": "lies deeper than clean/, where no script looks",
    }
    assert "3 left out: sheet.png (lies beside" in capsys.readouterr().out


def test_a_jpg_and_a_png_of_one_name_are_both_kept(script):
    write(script.IN_DIR / "ann/a.jpg", (20, 10, 40, 30))
    write(script.IN_DIR / "ann/a.png", (10, 10, 20, 20))
    script.main()
    assert photos_in(script.OUT_DIR) == ["ann/clean/a.jpg", "ann/clean/a.png"]


@pytest.mark.parametrize("names", [("a.png", "a.bmp"), ("a.jpg", "A.JPG")])
def test_two_photos_that_would_become_one_file_stop_the_run_before_it_starts(script, names):
    for name in names:
        write(script.IN_DIR / "ann" / name, (20, 10, 40, 30))
    with pytest.raises(ValueError, match=r"ann/.* and .*/ann/.* would both become .*; rename one of them"):
        script.main()
    assert not script.OUT_DIR.exists()


@pytest.mark.parametrize("out", [".", "photos", "photos/cut", "photos/../photos"])
def test_an_out_dir_in_or_around_in_dir_is_refused(script, monkeypatch, tmp_path, out):
    write(script.IN_DIR / "ann/a.png", (20, 10, 40, 30))
    before = tree(tmp_path)
    monkeypatch.setattr(align_faces, "OUT_DIR", tmp_path / out)
    with pytest.raises(ValueError, match=r"OUT_DIR = .* one is, or lies in, the other; choose an OUT_DIR elsewhere"):
        script.main()
    assert tree(tmp_path) == before


# --- the script: which box --------------------------------------------------------------------------------------------


def test_a_distorted_photo_takes_the_box_of_its_clean_one(script):
    write(script.IN_DIR / "ann/a.png", (20, 10, 40, 30))
    write(script.IN_DIR / "ann/distortion/a_lowlight.png", None)  # nothing to detect
    write(script.IN_DIR / "ann/distortion/a_foggy.png", (0, 0, 8, 8))  # would mislead
    assert script.main()["cut"] == 3
    assert SeesRectangles.searched == [(60, 40)]
    rows = rows_of(script)
    for row in rows.values():
        assert [float(row[side]) for side in align_faces.BOX] == [20, 10, 40, 30]
        assert row["box_of"] == "ann/a.png"
    with Image.open(script.OUT_DIR / "ann/distortion/a_lowlight.png") as image:
        assert image.size == (20, 20) and image.getpixel((5, 5)) == (90, 120, 90)


def test_a_distorted_photo_of_another_size_or_without_a_clean_face_is_searched_itself(script):
    write(script.IN_DIR / "ann/a.png", (20, 10, 40, 30))
    write(script.IN_DIR / "ann/b.png", None)
    write(script.IN_DIR / "ann/distortion/a_resized.png", (10, 5, 20, 15), size=(30, 20))
    write(script.IN_DIR / "ann/distortion/b_foggy.png", (0, 0, 8, 8))
    write(script.IN_DIR / "ann/distortion/stranger_foggy.png", (4, 4, 16, 16))
    counts = script.main()
    assert (counts["cut"], counts["no face"]) == (4, 1)
    for path, row in rows_of(script).items():
        assert row["box_of"] == ("" if path == "ann/b.png" else path)
    with Image.open(script.OUT_DIR / "ann/distortion/a_resized.png") as image:
        assert image.size == (10, 10) and image.getpixel((0, 0)) == RED


@pytest.mark.parametrize(("which", "colour"), [("largest", RED), ("central", BLUE)])
def test_of_several_faces_the_one_asked_for_is_cut_and_that_is_told(script, monkeypatch, capsys, which, colour):
    monkeypatch.setattr(align_faces, "WHICH", which)
    write(script.IN_DIR / "ann/a.png", (0, 0, 20, 20), blue=(25, 15, 35, 25))
    write(script.IN_DIR / "ann/b.png", (0, 0, 20, 20))
    script.main()
    with Image.open(script.OUT_DIR / "ann/clean/a.png") as image:
        assert image.getpixel((5, 5)) == colour
    assert rows_of(script)["ann/a.png"]["faces"] == "2"
    assert f"1 with several faces, of which the {which} was taken: ann/a.png" in capsys.readouterr().out


def test_photos_without_a_face_are_listed_and_told(script, capsys):
    write(script.IN_DIR / "ann/a.png", (20, 10, 40, 30))
    for number in range(7):
        write(script.IN_DIR / f"bob/b{number}.png", None, size=(5, 5))
    assert script.main()["no face"] == 7
    listed = (script.OUT_DIR / "no_face.txt").read_text().splitlines()
    assert listed == [f"bob/b{number}.png" for number in range(7)]
    out = capsys.readouterr().out
    assert "7 without a face" in out and "bob/b4.png and 2 more" in out
    assert photos_in(script.OUT_DIR) == ["ann/clean/a.png"]


def test_an_unreadable_photo_is_listed_and_the_others_are_cut(script, capsys):
    whole = write(script.IN_DIR / "ann/a.jpg", (20, 10, 40, 30))
    (script.IN_DIR / "ann/half.jpg").write_bytes(whole.read_bytes()[:300])
    (script.IN_DIR / "ann/text.png").write_text("no image")
    write(script.IN_DIR / "ann/z.png", (20, 10, 40, 30))
    assert script.main()["unreadable"] == 2
    assert "ann/clean/z.png" in photos_in(script.OUT_DIR)
    assert "cannot identify" in rows_of(script)["ann/text.png"]["reason"]
    assert "2 that cannot be read: ann/half.jpg (" in capsys.readouterr().out


def test_grey_transparent_and_rotated_photos_are_cut_upright_in_colour(script):
    for name, mode in (("grey.png", "L"), ("clear.png", "RGBA"), ("palette.png", "P")):
        write(script.IN_DIR / "ann" / name, (20, 10, 40, 30), mode=mode)
    rotated = Image.new("RGB", (60, 40), (90, 120, 90))
    rotated.paste(RED, (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright: the face is then at the top right of 40 x 60
    rotated.save(script.IN_DIR / "ann/turned.png", exif=exif)
    counts = script.main()
    assert (counts["cut"], counts["no face"]) == (3, 1)  # red in grey is no longer red
    row = rows_of(script)["ann/turned.png"]
    assert [float(row[side]) for side in align_faces.BOX] == [20, 0, 40, 10]
    assert (row["width"], row["height"]) == ("40", "60")
    for name in ("clear", "palette", "turned"):
        with Image.open(script.OUT_DIR / f"ann/clean/{name}.png") as image:
            assert image.mode == "RGB" and "exif" not in image.info


def test_a_jpeg_loses_little(script, monkeypatch):
    path = script.IN_DIR / "ann/a.jpg"
    path.parent.mkdir(parents=True)
    stripes = np.tile(np.array([[200, 60, 60], [60, 60, 200]], np.uint8), (40, 30, 1))  # a pixel wide, red and blue
    Image.fromarray(stripes).save(path, quality=100, subsampling=0)
    monkeypatch.setattr(SeesRectangles, "find", lambda self, image: [Face((10, 5, 30, 25), 1.0)])
    script.main()
    with Image.open(script.OUT_DIR / "ann/clean/a.jpg") as image:
        off = np.abs(np.asarray(image, int) - stripes[5:25, 10:30])
    assert off.mean() < 4


# --- the script: runs -------------------------------------------------------------------------------------------------


def three_persons(script) -> None:
    for person in ("ann", "bob", "cy"):
        write(script.IN_DIR / person / "a.png", (20, 10, 40, 30))
        write(script.IN_DIR / person / "distortion" / "a_foggy.png", None)
    write(script.IN_DIR / "bob" / "none.png", None)


def test_the_originals_stay_as_they_are(script):
    three_persons(script)
    before = tree(script.IN_DIR)
    script.main()
    assert tree(script.IN_DIR) == before


def test_a_second_run_looks_at_no_photo_again(script, capsys):
    three_persons(script)
    first, before = script.main(), tree(script.OUT_DIR)
    SeesRectangles.searched.clear()
    times = {path: path.stat().st_mtime_ns for path in script.OUT_DIR.rglob("*.png") if path.parent != script.OUT_DIR}
    assert script.main() == first
    assert SeesRectangles.searched == []
    assert tree(script.OUT_DIR) == before
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert "this run looked at 0" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_goes_on_where_it_stopped_and_ends_as_if_uninterrupted(script, monkeypatch, tmp_path, error):
    three_persons(script)
    script.main()
    expected = {name: content for name, content in tree(script.OUT_DIR).items() if name != "align_faces.json"}
    monkeypatch.setattr(align_faces, "OUT_DIR", tmp_path / "again")
    SeesRectangles.searched.clear()
    find, noted = SeesRectangles.find, []

    def find_until_stopped(self, image):
        if len(self.searched) == 2:  # ann's, bob's, and then the power is gone
            noted.append(list(rows_of(script)))  # on disk already: even a killed run keeps it
            raise error
        return find(self, image)

    with monkeypatch.context() as patch:
        patch.setattr(SeesRectangles, "find", find_until_stopped)
        with pytest.raises(error):
            script.main()
    assert photos_in(script.OUT_DIR) == ["ann/clean/a.png", "ann/distortion/a_foggy.png", "bob/clean/a.png"]
    assert {"ann/a.png", "ann/distortion/a_foggy.png", "bob/a.png"} <= set(noted[0])
    with open(script.OUT_DIR / "align_faces.csv", "a") as file:
        file.write("bob/none.png,no fa")  # a line that a crash has torn
    SeesRectangles.searched.clear()
    script.main()
    assert len(SeesRectangles.searched) == 2  # bob/none.png, cy/a.png
    assert {name: content for name, content in tree(script.OUT_DIR).items() if name != "align_faces.json"} == expected


def test_a_crop_that_cannot_be_finished_leaves_no_half_file(script, monkeypatch):
    three_persons(script)
    save = Image.Image.save

    def fail_midway(self, file, *arguments, **options):
        save(self, file, *arguments, **options)
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", fail_midway)
    with pytest.raises(OSError, match="no space left"):
        script.main()
    assert photos_in(script.OUT_DIR) == []


def test_an_exchanged_clean_photo_is_cut_anew_together_with_its_distorted_copies(script):
    three_persons(script)
    script.main()
    write(script.IN_DIR / "ann/a.png", (5, 5, 15, 15), ground=(1, 2, 3))
    (script.OUT_DIR / "cy/clean/a.png").unlink()
    SeesRectangles.searched.clear()
    script.main()
    assert len(SeesRectangles.searched) == 2  # ann's new one, cy's deleted one
    for name in ("ann/clean/a.png", "ann/distortion/a_foggy.png", "cy/clean/a.png"):
        with Image.open(script.OUT_DIR / name) as image:
            assert image.size == ((20, 20) if name.startswith("cy") else (10, 10))


def test_a_crop_goes_when_its_photo_no_longer_shows_a_face(script):
    three_persons(script)
    script.main()
    write(script.IN_DIR / "ann/a.png", None, ground=(1, 2, 3))
    (script.IN_DIR / "cy/a.png").write_text("broken")
    counts = script.main()
    assert (counts["no face"], counts["unreadable"]) == (4, 1)  # ann's two, bob's none.png and cy's hidden copy
    assert photos_in(script.OUT_DIR) == ["bob/clean/a.png", "bob/distortion/a_foggy.png"]


def test_a_crop_whose_photo_is_gone_is_told_until_it_is_deleted(script, capsys):
    three_persons(script)
    script.main()
    (script.IN_DIR / "bob/a.png").unlink()
    for _ in range(2):
        assert script.main()["photo gone"] == 1
        assert f"bob/a.png (delete {script.OUT_DIR / 'bob/clean/a.png'})" in capsys.readouterr().out
    (script.OUT_DIR / "bob/clean/a.png").unlink()
    assert script.main()["photo gone"] == 0


def test_another_constant_in_the_same_out_dir_is_refused(script, monkeypatch):
    three_persons(script)
    script.main()
    before = tree(script.OUT_DIR)
    monkeypatch.setattr(align_faces, "MARGIN", 0.4)
    with pytest.raises(UserError, match=r"was cut with MARGIN = 0.0, now 0.4; set it back, delete the folder"):
        script.main()
    assert tree(script.OUT_DIR) == before
    assert json.loads((script.OUT_DIR / "align_faces.json").read_text())["MARGIN"] == 0.0


def test_a_folder_of_something_else_is_refused(script):
    three_persons(script)
    write(script.OUT_DIR / "train/ann/a.png")
    with pytest.raises(UserError, match="holds files that are not this script's"):
        script.main()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MARGIN", -0.1),
        ("MARGIN", float("nan")),
        ("MARGIN", "0.2"),
        ("SIZE", 0),
        ("SIZE", 160.0),
        ("MIN_PROBABILITY", 90),
        ("MIN_FACE", 5),
        ("JPEG_QUALITY", 101),
        ("SHEET", -1),
        ("SHEET_CELL", True),
        ("SEED", -1),
        ("WHICH", "smallest"),
    ],
)
def test_a_constant_out_of_range_gives_one_sentence(script, monkeypatch, name, value):
    three_persons(script)
    monkeypatch.setattr(align_faces, name, value)
    with pytest.raises(SystemExit) as stop:
        common.run_script(script.main)
    assert str(stop.value).startswith(f"error: {name} = {value!r}: expected ")
    assert not script.OUT_DIR.exists()


def test_an_in_dir_that_is_missing_or_empty_is_told(script, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"no photo, expected .*/<person>/\*\.jpg"):
        script.main()
    monkeypatch.setattr(align_faces, "IN_DIR", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such folder; set IN_DIR"):
        script.main()


def test_the_sheet_shows_the_photo_with_its_box_beside_the_crop(script):
    write(script.IN_DIR / "ann/a.png", (20, 10, 40, 30), blue=(21, 11, 39, 29), size=(80, 80))
    script.main()
    with Image.open(script.OUT_DIR / "align_faces.png") as sheet:
        assert sheet.size == (6 * 160, 160 + 14)
        assert sheet.getpixel((60, 20)) == RED  # the box's upper edge, at twice the photo's size
        assert sheet.getpixel((5, 5)) == (90, 120, 90)  # the photo's corner
        assert sheet.getpixel((240, 80)) in (RED, BLUE)  # the middle of the crop
        assert sheet.getpixel((400, 80)) == (255, 255, 255)  # no second pair


def test_drawn_faces_become_a_tree_with_the_real_detector(script, drawn, monkeypatch):
    monkeypatch.setattr(align_faces, "FaceDetector", FaceDetector)
    wide = Image.new("RGB", (400, 300), (120, 130, 140))
    wide.paste(drawn, (140, 30))
    (script.IN_DIR / "ann/distortion").mkdir(parents=True)
    wide.save(script.IN_DIR / "ann/a.jpg", quality=95)
    wide.point(lambda value: value * 0.02).save(script.IN_DIR / "ann/distortion/a_lowlight.jpg", quality=95)
    ImageDraw.Draw(wide).rectangle((0, 0, 400, 300), (120, 130, 140))
    wide.save(script.IN_DIR / "ann/wall.jpg")
    counts = script.main()
    assert (counts["cut"], counts["no face"]) == (2, 1)
    rows = rows_of(script)
    box = [float(rows["ann/a.jpg"][side]) for side in align_faces.BOX]
    assert box == pytest.approx([140 + 72, 30 + 56, 140 + 183, 30 + 203], abs=12)
    for name in ("clean/a.jpg", "distortion/a_lowlight.jpg"):
        with Image.open(script.OUT_DIR / "ann" / name) as image:
            assert image.size == (round(max(box[2] - box[0], box[3] - box[1])),) * 2


def test_real_photos_are_framed_as_the_centre_crop_of_lfw(detector):
    photos = sorted(LFW.glob("*/*.jpg"))[::40][:6]
    if not photos:
        pytest.skip("no photos at ../shared/lfw_faces/cross/val, which are not in the repo")
    sides = []
    for path in photos:
        image = align_faces.load_image(path)
        face = choose(detector.find(image), image.size, "central")
        left, top, right, bottom = face.box
        assert left < 125 < right and top < 125 < bottom
        sides.append(crop_face(image, face.box, margin=0.06).width)
    assert np.median(sides) == pytest.approx(0.52 * 250, rel=0.1)
