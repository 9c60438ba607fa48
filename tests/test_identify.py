"""identify.main() on photos of one colour each, whose cosines can be worked out by hand."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyNet
from PIL import Image, ImageDraw
from torch import nn

import checkpoints
import common
import identify
from common import UserError
from enrolment import calibrate, load_gallery
from faces import Face
from gallery import build_gallery, embed_queries

SHARED = Path(__file__).resolve().parents[2] / "shared"  # real faces and weights, where this checkout has them

ANN, BOB, CY, DI = (220, 40, 40), (40, 220, 40), (40, 40, 220), (220, 220, 40)
STRANGER = (200, 215, 230)  # away from all of them, and nearest to cy


class ColourNet(nn.Module):
    """FaceNet's interface; an image's mean colour. `pretrained` is its one weight, `embedded` counts images."""

    embedded = 0

    def __init__(self, pretrained=None, dropout=0.0, freeze_until=None):
        super().__init__()
        self.register_buffer("weight", torch.tensor(float(pretrained or 0)))

    def forward(self, images):
        ColourNet.embedded += len(images)
        return nn.functional.normalize(images.mean((2, 3)))


def direction(colour) -> list[float]:
    """ColourNet's embedding of a photo of one colour."""
    values = [value - 127.5 for value in colour]
    return [value / math.hypot(*values) for value in values]


def cosine(a, b) -> float:
    return sum(x * y for x, y in zip(direction(a), direction(b), strict=True))


def write(path: Path, colour, size=(40, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(colour)).save(path)
    return path


def shade(colour, k: int) -> tuple:
    """A little off `colour`, another way for each k in 0..25."""
    return colour[0] - k, colour[1] + k // 2, colour[2] + k


def set_constants(**constants) -> None:
    common.set_constants(identify, **constants)


def by_name(rows: list[dict]) -> dict[str, dict]:
    return {Path(row["photo"]).name: row for row in rows}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder: people/ to enroll (ann twice, bob, cy), photos/ that ask (ann, bob and a stranger), and val/
    with 4 others, 24 of whose distorted photos are strangers to one another; identify set to them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "FaceNet", ColourNet)
    monkeypatch.setattr(ColourNet, "embedded", 0)
    for name in [name for name in vars(identify) if name.isupper()]:
        monkeypatch.setattr(identify, name, getattr(identify, name))  # each test leaves them as they were
    write(Path("people/ann/clean/ann_1.png"), ANN)
    write(Path("people/ann/clean/ann_2.png"), shade(ANN, 9))
    write(Path("people/ann/distortion/ann_1_foggy.png"), DI)  # never enrolled
    write(Path("people/bob/bob_1.png"), BOB)
    write(Path("people/cy/cy_1.png"), CY)
    write(Path("photos/a.png"), shade(ANN, 3))
    write(Path("photos/more/b.png"), shade(BOB, 3))
    write(Path("photos/more/s.png"), STRANGER)
    for person, colour in {"v1": (200, 10, 30), "v2": (30, 200, 10), "v3": (10, 30, 200), "v4": (200, 200, 10)}.items():
        write(Path(f"val/{person}/1.png"), colour)
        for k in range(6):
            write(Path(f"val/{person}/distortion/1_{'x' * (k + 1)}.png"), shade(colour, 4 * k))
    set_constants(
        **{"PHOTOS": [Path("photos")], "ENROLL": Path("people"), "CALIBRATE_ON": Path("val"), "FALSE_ACCEPT": 0.5},
        **{"CHECKPOINT": None, "PRETRAINED": None, "IMAGE_SIZE": 76, "FACE_CROP": 0.5, "NUM_WORKERS": 0},
    )
    return tmp_path


class RatingNet(ColourNet):
    """A ColourNet that rates: the norm of the mean colour, small where a photo is grey."""

    def rated(self, images):
        return self(images), images.mean((2, 3)).norm(dim=1)


def quality(colour) -> float:
    """RatingNet's, of a photo of one colour."""
    return math.hypot(*((value - 127.5) / 128 for value in colour))


GREY, DULL = (130, 128, 127), (180, 100, 100)  # nothing to see; just enough


@pytest.fixture
def rated(here, monkeypatch) -> Path:
    """`here` with a network that rates, and a grey photo that asks."""
    monkeypatch.setattr(checkpoints, "FaceNet", RatingNet)
    write(Path("photos/grey.png"), GREY)
    write(Path("val/v4/2.png"), DULL)
    return here


# --- answers ----------------------------------------------------------------------------------------------------------


def test_persons_are_named_and_a_stranger_is_unknown(here):
    rows = identify.main()
    assert [(row["photo"], row["status"], row["person"], row["resembles"]) for row in rows] == [
        ("photos/a.png", "named", "ann", "ann"),
        ("photos/more/b.png", "named", "bob", "bob"),
        ("photos/more/s.png", "unknown", None, "cy"),
    ]
    assert rows[1]["score"] == pytest.approx(cosine(shade(BOB, 3), BOB), abs=1e-5)
    assert rows[2]["score"] == pytest.approx(cosine(STRANGER, CY), abs=1e-5) and rows[2]["score"] < rows[2]["threshold"]
    assert all(row["others"] == [] and row["box"] is None and row["reason"] is None for row in rows)


def test_the_threshold_is_that_of_calibrate_on_the_split_and_lies_in_the_gallery(here):
    rows = identify.main()
    reader = identify.FaceReader(torch.device("cpu"))
    others = build_gallery(reader.model, "val", reader.transform, "cpu", template="mean")
    expected = calibrate(others, embed_queries(reader.model, others, "val", reader.transform, "cpu"), 0.5, "val", 0.01)
    assert load_gallery(Path("gallery.pt")).threshold == expected
    assert {row["threshold"] for row in rows} == {expected["cosine"]}
    assert (expected["strangers"], expected["persons"], expected["source"]) == (24, 3, "val")


def test_the_table_lines_up_and_ends_with_counts(here, capsys):
    Path("photos/torn.png").write_bytes(b"no picture")
    identify.main()
    lines = capsys.readouterr().out.splitlines()
    assert "people: 4 photos enrolled" in lines and "gallery.pt: 4 photos of 3 persons, saved" in lines
    assert any("50 % of the 24 strangers' photos in val are, among 3 persons" in line for line in lines)
    table = lines[lines.index(next(line for line in lines if line.startswith("photo "))) :]
    column = {title: table[0].index(title) for title in ("photo", "person", "cosine", "resembles")}
    rows = {line.split()[0]: line for line in table[1:-1]}
    assert rows["photos/more/b.png"][column["person"] :].split() == ["bob", f"{cosine(shade(BOB, 3), BOB):.3f}"]
    unknown = rows["photos/more/s.png"]
    assert unknown[column["person"] :].startswith("unknown ") and unknown[column["resembles"] :] == "cy"
    assert unknown[column["cosine"] :].startswith(f"{cosine(STRANGER, CY):.3f} ")
    assert rows["photos/torn.png"][column["person"] :].startswith("(unreadable) ")
    assert table[-1] == "4 photos: 2 named, 1 unknown, 1 unreadable"


def test_wide_and_unprintable_names_keep_the_columns():
    row = {"status": "named", "score": 0.5, "others": [], "reason": None, "resembles": "x"}
    rows = [
        row | {"photo": photo, "person": photo} for photo in ("a.png", "李小龍.png", "Zoe\u0308.png", "a\nb\udcff.png")
    ]
    lines = identify.table(rows).splitlines()
    assert len({identify.width(line[: line.rindex("0.500")]) for line in lines[1:-1]}) == 1
    assert lines[4].startswith("a\\nb\\udcff.png")
    assert [identify.width(text) for text in ("abc", "李小龍", "e\u0308")] == [3, 6, 1]


@pytest.mark.parametrize("template", ["mean", "best"])
def test_top_shows_the_next_persons_in_order(here, template, capsys):
    set_constants(TOP=2, TEMPLATE=template)
    rows = by_name(identify.main())
    assert [other["person"] for other in rows["a.png"]["others"]] == ["cy"]
    assert rows["a.png"]["others"][0]["score"] == pytest.approx(cosine(shade(ANN, 3), CY), abs=1e-5)
    assert f"cy {cosine(shade(ANN, 3), CY):.3f}" in capsys.readouterr().out
    set_constants(TOP=99)
    assert [[o["person"] for o in row["others"]] for row in identify.main()] == [
        ["cy", "bob"],
        ["cy", "ann"],
        ["bob", "ann"],
    ]


def test_every_person_gets_a_name_without_a_threshold_and_that_is_said(here, capsys):
    set_constants(CALIBRATE_ON=None)
    rows = by_name(identify.main())
    assert rows["s.png"]["status"] == "named" and rows["s.png"]["person"] == "cy"
    assert {row["threshold"] for row in rows.values()} == {None}
    assert "no threshold (CALIBRATE_ON = None): every face is given a name, a stranger's too" in capsys.readouterr().out


def test_a_stranger_named_in_the_calibration_is_counted_as_promised(here):
    # The persons of val ask a gallery of the others alone: of their 24 photos half, and no more, may be named.
    names = ("v1", "v2", "v3", "v4")
    set_constants(ENROLL=Path("val"))
    identify.main()
    kept, named = load_gallery(Path("gallery.pt")), 0
    for name in names:
        set_constants(PHOTOS=[Path(f"val/{name}/distortion")], REMOVE=(name,), CALIBRATE_ON=None)
        rows = identify.main()
        assert name not in load_gallery(Path("gallery.pt")).persons and len(rows) == 6
        named += sum(row["status"] == "named" for row in rows)
    assert 0 < named <= 12 and kept.persons == list(names)


# --- photos -----------------------------------------------------------------------------------------------------------


def test_folders_are_searched_at_any_depth_and_hidden_files_passed_over(here):
    write(Path("photos/deep/er/x.PNG"), ANN)
    write(Path("photos/.thumbs/y.png"), ANN)
    write(Path("photos/.z.png"), ANN)
    Path("photos/note.txt").write_text("no photo")
    found = identify.collect_photos([Path("photos/more/s.png"), Path("photos")])
    assert [path.name for path in found] == ["s.png", "a.png", "x.PNG", "b.png"]


def test_a_photo_named_twice_is_asked_once_and_told(here, capsys):
    set_constants(PHOTOS=[Path("photos/a.png"), "photos", here / "photos" / "a.png"])
    assert [row["photo"] for row in identify.main()] == ["photos/a.png", "photos/more/b.png", "photos/more/s.png"]
    assert "PHOTOS: 2 of 5 are there twice, asked once" in capsys.readouterr().out


def test_a_file_named_itself_is_asked_whatever_its_suffix(here):
    Image.new("RGB", (40, 40), BOB).save("bob.gif")
    set_constants(PHOTOS=[Path("bob.gif")])
    assert [row["person"] for row in identify.main()] == ["bob"]


def test_an_unreadable_photo_has_its_row_and_the_run_goes_on(here):
    Path("photos/torn.png").write_bytes(Path("photos/a.png").read_bytes()[:60])
    rows = by_name(identify.main())
    assert (rows["torn.png"]["status"], rows["torn.png"]["person"], rows["torn.png"]["score"]) == (
        *("unreadable", None, None),
    )
    assert rows["torn.png"]["reason"] and rows["a.png"]["person"] == "ann"


def test_only_unreadable_photos_are_no_reason_to_stop(here, capsys):
    Path("torn.png").write_bytes(b"no picture")
    set_constants(PHOTOS=[Path("torn.png")])
    assert [row["status"] for row in identify.main()] == ["unreadable"]
    assert "1 photos: 0 named, 0 unknown, 1 unreadable" in capsys.readouterr().out


def test_without_photos_the_gallery_alone_is_kept_up(here):
    set_constants(PHOTOS=[])
    assert identify.main() == []
    assert load_gallery(Path("gallery.pt")).persons == ["ann", "bob", "cy"]


# --- the gallery ------------------------------------------------------------------------------------------------------


def stamp() -> tuple[int, bytes]:
    """What changes if gallery.pt is written anew, were it with the same content."""
    return Path("gallery.pt").stat().st_ino, Path("gallery.pt").read_bytes()


def embedded_by(run) -> int:
    before = ColourNet.embedded
    run()
    return ColourNet.embedded - before


def test_a_second_run_embeds_the_photos_asked_alone_and_writes_nothing(here):
    first = []
    assert embedded_by(lambda: first.extend(identify.main())) == 4 + (4 + 24) + 3  # enrolled, calibrated, asked
    before, second = stamp(), []
    assert embedded_by(lambda: second.extend(identify.main())) == 3
    assert stamp() == before and second == first


def test_only_photos_that_are_new_are_embedded_and_enrolled(here):
    identify.main()
    write(Path("people/bob/bob_2.png"), shade(BOB, 12))
    write(Path("people/di/di_1.png"), DI)
    assert embedded_by(identify.main) == 2 + 3
    kept = load_gallery(Path("gallery.pt"))
    assert kept.persons == ["ann", "bob", "cy", "di"] and kept.labels.tolist() == [0, 0, 1, 1, 2, 3]
    names = [path.stem for path in kept.paths]
    assert names == ["ann_1", "ann_2", "bob_1", "bob_2", "cy_1", "di_1"]


@pytest.mark.parametrize("enroll", ["absolute", "none"])
def test_the_same_folder_spelt_otherwise_or_left_out_enrolls_nothing(here, enroll):
    identify.main()
    before = stamp()
    set_constants(ENROLL=here / "people" if enroll == "absolute" else None)
    assert embedded_by(identify.main) == 3
    assert stamp() == before


def test_an_unreadable_photo_is_not_enrolled_and_told(here, capsys):
    Path("people/bob/torn.png").write_bytes(b"no picture")
    identify.main()
    assert "people/bob/torn.png: unreadable (" in capsys.readouterr().out
    assert len(load_gallery(Path("gallery.pt")).paths) == 4


def test_a_removed_person_is_named_no_more_and_not_enrolled_again(here):
    identify.main()
    set_constants(REMOVE=("bob",))
    for _ in range(2):  # bob is still in people/
        rows = by_name(identify.main())
        assert load_gallery(Path("gallery.pt")).persons == ["ann", "cy"]
        assert rows["b.png"]["person"] is None and rows["b.png"]["resembles"] != "bob"
        assert rows["a.png"]["person"] == "ann"
    before = stamp()
    assert embedded_by(identify.main) == 3 and stamp() == before


def test_the_last_person_can_be_replaced_and_not_removed(here):
    shutil.rmtree("people/cy")
    shutil.rmtree("people/bob")
    identify.main()
    set_constants(ENROLL=None, REMOVE=["ann"])
    with pytest.raises(ValueError, match="REMOVE: 'ann' is the last person of the gallery"):
        identify.main()
    write(Path("people/cy/cy_1.png"), CY)
    set_constants(ENROLL=Path("people"))
    identify.main()
    assert load_gallery(Path("gallery.pt")).persons == ["cy"]


@pytest.mark.parametrize("change", [{"FALSE_ACCEPT": 0.6}, {"TEMPLATE": "best"}, {"CALIBRATE_ON": Path("val2")}])
def test_another_rate_template_or_split_is_calibrated_anew_once(here, change):
    identify.main()
    before = load_gallery(Path("gallery.pt")).threshold
    shutil.copytree("val", "val2")
    set_constants(**change)
    assert embedded_by(identify.main) == (4 + 24) + 3
    after = load_gallery(Path("gallery.pt"))
    assert after.threshold != before
    assert (after.threshold["far"], after.template, after.threshold["template"], after.threshold["source"]) == (
        *(identify.FALSE_ACCEPT, identify.TEMPLATE, identify.TEMPLATE, str(identify.CALIBRATE_ON)),
    )
    assert embedded_by(identify.main) == 3


def test_the_threshold_in_the_gallery_needs_its_split_no_more(here):
    rows = identify.main()
    shutil.rmtree("val")
    assert identify.main() == rows
    set_constants(CALIBRATE_ON=None)
    assert identify.main() == rows


def test_a_threshold_for_another_rate_is_not_passed_over_in_silence(here):
    identify.main()
    set_constants(CALIBRATE_ON=None, FALSE_ACCEPT=0.1)
    with pytest.raises(ValueError) as e:
        identify.main()
    assert str(e.value).startswith(
        "gallery.pt: was calibrated for FALSE_ACCEPT = 0.5, TEMPLATE = 'mean', REFUSE = 0.01, here 0.1, 'mean' and "
        "0.01; set them back"
    )


def test_a_gallery_of_many_more_persons_than_were_calibrated_on_is_told(here, capsys):
    identify.main()
    assert "look-alike" not in capsys.readouterr().out
    for number in range(3):
        write(Path(f"people/more{number}/1.png"), (250 - 90 * number, 10 + 90 * number, 130))
    identify.main()
    assert "the gallery has 2.0 times as many persons" in capsys.readouterr().out


def test_a_gallery_of_another_model_is_refused_with_the_difference(here):
    identify.main()
    before = stamp()
    for change, told in (({"PRETRAINED": 1.0}, "fingerprint"), ({"FACE_CROP": 0.6}, "face_crop 0.5, here 0.6")):
        set_constants(PRETRAINED=None, FACE_CROP=0.5)
        set_constants(**change)
        with pytest.raises(ValueError, match=rf"gallery\.pt: made by another model \({told}"):
            identify.main()
    assert stamp() == before


def test_an_error_while_calibrating_or_enrolling_leaves_the_gallery_as_it_was(here):
    identify.main()
    before = stamp()
    write(Path("people/di/di_1.png"), DI)
    set_constants(FALSE_ACCEPT=0.01)
    with pytest.raises(ValueError, match="to know so low a rate takes 1000"):
        identify.main()
    set_constants(FALSE_ACCEPT=0.5, REMOVE=("ann", "nobody"))
    with pytest.raises(ValueError, match="'nobody' is not in the gallery"):
        identify.main()
    assert stamp() == before


def test_image_size_and_crop_come_from_the_checkpoint(here, monkeypatch):
    monkeypatch.setattr(checkpoints, "FaceNet", TinyNet)
    torch.manual_seed(0)
    facts = {"stage": 1, "image_size": 80, "face_crop": 0.7, "dropout": 0.0}
    facts |= {"epoch": 1, "selected_on": "val", "persons": ["ann", "bob"]}
    checkpoints.save_checkpoint(Path("best.pt"), facts, {"model": TinyNet()})
    set_constants(CHECKPOINT=Path("best.pt"), CALIBRATE_ON=None)
    rows = by_name(identify.main())
    made_by = load_gallery(Path("gallery.pt")).made_by
    assert (made_by["image_size"], made_by["face_crop"], made_by["find_faces"]) == (80, 0.7, None)
    assert (rows["a.png"]["person"], rows["b.png"]["person"]) == ("ann", "bob")


# --- photos that are not usable ---------------------------------------------------------------------------------------


def test_a_photo_of_too_low_a_quality_is_not_usable_and_named_nobody(rated, capsys):
    rows = by_name(identify.main())
    least = load_gallery(Path("gallery.pt")).threshold["quality"]
    assert least == pytest.approx(quality(DULL), abs=1e-5)  # the worst of val's clean photos
    grey = rows["grey.png"]
    assert (grey["status"], grey["person"], grey["score"], grey["resembles"]) == ("not usable", None, None, None)
    assert grey["quality"] == pytest.approx(quality(GREY), abs=1e-5) and grey["quality"] < least
    assert grey["reason"] == f"quality {quality(GREY):.2f} of {least:.2f}"
    a = rows["a.png"]
    assert a["status"] == "named" and a["quality"] == pytest.approx(quality(shade(ANN, 3)), abs=1e-5)
    out = capsys.readouterr().out
    assert "(not usable)" in out and "1 not usable" in out.splitlines()[-1]
    assert f"usable from quality {least:.2f} on, as all but 1 % of the clean photos there are" in out


def test_without_a_bound_every_photo_is_usable(rated):
    set_constants(REFUSE=None)
    grey = by_name(identify.main())["grey.png"]
    assert grey["status"] in ("named", "unknown") and grey["quality"] is not None


def test_strangers_whose_photos_are_not_usable_do_not_move_the_threshold(rated):
    identify.main()
    before = load_gallery(Path("gallery.pt")).threshold
    for number in range(30):
        write(Path(f"val/v1/distortion/1_grey{number}.png"), GREY)
    Path("gallery.pt").unlink()
    identify.main()
    after = load_gallery(Path("gallery.pt")).threshold
    assert after["unusable"] == before["unusable"] + 30
    assert after | {"unusable": 0} == before | {"unusable": 0}


def test_enrolling_a_photo_that_is_not_usable_needs_an_explicit_yes(rated, capsys):
    write(Path("people/ann/clean/ann_3.png"), GREY)
    identify.main()
    assert "people/ann/clean/ann_3.png: not usable (quality 0.0" in capsys.readouterr().out
    kept = load_gallery(Path("gallery.pt"))
    assert [path.name for path in kept.paths] == ["ann_1.png", "ann_2.png", "bob_1.png", "cy_1.png"]
    assert kept.quality.tolist() == pytest.approx([quality(c) for c in (ANN, shade(ANN, 9), BOB, CY)], abs=1e-5)
    set_constants(ENROLL_UNUSABLE=True)
    identify.main()
    assert "people: 1 photos enrolled" in capsys.readouterr().out
    assert load_gallery(Path("gallery.pt")).quality[2].item() == pytest.approx(quality(GREY), abs=1e-5)


def test_a_gallery_of_no_usable_photo_is_not_made(rated):
    for photo in Path("people").rglob("*.png"):
        write(photo, GREY)
    with pytest.raises(ValueError, match="ENROLL = people: none of its 4 clean photos shows a usable face"):
        identify.main()
    assert not Path("gallery.pt").exists()


def test_the_quality_that_a_gallery_asks_for_lies_in_it(rated):
    identify.main()
    set_constants(CALIBRATE_ON=None, ENROLL=None)
    assert by_name(identify.main())["grey.png"]["status"] == "not usable"
    set_constants(REFUSE=0.1)
    with pytest.raises(ValueError, match=r"REFUSE = 0\.01, here 0\.5, 'mean' and 0\.1; set them back"):
        identify.main()


@pytest.mark.parametrize("value", [-0.1, 0.3, "0.01", True])
def test_a_share_of_clean_photos_to_refuse_is_checked(rated, value):
    set_constants(REFUSE=value)
    with pytest.raises(ValueError, match=r"REFUSE = .*: expected a share of clean photos, 0\.\.0\.2"):
        identify.main()


def test_an_unusable_photo_is_annotated_as_such(rated):
    set_constants(ANNOTATED=Path("annotated"))
    identify.main()
    assert len(list(Path("annotated").glob("*_grey.jpg"))) == 1


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "constants, error, told",
    [
        ({"PHOTOS": [Path("nowhere")]}, UserError, "PHOTOS: nowhere: no such photo or folder"),
        ({"PHOTOS": [Path("empty")]}, ValueError, "PHOTOS: no photo in empty; name photos, or folders that hold some"),
        ({"PHOTOS": Path("photos")}, ValueError, r"PHOTOS = 'photos': expected a list, \['photos'\]"),
        ({"REMOVE": "bob"}, ValueError, r"REMOVE = 'bob': expected a list, \['bob'\]"),
        (
            {"ENROLL": None},
            UserError,
            r"gallery\.pt: no gallery; set ENROLL to a folder of persons to make one",
        ),
        ({"ENROLL": Path("nowhere")}, UserError, "ENROLL = nowhere: no such folder; correct it"),
        ({"ENROLL": Path("empty")}, ValueError, "empty: no person with a photo; expected empty/<person>/clean"),
        ({"ENROLL": Path("hazy")}, ValueError, "ENROLL = hazy: no clean photo to enroll; expected hazy/<person>"),
        ({"ENROLL": Path("torn")}, ValueError, "ENROLL = torn: none of its 1 clean photos shows a usable face"),
        ({"REMOVE": ["bobb"]}, ValueError, "REMOVE: 'bobb' is not in people, and there is no gallery yet"),
        ({"CALIBRATE_ON": Path("nowhere")}, UserError, "CALIBRATE_ON = nowhere: no such folder; correct it"),
        ({"CALIBRATE_ON": Path("clean")}, ValueError, "CALIBRATE_ON = clean: no distorted photo that could ask"),
        (
            {"FALSE_ACCEPT": 0.1},
            ValueError,
            "CALIBRATE_ON: FALSE_ACCEPT = 0.1: val has 24 usable queries, .* takes 100",
        ),
        ({"FALSE_ACCEPT": 0}, ValueError, "FALSE_ACCEPT = 0: expected a share of strangers, above 0 and below 1"),
        ({"FALSE_ACCEPT": 1.0}, ValueError, "FALSE_ACCEPT = 1.0: expected a share"),
        ({"FALSE_ACCEPT": "1%"}, ValueError, "FALSE_ACCEPT = '1%': expected a share"),
        ({"FALSE_ACCEPT": math.nan}, ValueError, "FALSE_ACCEPT = nan: expected a share"),
        ({"TEMPLATE": "median"}, ValueError, "TEMPLATE = 'median': expected one of 'mean', 'best'"),
        ({"TOP": 0}, ValueError, r"TOP = 0: expected a whole number in 1\.\."),
        ({"MARGIN": -0.1}, ValueError, r"MARGIN = -0\.1: expected a number in 0\.\.3"),
        ({"BATCH_SIZE": 2.5}, ValueError, r"BATCH_SIZE = 2\.5: expected a whole number"),
        ({"ANNOTATED_SIDE": True}, ValueError, "ANNOTATED_SIDE = True: expected a whole number"),
        ({"ANNOTATED": Path("photos/../photos/out")}, ValueError, "lies in photos, where the next run would ask"),
        ({"CHECKPOINT": Path("none.pt")}, UserError, r"none\.pt: no checkpoint; run the stage that writes it"),
        ({"GALLERY": Path("photos/a.png")}, ValueError, r"photos/a\.png: damaged, or not a gallery"),
    ],
)
def test_a_mistake_is_told_in_a_sentence_before_anything_is_written(here, constants, error, told):
    for folder in ("empty", "torn/ann"):
        Path(folder).mkdir(parents=True)
    Path("torn/ann/1.png").write_bytes(b"no picture")
    write(Path("hazy/ann/distortion/1_foggy.png"), ANN)
    write(Path("clean/ann/1.png"), ANN)
    before = sorted(here.rglob("*"))
    set_constants(**constants)
    with pytest.raises(error, match=told):
        identify.main()
    assert sorted(here.rglob("*")) == before


def test_a_misspelt_name_to_remove_is_told_with_the_one_that_may_be_meant(here):
    identify.main()
    set_constants(REMOVE=["bobb"])
    with pytest.raises(ValueError, match=r"REMOVE: 'bobb' is not in the gallery; did you mean 'bob'\?"):
        identify.main()


# --- what is written --------------------------------------------------------------------------------------------------


def test_json_lines_are_the_rows_whatever_the_names(here):
    os.rename("people/bob", "people/Zoë 李")
    raw = os.fsdecode(b"photos/\xff\n.png")  # bytes that are no UTF-8
    write(Path("s.png"), BOB).rename(raw)
    Path("photos/torn.png").write_bytes(b"no picture")
    set_constants(JSON_LINES=Path("out/answers.jsonl"))
    rows = identify.main()
    state_of = Path("out/answers.jsonl").read_bytes().decode("utf-8")
    assert [json.loads(line) for line in state_of.splitlines()] == rows
    assert "Zoë 李" in state_of and raw in [row["photo"] for row in rows]
    assert list(rows[0]) == [
        "photo",
        "status",
        "person",
        "score",
        "threshold",
        "resembles",
        "others",
        "box",
        "reason",
        "quality",
    ]
    assert {row["status"] for row in rows} == {"named", "unknown", "unreadable"}


def test_each_readable_photo_gets_a_picture_of_its_own_though_names_are_alike(here):
    write(Path("photos/more/a.jpg"), BOB)
    write(Path("photos/a.bmp"), STRANGER)
    Path("photos/torn.png").write_bytes(b"no picture")
    set_constants(ANNOTATED=Path("pictures"), ANNOTATED_SIDE=300)
    identify.main()
    names = sorted(path.name for path in Path("pictures").iterdir())
    assert names == ["0001_a.jpg", "0002_a.jpg", "0004_a.jpg", "0005_b.jpg", "0006_s.jpg"]  # 3: torn
    for name in names:
        with Image.open(Path("pictures") / name) as picture:
            assert picture.size == (300, 300)


def pixels_near(picture: Image.Image, colour: str, tolerance: int = 30) -> np.ndarray:
    """(N, 2) columns and rows of the pixels of about that colour; a JPEG's differ a little."""
    wanted = np.array(Image.new("RGB", (1, 1), colour))[0, 0].astype(int)
    return np.argwhere(np.abs(np.array(picture).astype(int) - wanted).max(2) < tolerance)[:, ::-1]


def test_the_picture_shows_what_the_crop_keeps_and_whether_a_name_was_given(here):
    for name, colour in (("ann.png", ANN), ("s.png", STRANGER)):
        write(Path("wide") / name, colour, size=(80, 40))
    set_constants(PHOTOS=[Path("wide")], ANNOTATED=Path("pictures"), ANNOTATED_SIDE=800)
    assert [row["status"] for row in identify.main()] == ["named", "unknown"]
    for name, status in (("0001_ann.jpg", "named"), ("0002_s.jpg", "unknown")):
        with Image.open(Path("pictures") / name) as picture:
            found = pixels_near(picture.convert("RGB"), identify.COLOURS[status])
        lower = found[found[:, 1] > 150]  # under the label
        assert lower.min(0).tolist() == pytest.approx([300, 151], abs=3)  # FACE_CROP = 0.5: 200 of 400 px
        assert lower.max(0).tolist() == pytest.approx([500, 300], abs=3)


@pytest.mark.parametrize("name", ["Zoë 李小龍 محمد 🙂", "a\nb", "\udcff", "x" * 300, "e\u0308" * 40])
@pytest.mark.parametrize("size", [(40, 40), (1000, 20), (3, 2000)])
def test_any_name_can_be_drawn_on_any_picture(here, name, size):
    reader = identify.FaceReader(torch.device("cpu"))
    face = {"status": "named", "person": name, "score": 0.5, "box": [-5.0, -5.0, 20.0, 2500.0]}
    picture = identify.draw(Image.new("RGB", size), [face, face | {"box": None}], reader)
    assert max(picture.size) == identify.ANNOTATED_SIDE
    assert len(pixels_near(picture, identify.COLOURS["named"])) > 0


def test_labels_of_neighbours_do_not_hide_one_another(here):
    reader = identify.FaceReader(torch.device("cpu"))
    face = {"status": "named", "person": "a rather long name", "score": 0.5, "box": [100.0, 100.0, 200.0, 200.0]}
    two = [face, face | {"box": [130.0, 100.0, 230.0, 200.0]}]
    one = pixels_near(identify.draw(Image.new("RGB", (400, 400)), two[:1], reader), identify.COLOURS["named"])
    both = pixels_near(identify.draw(Image.new("RGB", (400, 400)), two, reader), identify.COLOURS["named"])
    below = [int((found[:, 1] > 200 * identify.ANNOTATED_SIDE / 400 + 5).sum()) for found in (one, both)]
    assert below[0] == 0 and below[1] > 1000


# --- faces in loose photos --------------------------------------------------------------------------------------------


class ColouredSquares:
    """FaceDetector's interface: a face is a coloured area between columns that are black."""

    def __init__(self, device, min_face, min_probability):
        pass

    def find(self, image: Image.Image) -> list[Face]:
        bright = np.array(image).max(2) > 20
        columns = np.flatnonzero(np.diff(np.pad(bright.any(0), 1).astype(int)))
        faces = []
        for left, right in zip(columns[::2].tolist(), columns[1::2].tolist(), strict=True):
            rows = np.flatnonzero(bright[:, left:right].any(1))
            faces.append(Face((float(left), float(rows[0]), float(right), float(rows[-1] + 1)), 0.99))
        return sorted(faces, key=lambda face: -face.area)


def write_squares(path: Path, *squares) -> Path:
    """A black photo of 300 x 100 px with squares: (colour, left, side)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    photo = Image.new("RGB", (300, 100))
    for colour, left, side in squares:
        ImageDraw.Draw(photo).rectangle((left, 20, left + side - 1, 20 + side - 1), fill=tuple(colour))
    photo.save(path)
    return path


@pytest.fixture
def loose(here, monkeypatch) -> Path:
    """`here` with faces off the middle of loose photos, a bystander behind ann, and FIND_FACES on."""
    monkeypatch.setattr(identify, "FaceDetector", ColouredSquares)
    for name in ("people", "photos", "val"):
        for path in sorted(Path(name).rglob("*.png")):
            colour = Image.open(path).getpixel((0, 0))
            write_squares(path, (colour, 200, 60))
    write_squares(Path("people/ann/clean/ann_1.png"), (BOB, 10, 30), (ANN, 200, 60))
    set_constants(FIND_FACES=True, MARGIN=0.0)
    return here


def test_each_face_of_a_photo_has_its_row_the_largest_first(loose, capsys):
    write_squares(Path("photos/all.png"), (shade(ANN, 3), 10, 40), (STRANGER, 100, 50), (shade(BOB, 3), 200, 70))
    rows = [row for row in identify.main() if row["photo"] == "photos/all.png"]
    assert [(row["status"], row["person"], row["box"]) for row in rows] == [
        ("named", "bob", [200, 20, 270, 90]),
        ("unknown", None, [100, 20, 150, 70]),
        ("named", "ann", [10, 20, 50, 60]),
    ]
    assert rows[2]["score"] == pytest.approx(1, abs=1e-3)
    assert "4 photos: 4 named, 2 unknown" in capsys.readouterr().out


def test_a_photo_without_a_face_says_so_and_is_no_guess(loose, capsys):
    write_squares(Path("photos/empty.png"))
    row = by_name(identify.main())["empty.png"]
    assert (row["status"], row["person"], row["score"], row["resembles"], row["box"]) == ("no face", *[None] * 4)
    printed = capsys.readouterr().out
    assert "(no face)" in printed and "4 photos: 2 named, 1 unknown, 1 without a face" in printed


def test_where_no_photo_shows_a_face_all_rows_say_so(loose):
    write_squares(Path("empty/1.png"))
    write_squares(Path("empty/2.png"))
    set_constants(PHOTOS=[Path("empty")], ANNOTATED=Path("pictures"))
    assert [row["status"] for row in identify.main()] == ["no face", "no face"]
    assert len(list(Path("pictures").iterdir())) == 2


def test_the_largest_face_of_a_clean_photo_is_enrolled(loose, caplog):
    identify.main()
    kept = load_gallery(Path("gallery.pt"))
    assert kept.paths[0] == Path("people/ann/clean/ann_1.png") and kept.persons == ["ann", "bob", "cy"]
    assert not caplog.messages  # the bystander has not been tried
    assert len(kept.paths) == 4 and kept.embeddings[0].tolist() == pytest.approx(direction(ANN), abs=1e-5)


def test_a_clean_photo_without_a_face_is_not_enrolled_and_told(loose, capsys):
    write_squares(Path("people/bob/bob_2.png"))
    write_squares(Path("people/di/di_1.png"))
    identify.main()
    assert load_gallery(Path("gallery.pt")).persons == ["ann", "bob", "cy"]
    assert "people/di/di_1.png: no face, not enrolled" in capsys.readouterr().out


def test_where_no_clean_photo_shows_a_face_there_is_no_gallery(loose):
    write_squares(Path("faceless/di/di_1.png"))
    set_constants(ENROLL=Path("faceless"))
    with pytest.raises(ValueError, match="ENROLL = faceless: none of its 1 clean photos shows a usable face"):
        identify.main()


def test_the_threshold_is_calibrated_on_faces_found_in_the_same_way(loose, capsys):
    write_squares(Path("val/v1/distortion/1_hidden.png"))
    write_squares(Path("val/v2/1.png"), (CY, 10, 30), ((30, 200, 10), 200, 60))  # a bystander is nobody's photo
    identify.main()
    assert "val: a face found in 28 of 29 photos, the others do not ask" in capsys.readouterr().out
    framed = load_gallery(Path("gallery.pt")).threshold
    assert framed["strangers"] == 24 and framed["source"] == "val"
    # The same colours filling their photos give the same cosines.
    for path in Path("val").rglob("*.png"):
        faces = ColouredSquares(None, 0, 0).find(Image.open(path))
        write(path, Image.open(path).getpixel(faces[0].box[:2])) if faces else path.unlink()  # the largest
    set_constants(FIND_FACES=False, FACE_CROP=1.0, GALLERY=Path("other.pt"))
    identify.main()
    assert load_gallery(Path("other.pt")).threshold["cosine"] == pytest.approx(framed["cosine"], abs=1e-5)


@pytest.mark.parametrize("part, told", [("distortion/1_*.png", "distorted"), ("1.png", "clean")])
def test_a_split_without_a_face_to_calibrate_on_is_told(loose, part, told):
    for path in Path("val").glob(f"*/{part}"):
        write_squares(path)
    with pytest.raises(ValueError, match=f"CALIBRATE_ON = val: no face found in any of its {told} photos"):
        identify.main()


def test_galleries_of_photos_framed_otherwise_do_not_mix(loose):
    identify.main()
    before = stamp()
    for change, told in (
        ({"MARGIN": 0.1}, r"find_faces 0\.0, here 0\.1"),
        ({"FIND_FACES": False, "FACE_CROP": 1.0}, r"find_faces 0\.0, here None"),
    ):
        set_constants(FIND_FACES=True, MARGIN=0.0)
        set_constants(**change)
        with pytest.raises(ValueError, match=rf"gallery\.pt: made by another model \({told}\)"):
            identify.main()
    set_constants(FIND_FACES=True, FACE_CROP=0.9)  # of whole photos, and not looked at here
    identify.main()
    assert stamp() == before


def test_the_margin_widens_what_the_network_sees(loose):
    set_constants(MARGIN=1.0, CALIBRATE_ON=None, PHOTOS=[])
    identify.main()
    kept = load_gallery(Path("gallery.pt"))
    quarter = [value / 4 for value in CY]  # twice the side: three quarters of it are black
    assert kept.embeddings[-1].tolist() == pytest.approx(direction(quarter), abs=0.02)


def test_the_picture_frames_each_face_where_it_was_found(loose):
    write_squares(Path("photos/two.png"), (shade(ANN, 3), 10, 40), (STRANGER, 200, 70))
    set_constants(ANNOTATED=Path("pictures"), ANNOTATED_SIDE=900, PHOTOS=[Path("photos/two.png")])
    identify.main()
    with Image.open("pictures/0001_two.jpg") as picture:
        for status, box in (("named", (30, 60, 150, 180)), ("unknown", (600, 60, 810, 270))):
            found = pixels_near(picture.convert("RGB"), identify.COLOURS[status])
            lower = found[found[:, 1] >= box[1] + 5]
            assert (lower[:, 0].min(), lower[:, 0].max()) == pytest.approx((box[0], box[2]), abs=4)
            assert lower[:, 1].max() == pytest.approx(box[3], abs=4)


# --- a real network ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """people/ (4 persons, a photo each), photos/ (another of each, and 4 strangers), val/ (4 persons, 20 queries)."""
    weights, faces = SHARED / "weights" / "facenet_msceleb_fp16.pt", SHARED / "lfw_faces" / "facecom" / "train"
    if not weights.is_file() or not faces.is_dir():
        pytest.skip("needs the real faces and weights")
    root = tmp_path_factory.mktemp("real")
    several = [person for person in sorted(faces.iterdir()) if len(list(person.glob("*.jpg"))) >= 6]
    for number, person in enumerate(several[:12]):
        photos = sorted(person.glob("*.jpg"))
        targets = {0: {f"people/{person.name}": 1, "photos": 2}, 1: {"photos": 1}}.get(number // 4)
        if targets is None:
            targets = {f"val/{person.name}": 1, f"val/{person.name}/distortion": 6}
        first = 0
        for folder, end in targets.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for photo in photos[first:end]:
                shutil.copy(photo, root / folder)
            first = end
    return root


@pytest.mark.parametrize("find_faces", [False, True])
def test_real_faces_are_named_and_real_strangers_are_not(real, monkeypatch, find_faces):
    monkeypatch.chdir(real)
    for name in [name for name in vars(identify) if name.isupper()]:
        monkeypatch.setattr(identify, name, getattr(identify, name))
    set_constants(
        **{"PHOTOS": [Path("photos")], "ENROLL": Path("people"), "CALIBRATE_ON": Path("val"), "FALSE_ACCEPT": 0.5},
        **{"CHECKPOINT": None, "PRETRAINED": SHARED / "weights" / "facenet_msceleb_fp16.pt", "NUM_WORKERS": 0},
        **{"FIND_FACES": find_faces, "GALLERY": Path(f"faces_{find_faces}.pt"), "REFUSE": None},
    )
    largest = {}
    for row in identify.main():
        largest.setdefault(Path(row["photo"]).stem[:-5], row)
    enrolled = {path.name for path in Path("people").iterdir()}
    assert len(enrolled) == 4 and len(largest) == 8
    for person, row in largest.items():
        if person in enrolled:
            assert row["person"] == person and row["score"] > 0.5
        else:
            assert row["score"] < 0.5
