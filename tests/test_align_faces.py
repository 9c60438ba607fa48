"""python -m tools.align_faces, mostly with a detector that sees coloured rectangles."""

import csv
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import common
from common import UserError
from datasets import scan_persons
from faces import Face, FaceDetector, choose, crop_face
from tools import align_faces, sample_faces

RED, BLUE = (255, 0, 0), (0, 0, 255)
FACE = (20, 10, 40, 30)  # left, top, right, bottom


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


def write(path: Path, box=FACE, blue=None, size=(60, 40), ground=(90, 120, 90), mode="RGB") -> Path:
    """A photo with a red face at `box` and a blue one at `blue` (left, top, right, bottom; None: no such face)."""
    image = Image.new("RGB", size, ground)
    for place, colour in ((box, RED), (blue, BLUE)):
        if place:
            image.paste(colour, place)
    path.parent.mkdir(parents=True, exist_ok=True)
    quality = {"quality": 100, "subsampling": 0} if path.suffix.lower() == ".jpg" else {}  # keeps the edges
    image.convert(mode).save(path, **quality)
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


@pytest.fixture
def three_persons(script) -> None:
    """ann, bob and cy with a face each and a distorted photo that hides it, and a photo of bob without a face."""
    for person in ("ann", "bob", "cy"):
        write(script.IN_DIR / person / "a.png")
        write(script.IN_DIR / person / "distortion" / "a_foggy.png", None)
    write(script.IN_DIR / "bob" / "none.png", None)


def rows_of(script) -> dict[str, dict]:
    with open(script.OUT_DIR / "align_faces.csv", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def box_of(row: dict) -> list[float]:
    return [float(row[side]) for side in align_faces.BOX]


def tree(root: Path) -> dict[str, str]:
    """Every file below `root` with the hash of its content."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def crops_in(root: Path) -> list[str]:
    return [name for name in tree(root) if "/" in name]  # what lies directly in OUT_DIR is the script's report


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


# --- the tree ---------------------------------------------------------------------------------------------------------


def test_the_tree_is_mirrored_and_photos_of_a_person_go_to_clean(script):
    for name in ("train/ann/a.jpg", "train/ann/a.png", "train/ann/distortion/a_foggy.png", "val/bob/clean/b.JPG"):
        write(script.IN_DIR / name)
    write(script.IN_DIR / "cy/deep/er/c.bmp")
    write(script.IN_DIR / ".hidden/x/x.jpg")
    assert script.main()["cut"] == 5
    assert crops_in(script.OUT_DIR) == [
        "cy/deep/er/clean/c.png",
        "train/ann/clean/a.jpg",
        "train/ann/clean/a.png",
        "train/ann/distortion/a_foggy.png",
        "val/bob/clean/b.JPG",
    ]
    image = opened(script.OUT_DIR / "val/bob/clean/b.JPG")
    assert image.format == "JPEG" and image.size == (20, 20)
    (ann,) = scan_persons(script.OUT_DIR / "train")
    assert (len(ann.clean), len(ann.distorted)) == (2, 1)


def test_photos_that_no_other_script_reads_are_left_out_and_reported(script, capsys):
    for name in ("sheet.png", "ann/a.png", "ann/clean/b.png", "ann/clean/old/c.png", "bob/b.png"):
        write(script.IN_DIR / name)
    for name in (
        "ann/distorted/a_foggy.png",
        ".hidden/x.png",
        "@eaDir/x/x.png",
        "$RECYCLE.BIN/x.png",
        "#recycle/x.png",
    ):
        write(script.IN_DIR / name)
    (script.IN_DIR / "ann/film.MP4").write_text("")
    assert script.main()["left out"] == 5
    assert crops_in(script.OUT_DIR) == ["ann/clean/b.png", "bob/clean/b.png"]
    reasons = {path: row["reason"] for path, row in rows_of(script).items() if row["done"] == "left out"}
    assert reasons == {
        "sheet.png": "beside the folders of persons",
        "ann/a.png": "beside clean/, which counts",
        "ann/clean/old/c.png": "deeper than clean/, where no script reads",
        "ann/distorted/a_foggy.png": "in distorted/, to be named distortion/",
        "ann/film.MP4": ".mp4",
    }
    assert (
        f"{script.IN_DIR}: 5 files left out: 1 beside the folders of persons (sheet.png); " in capsys.readouterr().out
    )


@pytest.mark.parametrize("names", [("a.png", "a.bmp"), ("a.jpg", "A.JPG")])
def test_two_photos_whose_crops_would_be_one_file_stop_the_run_before_it_starts(script, names):
    for name in names:
        write(script.IN_DIR / "ann" / name)
    with pytest.raises(UserError, match=r"ann/.* and .*/ann/.* would both become .*; rename one of them"):
        script.main()
    assert not script.OUT_DIR.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights of their own")
def test_links_in_circles_are_followed_once(script):
    write(script.IN_DIR / "ann/a.png")
    (script.IN_DIR / "ann/loop").symlink_to(script.IN_DIR, target_is_directory=True)
    assert script.main()["cut"] == 1 and crops_in(script.OUT_DIR) == ["ann/clean/a.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_not_utf8_is_left_out_and_the_others_are_cut(script):
    write(script.IN_DIR / "ann/a.png")
    write(script.IN_DIR / "ann/b.png").rename(os.fsdecode(os.fsencode(script.IN_DIR / "ann") + b"/Jos\xe9.png"))
    counts = script.main()
    assert (counts["cut"], counts["left out"]) == (1, 1) and "not UTF-8" in rows_of(script)["ann/Jos\\udce9.png"][
        "reason"
    ]


def test_a_copy_is_cut_at_the_box_of_the_clean_photo_with_its_own_suffix(script):
    for suffix, box in (("jpg", FACE), ("png", (0, 0, 8, 8))):
        write(script.IN_DIR / f"ann/a.{suffix}", box)
        write(script.IN_DIR / f"ann/distortion/a_foggy.{suffix}", None)
    script.main()
    rows = rows_of(script)
    assert [rows[f"ann/distortion/a_foggy.{suffix}"]["box_of"] for suffix in ("jpg", "png")] == [
        "ann/a.jpg",
        "ann/a.png",
    ]


# --- the crops --------------------------------------------------------------------------------------------------------


def test_a_distorted_photo_is_cut_at_the_box_of_its_clean_photo(script):
    write(script.IN_DIR / "ann/a.png")
    write(script.IN_DIR / "ann/distortion/a_lowlight.png", None)  # nothing to detect
    write(script.IN_DIR / "ann/distortion/a_foggy.png", (0, 0, 8, 8))  # would mislead
    assert script.main()["cut"] == 3
    assert SeesRectangles.searched == [(60, 40)]
    assert [(box_of(row), row["box_of"]) for row in rows_of(script).values()] == [([20, 10, 40, 30], "ann/a.png")] * 3
    image = opened(script.OUT_DIR / "ann/distortion/a_lowlight.png")
    assert image.size == (20, 20) and image.getpixel((5, 5)) == (90, 120, 90)


def test_a_distorted_photo_of_another_size_or_without_a_clean_face_is_searched_itself(script):
    write(script.IN_DIR / "ann/a.png")
    write(script.IN_DIR / "ann/b.png", None)
    write(script.IN_DIR / "ann/distortion/a_resized.png", (10, 5, 20, 15), size=(30, 20))
    write(script.IN_DIR / "ann/distortion/b_foggy.png", (0, 0, 8, 8))
    write(script.IN_DIR / "ann/distortion/stranger_foggy.png", (4, 4, 16, 16))
    counts = script.main()
    assert (counts["cut"], counts["no face"]) == (4, 1)
    for path, row in rows_of(script).items():
        assert row["box_of"] == ("" if path == "ann/b.png" else path)
    image = opened(script.OUT_DIR / "ann/distortion/a_resized.png")
    assert image.size == (10, 10) and image.getpixel((0, 0)) == RED


@pytest.mark.parametrize("which, colour", [("largest", RED), ("central", BLUE)])
def test_of_several_faces_one_is_cut_by_which_and_reported(script, monkeypatch, capsys, which, colour):
    monkeypatch.setattr(align_faces, "WHICH", which)
    write(script.IN_DIR / "ann/a.png", (0, 0, 20, 20), blue=(25, 15, 35, 25))
    write(script.IN_DIR / "ann/b.png", (0, 0, 20, 20))
    script.main()
    assert opened(script.OUT_DIR / "ann/clean/a.png").getpixel((5, 5)) == colour
    assert rows_of(script)["ann/a.png"]["faces"] == "2"
    assert f"1 with several faces, of which the {which} one was cut: ann/a.png" in capsys.readouterr().out


def test_photos_without_a_face_and_unreadable_ones_are_reported_and_the_others_cut(script, capsys):
    whole = write(script.IN_DIR / "ann/a.jpg")
    (script.IN_DIR / "ann/half.jpg").write_bytes(whole.read_bytes()[:300])
    (script.IN_DIR / "ann/text.png").write_text("no image")
    for number in range(7):
        write(script.IN_DIR / f"bob/b{number}.png", None, size=(5, 5))
    counts = script.main()
    assert (counts["unreadable"], counts["no face"]) == (2, 7) and crops_in(script.OUT_DIR) == ["ann/clean/a.jpg"]
    listed = (script.OUT_DIR / "no_face.txt").read_text().splitlines()
    assert listed == [f"bob/b{number}.png" for number in range(7)]
    assert "cannot identify" in rows_of(script)["ann/text.png"]["reason"]
    out = capsys.readouterr().out
    assert "7 without a face" in out and "bob/b4.png and 2 more" in out
    assert "2 unreadable: ann/half.jpg (" in out


def test_grey_transparent_and_rotated_photos_are_cut_upright_in_colour(script):
    for name, mode in (("grey.png", "L"), ("clear.png", "RGBA"), ("palette.png", "P")):
        write(script.IN_DIR / "ann" / name, mode=mode)
    rotated = Image.new("RGB", (60, 40), (90, 120, 90))
    rotated.paste(RED, (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright: the face is then at the top right of 40 x 60
    rotated.save(script.IN_DIR / "ann/turned.png", exif=exif)
    counts = script.main()
    assert (counts["cut"], counts["no face"]) == (3, 1)  # red in grey is no longer red
    row = rows_of(script)["ann/turned.png"]
    assert (box_of(row), row["width"], row["height"]) == ([20, 0, 40, 10], "40", "60")
    for name in ("clear", "palette", "turned"):
        image = opened(script.OUT_DIR / f"ann/clean/{name}.png")
        assert image.mode == "RGB" and "exif" not in image.info


def test_a_jpeg_loses_little(script, monkeypatch):
    path = script.IN_DIR / "ann/a.jpg"
    path.parent.mkdir(parents=True)
    stripes = np.tile(np.array([[200, 60, 60], [60, 60, 200]], np.uint8), (40, 30, 1))  # a pixel wide, red and blue
    Image.fromarray(stripes).save(path, quality=100, subsampling=0)
    monkeypatch.setattr(SeesRectangles, "find", lambda self, image: [Face((10, 5, 30, 25), 1.0)])
    script.main()
    off = np.abs(np.asarray(opened(script.OUT_DIR / "ann/clean/a.jpg"), int) - stripes[5:25, 10:30])
    assert off.mean() < 4


def test_the_sheet_shows_each_photo_with_its_box_beside_the_crop(script):
    write(script.IN_DIR / "ann/a.png", blue=(21, 11, 39, 29), size=(80, 80))
    script.main()
    sheet = opened(script.OUT_DIR / "align_faces.png")
    assert sheet.size == (6 * 160, 160 + 14)
    assert sheet.getpixel((60, 20)) == RED  # the box's upper edge, at twice the photo's size
    assert sheet.getpixel((5, 5)) == (90, 120, 90)  # the photo's corner
    assert sheet.getpixel((240, 80)) in (RED, BLUE)  # the middle of the crop
    assert sheet.getpixel((400, 80)) == (255, 255, 255)  # no second pair


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_second_run_processes_no_photo_again_and_the_originals_stay_unchanged(script, three_persons, capsys):
    originals, first = tree(script.IN_DIR), script.main()
    crops = tree(script.OUT_DIR)
    times = {name: (script.OUT_DIR / name).stat().st_mtime_ns for name in crops_in(script.OUT_DIR)}
    SeesRectangles.searched.clear()
    assert script.main() == first and SeesRectangles.searched == []
    assert (tree(script.IN_DIR), tree(script.OUT_DIR)) == (originals, crops)
    assert all((script.OUT_DIR / name).stat().st_mtime_ns == time for name, time in times.items())
    assert "0 processed in this run" in capsys.readouterr().out


def test_an_interrupted_run_continues_where_it_stopped_and_ends_as_if_uninterrupted(
    script, three_persons, monkeypatch, tmp_path
):
    script.main()
    expected = {name: content for name, content in tree(script.OUT_DIR).items() if name != "align_faces.json"}
    monkeypatch.setattr(align_faces, "OUT_DIR", tmp_path / "again")
    SeesRectangles.searched.clear()
    find, noted = SeesRectangles.find, []

    def find_until_stopped(self, image):
        if len(self.searched) == 2:  # ann's, bob's, and then the run is stopped
            noted.extend(rows_of(script))  # on disk already: even a killed run keeps it
            raise KeyboardInterrupt
        return find(self, image)

    with monkeypatch.context() as patch:
        patch.setattr(SeesRectangles, "find", find_until_stopped)
        with pytest.raises(KeyboardInterrupt, match="interrupted; run it again to continue"):
            script.main()
    assert crops_in(script.OUT_DIR) == ["ann/clean/a.png", "ann/distortion/a_foggy.png", "bob/clean/a.png"]
    assert {"ann/a.png", "ann/distortion/a_foggy.png", "bob/a.png"} <= set(noted)
    with open(script.OUT_DIR / "align_faces.csv", "a") as file:
        file.write("bob/none.png,no fa")  # a line that a crash has cut short
    SeesRectangles.searched.clear()
    script.main()
    assert len(SeesRectangles.searched) == 2  # bob/none.png, cy/a.png
    assert {name: content for name, content in tree(script.OUT_DIR).items() if name != "align_faces.json"} == expected


def test_a_name_like_a_formula_is_found_again_in_the_csv_file(script):
    write(script.IN_DIR / "=ann" / "a.png")
    script.main()
    assert "\n'=ann/a.png," in (script.OUT_DIR / "align_faces.csv").read_text()
    SeesRectangles.searched.clear()
    script.main()
    assert SeesRectangles.searched == []


def test_a_crop_that_cannot_be_finished_leaves_no_half_file(script, three_persons, monkeypatch):
    save = Image.Image.save

    def fail_midway(self, file, format, **settings):
        save(self, file, format, **settings)
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", fail_midway)
    with pytest.raises(OSError, match="no space left"):
        script.main()
    assert crops_in(script.OUT_DIR) == []


def test_a_replaced_clean_photo_is_cut_again_together_with_its_distorted_ones(script, three_persons):
    script.main()
    write(script.IN_DIR / "ann/a.png", (5, 5, 15, 15), ground=(1, 2, 3))
    (script.OUT_DIR / "cy/clean/a.png").unlink()
    SeesRectangles.searched.clear()
    script.main()
    assert len(SeesRectangles.searched) == 2  # ann's new one, cy's deleted one
    names = ("ann/clean/a.png", "ann/distortion/a_foggy.png", "cy/clean/a.png")
    assert [opened(script.OUT_DIR / name).size for name in names] == [(10, 10), (10, 10), (20, 20)]


def test_a_crop_is_deleted_when_its_photo_no_longer_shows_a_face(script, three_persons):
    script.main()
    write(script.IN_DIR / "ann/a.png", None, ground=(1, 2, 3))
    (script.IN_DIR / "cy/a.png").write_text("broken")
    counts = script.main()
    assert (counts["no face"], counts["unreadable"]) == (4, 1)  # ann's two, bob's none.png and cy's distorted one
    assert crops_in(script.OUT_DIR) == ["bob/clean/a.png", "bob/distortion/a_foggy.png"]


def test_a_crop_whose_photo_is_gone_is_reported_until_it_is_deleted(script, three_persons, capsys):
    script.main()
    (script.IN_DIR / "bob/a.png").unlink()
    for _ in range(2):
        assert script.main()["photo gone"] == 1
        assert f"bob/a.png (delete {script.OUT_DIR / 'bob/clean/a.png'})" in capsys.readouterr().out
    (script.OUT_DIR / "bob/clean/a.png").unlink()
    assert script.main()["photo gone"] == 0


# --- what is refused --------------------------------------------------------------------------------------------------


def test_another_constant_or_another_files_in_out_dir_are_refused(script, three_persons, monkeypatch, tmp_path):
    script.main()
    before = tree(script.OUT_DIR)
    monkeypatch.setattr(align_faces, "MARGIN", 0.4)
    with pytest.raises(UserError, match=r"was cut with MARGIN = 0\.0, now 0\.4; set it back, delete the folder"):
        script.main()
    assert tree(script.OUT_DIR) == before
    assert json.loads((script.OUT_DIR / "align_faces.json").read_text())["MARGIN"] == 0.0
    monkeypatch.setattr(align_faces, "OUT_DIR", tmp_path / "other")
    write(tmp_path / "other/train/ann/a.png")
    with pytest.raises(UserError, match="holds files of something else; give OUT_DIR another name"):
        script.main()


def test_in_dir_is_one_folder_however_its_path_is_given(script, three_persons, monkeypatch, tmp_path):
    counts = script.main()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(align_faces, "IN_DIR", Path("photos"))
    assert script.main() == counts
    write(tmp_path / "elsewhere/photos/ann/other.png")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"was cut with IN_DIR = .*photos', now .*elsewhere"):
        script.main()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_note_of_the_constants_is_reported_with_the_way_out(script, three_persons, text):
    script.main()
    (script.OUT_DIR / "align_faces.json").write_text(text)
    with pytest.raises(UserError, match=r"align_faces\.json: cannot be read, .* give OUT_DIR another name"):
        script.main()


@pytest.mark.parametrize("out", [".", "photos", "photos/cut", "photos/../photos"])
def test_an_out_dir_in_or_around_in_dir_is_refused(script, three_persons, monkeypatch, tmp_path, out):
    before = tree(tmp_path)
    monkeypatch.setattr(align_faces, "OUT_DIR", tmp_path / out)
    with pytest.raises(UserError, match=r"OUT_DIR = .* one is the other or lies inside it, .* choose another OUT_DIR"):
        script.main()
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "name, value",
    [("MARGIN", float("nan")), ("SIZE", 160.0), ("MIN_FACE", 5), ("SHEET_CELL", True), ("WHICH", "smallest")],
)
def test_a_constant_out_of_range_ends_the_script_with_one_sentence(script, three_persons, monkeypatch, name, value):
    monkeypatch.setattr(align_faces, name, value)
    with pytest.raises(SystemExit) as stop:
        common.run_script(script.main)
    assert str(stop.value).startswith(f"error: {name} = {value!r}: expected ")
    assert not script.OUT_DIR.exists()


def test_an_in_dir_that_is_empty_or_missing_is_refused(script, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"no photo, expected .*/<person>/\*\.jpg"):
        script.main()
    monkeypatch.setattr(align_faces, "IN_DIR", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such folder; set IN_DIR"):
        script.main()


def test_drawn_faces_are_cut_with_the_real_detector(script, monkeypatch):
    monkeypatch.setattr(align_faces, "FaceDetector", FaceDetector)
    identity = sample_faces.random_identity(np.random.default_rng((0, 1)))
    wide = Image.new("RGB", (400, 300), (120, 130, 140))
    wide.paste(sample_faces.draw_face(identity, np.random.default_rng((0, 1, 1)), 250), (140, 30))
    (script.IN_DIR / "ann/distortion").mkdir(parents=True)
    wide.save(script.IN_DIR / "ann/a.jpg", quality=95)
    wide.point(lambda value: value * 0.02).save(script.IN_DIR / "ann/distortion/a_lowlight.jpg", quality=95)
    ImageDraw.Draw(wide).rectangle((0, 0, 400, 300), (120, 130, 140))
    wide.save(script.IN_DIR / "ann/wall.jpg")
    counts = script.main()
    assert (counts["cut"], counts["no face"]) == (2, 1)
    box = box_of(rows_of(script)["ann/a.jpg"])
    assert box == pytest.approx([140 + 72, 30 + 56, 140 + 183, 30 + 203], abs=12)
    for name in ("clean/a.jpg", "distortion/a_lowlight.jpg"):
        side = round(max(box[2] - box[0], box[3] - box[1]))
        assert opened(script.OUT_DIR / "ann" / name).size == (side, side)


def test_real_photos_are_framed_as_the_centre_crop_of_lfw():
    photos = sorted((Path(__file__).parents[2] / "shared/lfw_faces/cross/val").glob("*/*.jpg"))[::40][:6]
    if not photos:
        pytest.skip("needs the real faces")
    detector, sides = FaceDetector("cpu"), []
    for path in photos:
        image = align_faces.load_image(path)
        face = choose(detector.find(image), image.size, "central")
        left, top, right, bottom = face.box
        assert left < 125 < right and top < 125 < bottom
        sides.append(crop_face(image, face.box, margin=0.06).width)
    assert np.median(sides) == pytest.approx(0.52 * 250, rel=0.1)
