"""identify.main() on photos of one colour each, whose cosines can be worked out by hand."""

import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny_net import TinyNet
from torch import nn

import calibration
import checkpoints
import framing
import identify
from answers import COLOURS, Answer
from calibration import calibrate
from common import UserError
from enrolment import load_gallery
from faces import Face
from gallery import Gallery, build_gallery, embed_queries
from models import Crops

ANN, BOB, CY, DI = (220, 40, 40), (40, 220, 40), (40, 40, 220), (220, 220, 40)
STRANGER = (200, 215, 230)  # away from all of them, and nearest to cy
GREY, DULL = (130, 128, 127), (180, 100, 100)  # nothing to see; just enough


class ColourNet(nn.Module):
    """FaceNet's interface; an image's mean colour, and its norm as quality. `pretrained` is its one weight."""

    rates, crops = False, None
    embedded = 0  # images so far

    def __init__(self, pretrained=None, dropout=0.0, freeze_until=None):
        super().__init__()
        self.register_buffer("weight", torch.tensor(float(pretrained or 0)))

    def forward(self, images):
        return self.rated(images)[0]

    def rated(self, images):
        ColourNet.embedded += len(images)
        colour = images.mean((2, 3))
        return nn.functional.normalize(colour), colour.norm(dim=1)


def quality(colour) -> float:
    """ColourNet's, of a photo of one colour: small where it is grey."""
    return math.hypot(*((value - 127.5) / 128 for value in colour))


def direction(colour) -> list[float]:
    """ColourNet's embedding of a photo of one colour."""
    values = [value - 127.5 for value in colour]
    return [value / math.hypot(*values) for value in values]


def cosine(a, b) -> float:
    return sum(x * y for x, y in zip(direction(a), direction(b), strict=True))


def write(path: Path | str, colour, size=(40, 40)) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(colour)).save(path)
    return path


def shade(colour, k: int) -> tuple:
    """A little off `colour`, another way for each k in 0..25."""
    return colour[0] - k, colour[1] + k // 2, colour[2] + k


def by_name(answers: list[Answer]) -> dict[str, Answer]:
    return {Path(answer.photo).name: answer for answer in answers}


def kept() -> Gallery:
    return load_gallery(Path("gallery.pt"))


@pytest.fixture
def constants(monkeypatch) -> None:
    """Tests set identify's constants, which are put back afterwards."""
    for name in [name for name in vars(identify) if name.isupper()]:
        monkeypatch.setattr(identify, name, getattr(identify, name))


@pytest.fixture
def here(tmp_path, monkeypatch, constants) -> Path:
    """The current folder: people/ to enroll (ann twice, bob, cy), photos/ to identify (ann, bob and a stranger), and
    val/ with 4 others and 24 distorted photos of them; identify set to these."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "FaceNet", ColourNet)
    write("people/ann/clean/ann_1.png", ANN)
    write("people/ann/clean/ann_2.png", shade(ANN, 9))
    write("people/ann/distortion/ann_1_foggy.png", DI)  # never enrolled
    write("people/bob/bob_1.png", BOB)
    write("people/cy/cy_1.png", CY)
    write("photos/a.png", shade(ANN, 3))
    write("photos/more/b.png", shade(BOB, 3))
    write("photos/more/s.png", STRANGER)
    for person, colour in {"v1": (200, 10, 30), "v2": (30, 200, 10), "v3": (10, 30, 200), "v4": (200, 200, 10)}.items():
        write(f"val/{person}/1.png", colour)
        for k in range(6):
            write(f"val/{person}/distortion/1_{'x' * (k + 1)}.png", shade(colour, 4 * k))
    identify.PHOTOS, identify.ENROLL, identify.CALIBRATE_ON = [Path("photos")], Path("people"), Path("val")
    identify.FALSE_ACCEPT, identify.NUM_WORKERS = 0.5, 0
    identify.CHECKPOINT, identify.PRETRAINED, identify.IMAGE_SIZE, identify.FACE_CROP = None, None, 76, 0.5
    return tmp_path


# --- answers ----------------------------------------------------------------------------------------------------------


def test_persons_get_their_names_a_stranger_is_unknown_and_the_table_says_so(here, capsys):
    Path("photos/torn.png").write_bytes(Path("photos/a.png").read_bytes()[:60])
    answers = identify.main()
    assert [(answer.photo, answer.status, answer.person, answer.resembles) for answer in answers] == [
        ("photos/a.png", "named", "ann", "ann"),
        ("photos/torn.png", "unreadable", None, None),
        ("photos/more/b.png", "named", "bob", "bob"),
        ("photos/more/s.png", "unknown", None, "cy"),
    ]
    of_bob, of_stranger = cosine(shade(BOB, 3), BOB), cosine(STRANGER, CY)
    assert (answers[2].score, answers[3].score) == pytest.approx((of_bob, of_stranger), abs=1e-5)
    assert answers[3].score < answers[3].threshold and answers[1].score is None and answers[1].reason
    assert all(answer.others == [] and answer.box is None for answer in answers)
    lines = capsys.readouterr().out.splitlines()
    assert (
        "people: 4 photos new, 0 changed, 0 moved, 0 missing" in lines
        and "gallery.pt: 4 photos of 3 persons, saved" in lines
    )
    assert any("50 % of the 24 photos of strangers in val reach it, among 3 persons" in line for line in lines)
    header, _, torn, bob, stranger, counts = lines[-6:]
    person, score, similar = (header.index(title) for title in ("person", "cosine", "similar to"))
    assert bob[person:].split() == ["bob", f"{of_bob:.3f}"] and torn[person:].startswith("(unreadable) ")
    assert (stranger[person:score].strip(), stranger[similar:]) == ("unknown", "cy")
    assert stranger[score:].startswith(f"{of_stranger:.3f} ")
    assert counts == "4 photos: 2 named, 1 unknown, 1 unreadable"
    identify.PHOTOS = [Path("photos/torn.png")]
    assert identify.main() == [answers[1]]
    assert "1 photo: 0 named, 0 unknown, 1 unreadable" in capsys.readouterr().out


def test_the_threshold_is_calibrated_on_the_split_and_kept_in_the_gallery(here):
    answers = identify.main()
    reader = identify.FaceReader(torch.device("cpu"))
    transform = reader.transform(None)
    others = build_gallery(reader.model, "val", transform, "cpu", template="mean")
    queries = embed_queries(reader.model, others, "val", transform, "cpu")
    expected = calibrate(others, queries, far=0.5, source="val", refuse=0.01)
    content = kept().threshold["content"]  # identifies the photos of val
    assert kept().threshold == expected | {"content": content} and {answer.threshold for answer in answers} == {
        expected["cosine"]
    }
    assert (expected["strangers"], expected["persons"], expected["source"]) == (24, 3, "val")
    shutil.rmtree("val")  # needed no more
    assert identify.main() == answers
    identify.CALIBRATE_ON = None
    assert identify.main() == answers


@pytest.mark.parametrize("template", ["mean", "best"])
def test_top_shows_the_next_persons_in_order(here, template, capsys):
    identify.TOP, identify.TEMPLATE = 2, template
    others = by_name(identify.main())["a.png"].others
    assert others == [{"person": "cy", "score": pytest.approx(cosine(shade(ANN, 3), CY), abs=1e-5)}]
    assert f"cy {cosine(shade(ANN, 3), CY):.3f}" in capsys.readouterr().out
    identify.TOP = 99
    names = [[other["person"] for other in answer.others] for answer in identify.main()]
    assert names == [["cy", "bob"], ["cy", "ann"], ["bob", "ann"]]


def test_where_faces_are_detected_the_answers_say_where(here, monkeypatch):
    def find_box(image, detector):
        return None if image.info["path"].name == "s.png" else (0.25, 0.2, 0.75, 0.8)

    monkeypatch.setattr(framing, "find_box", find_box)
    identify.FRAMING = "detected"
    answers = by_name(identify.main())
    assert answers["a.png"].box == pytest.approx((10, 8, 30, 32)) and answers["s.png"].box is None
    assert (answers["a.png"].person, answers["b.png"].person) == ("ann", "bob")
    assert kept().made_by["framing"] == "detected"


def test_without_a_threshold_every_person_gets_a_name_with_a_warning(here, capsys):
    identify.CALIBRATE_ON = None
    stranger = by_name(identify.main())["s.png"]
    assert (stranger.status, stranger.person, stranger.threshold) == ("named", "cy", None)
    assert "no threshold: every face gets a name, a stranger's too" in capsys.readouterr().out


def test_visible_photos_of_folders_are_collected_at_any_depth_and_each_once(here, capsys):
    for name in ("deep/er/x.PNG", ".thumbs/y.png", ".z.png"):
        write(f"photos/{name}", ANN)
    Path("photos/note.txt").write_text("no photo")
    Image.new("RGB", (40, 40), BOB).save("bob.gif")  # given itself: any suffix
    places = [Path("photos/more/s.png"), "photos", here / "photos" / "a.png", Path("bob.gif")]
    assert [path.name for path in identify.collect_photos("PHOTOS", places)] == [
        "s.png",
        "a.png",
        "x.PNG",
        "b.png",
        "bob.gif",
    ]
    assert "PHOTOS: 2 of 7 photos are repeats, skipped" in capsys.readouterr().out


# --- the gallery ------------------------------------------------------------------------------------------------------


def stamp() -> tuple[int, bytes]:
    """Changes whenever gallery.pt is written, even with equal bytes."""
    return Path("gallery.pt").stat().st_ino, Path("gallery.pt").read_bytes()


def counted_run() -> tuple[list[Answer], int]:
    """identify.main(), and the number of images that it embedded."""
    before = ColourNet.embedded
    return identify.main(), ColourNet.embedded - before


def test_a_second_run_embeds_only_the_photos_to_identify_and_writes_nothing(here):
    answers, embedded = counted_run()
    assert embedded == 4 + (4 + 24) + 3  # enrolled, calibrated, identified
    before = stamp()
    for enroll in (Path("people"), here / "people", None):  # the same folder spelt differently, or left out
        identify.ENROLL = enroll
        assert counted_run() == (answers, 3)
    assert stamp() == before


def test_only_new_readable_photos_are_embedded_and_enrolled(here, capsys):
    identify.PHOTOS = []
    assert identify.main() == [] and kept().persons == ["ann", "bob", "cy"]
    write("people/bob/bob_2.png", shade(BOB, 12))
    write("people/di/di_1.png", DI)
    Path("people/di/torn.png").write_bytes(b"no picture")
    assert counted_run()[1] == 2
    assert "people/di/torn.png: unreadable (" in capsys.readouterr().out
    assert kept().persons == ["ann", "bob", "cy", "di"] and kept().labels.tolist() == [0, 0, 1, 1, 2, 3]
    assert [path.stem for path in kept().paths] == ["ann_1", "ann_2", "bob_1", "bob_2", "cy_1", "di_1"]


def test_a_removed_person_gets_no_name_and_is_not_enrolled_again(here, capsys):
    identify.main()
    identify.REMOVE = ("bob",)
    for _ in range(2):  # bob is still in people/
        answers = by_name(identify.main())
        assert kept().persons == ["ann", "cy"] and answers["a.png"].person == "ann"
        assert answers["b.png"].person is None and answers["b.png"].resembles != "bob"
    before = stamp()
    assert counted_run()[1] == 3 and stamp() == before
    write("people/di/di_1.png", DI)
    assert "REMOVE: bob was removed, 1 photo" in capsys.readouterr().out.splitlines()
    identify.REMOVE = ("ann", "bob", "cy")
    identify.main()
    assert kept().persons == ["di"]  # enrolled first: a gallery cannot lose its last person


def test_a_name_that_is_not_enrolled_is_no_error_and_the_likely_one_is_named(here, capsys):
    identify.REMOVE, identify.LIST = ("bobb", "Zoe"), True
    identify.main()
    lines = capsys.readouterr().out.splitlines()
    assert "REMOVE: bobb is not enrolled; did you mean 'bob'?" in lines and "REMOVE: Zoe is not enrolled" in lines
    assert lines.count("  ann: 2 photos") == lines.count("  cy: 1 photo") == 1


def test_photos_named_on_the_command_line_are_identified_instead(here):
    Path("gallery.pt").touch()
    command = [sys.executable, identify.__file__, "nowhere.jpg", "photos"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=here)
    assert found.returncode == 1 and "PHOTOS: nowhere.jpg: no such photo or folder" in found.stderr


def enroll_one(folder: Path) -> None:
    identify.ENROLL = folder
    identify.main()


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_8_scripts_that_enroll_at_once_lose_no_person(here):
    identify.PHOTOS, identify.CALIBRATE_ON = [], None
    for number in range(8):
        write(f"parts/{number}/p{number}/1.png", (100 + 20 * number, 250 - 20 * number, 40))
    fork = multiprocessing.get_context("fork")
    scripts = [fork.Process(target=enroll_one, args=(folder,)) for folder in sorted(Path("parts").iterdir())]
    for script in scripts:
        script.start()
    for script in scripts:
        script.join()
    assert [script.exitcode for script in scripts] == [0] * 8
    assert kept().persons == [f"p{number}" for number in range(8)]


def last_summary(capsys) -> str:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{identify.ENROLL}: ")][-1]


def test_photos_that_change_move_or_vanish_are_followed_and_a_line_says_so(here, capsys, caplog):
    identify.PHOTOS = []
    identify.main()
    write("people/bob/bob_1.png", STRANGER)  # under the same name
    assert counted_run()[1] == 1
    assert last_summary(capsys) == "people: 0 photos new, 1 changed, 0 moved, 0 missing"
    assert kept().persons == ["ann", "bob", "cy"] and kept().labels.tolist() == [0, 0, 1, 2]
    assert kept().embeddings[2].tolist() == pytest.approx(direction(STRANGER), abs=1e-5)
    os.rename("people", "persons")
    identify.ENROLL = Path("persons")
    assert counted_run()[1] == 0 and kept().paths[0] == here / "persons/ann/clean/ann_1.png"
    assert last_summary(capsys) == "persons: 0 photos new, 0 changed, 4 moved, 0 missing"
    before = stamp()
    shutil.rmtree("persons/bob")
    for _ in range(2):
        assert counted_run()[1] == 0 and stamp() == before
        assert last_summary(capsys) == (
            "persons: 0 photos new, 0 changed, 0 moved, 1 missing; "
            "the missing ones stay enrolled (bob), REMOVE takes persons out"
        )
    identify.REMOVE = ("bob",)
    identify.main()
    assert last_summary(capsys).endswith(" 0 missing") and kept().persons == ["ann", "cy"] and not caplog.messages


def test_a_copy_of_an_enrolled_photo_is_not_embedded_on_each_run(here, capsys, caplog):
    identify.PHOTOS = []
    identify.main()
    shutil.copy("people/bob/bob_1.png", "people/bob/bob_2.png")
    assert counted_run()[1] == 0 and not caplog.messages
    assert last_summary(capsys).endswith("0 missing; 1 copy of others left out")


def test_a_photo_replaced_by_one_that_cannot_be_used_stays_enrolled(here, capsys):
    identify.PHOTOS = []
    identify.main()
    Path("people/bob/bob_1.png").write_bytes(b"half a pict")
    identify.main()
    out = capsys.readouterr().out
    assert "people/bob/bob_1.png: unreadable (" in out and "the photo enrolled from there before stays" in out
    assert kept().persons == ["ann", "bob", "cy"]
    assert kept().embeddings[2].tolist() == pytest.approx(direction(BOB), abs=1e-5)


@pytest.mark.parametrize("typed, folder", [("Jos\u00e9", "Jose\u0301"), ("Jose\u0301", "Jos\u00e9")])
def test_a_person_is_removed_by_a_name_in_either_unicode_form(here, typed, folder):
    os.rename("people/bob", f"people/{folder}")
    identify.main()
    assert kept().persons == ["Jos\u00e9", "ann", "cy"]
    identify.REMOVE = (typed,)
    for _ in range(2):
        identify.main()
        assert kept().persons == ["ann", "cy"]


def test_a_gallery_behind_a_symlink_stays_there(here):
    (here / "disk").mkdir()
    Path("gallery.pt").symlink_to("disk/gallery.pt")
    for remove in ((), ("bob",)):
        identify.REMOVE = remove
        identify.main()
        assert Path("gallery.pt").is_symlink() and not Path("disk/gallery.pt").is_symlink()
    assert load_gallery(Path("disk/gallery.pt")).persons == ["ann", "cy"]


@pytest.mark.parametrize(
    "name, value", [("FALSE_ACCEPT", 0.6), ("TEMPLATE", "best"), ("CALIBRATE_ON", Path("val2")), ("REFUSE", 0.1)]
)
def test_another_setting_of_the_calibration_calibrates_again_once(here, name, value):
    identify.main()
    before = kept().threshold
    shutil.copytree("val", "val2")
    write("val2/v1/1.png", (190, 20, 30))
    setattr(identify, name, value)
    assert counted_run()[1] == (4 + 24) + 3
    after = kept().threshold
    assert after != before and kept().template == after["template"] == identify.TEMPLATE
    expected = (identify.FALSE_ACCEPT, identify.REFUSE, str(identify.CALIBRATE_ON))
    assert (after["far"], after["refuse"], after["source"]) == expected
    assert counted_run()[1] == 3


def test_the_split_is_known_by_its_photos_not_by_its_name(here):
    identify.main()
    before = kept().threshold
    shutil.copytree("val", "elsewhere/copy")
    for same in (Path("val").absolute(), Path("elsewhere/copy")):
        identify.CALIBRATE_ON = same
        assert counted_run()[1] == 3 and kept().threshold == before
    write("elsewhere/copy/v1/distortion/1_new.png", CY)
    assert counted_run()[1] == (4 + 25) + 3 and kept().threshold["strangers"] == 25
    identify.CALIBRATE_ON = Path("val")
    write("val/v1/distortion/1_x.png", CY)  # another photo under its old name
    assert counted_run()[1] == (4 + 24) + 3


def test_too_few_queries_for_the_rate_are_refused_before_anything_is_embedded(here, monkeypatch):
    identify.FALSE_ACCEPT = 0.001
    monkeypatch.setattr(identify, "embed_split", None)
    with pytest.raises(UserError, match="val has 24 usable queries, but measuring so low a rate takes 10000"):
        identify.main()


def test_the_same_picture_in_other_bytes_is_counted_as_a_copy(here, capsys):
    Image.open("people/bob/bob_1.png").save("people/bob/again.bmp")
    identify.main()
    assert "people: 4 photos new, 0 changed, 0 moved, 0 missing; 1 copy of others left out" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["gallery.pt", "net.pt", "photos/a.png"])
def test_json_lines_overwrite_no_file_that_is_read(here, place):
    identify.main()
    write("net.png", ANN).rename("net.pt")
    before, identify.JSON_LINES, identify.CHECKPOINT = Path(place).read_bytes(), here / place, Path("net.pt")
    with pytest.raises(UserError, match=f"JSON_LINES = .*{place}: would overwrite a file that is read"):
        identify.main()
    assert Path(place).read_bytes() == before


def test_a_checkpoint_given_as_the_gallery_is_not_to_be_deleted(here):
    torch.save({"format": 3, "stage": 1, "model": {}}, "gallery.pt")
    with pytest.raises(UserError, match=r"^gallery.pt: not a gallery of these scripts; correct GALLERY$"):
        identify.main()


def test_photos_may_lie_in_the_home_folder(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    identify.PHOTOS = ["~/photos"]
    assert [answer.person for answer in identify.main()] == ["ann", "bob", None]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"PHOTOS": None}, r"PHOTOS = None: expected a list of paths; \[\] for none"),
        ({"PHOTOS": [3]}, r"PHOTOS = \[3\]: expected a list of paths"),
        ({"REMOVE": None}, "REMOVE = None: expected a list of names of persons"),
        (
            {"REMOVE": ("ann", "bob", "cy", "di"), "GALLERY": Path("new.pt")},
            "REMOVE: names every person of people, so nobody is left",
        ),
        ({"PRETRAINED": 1.0}, r"gallery\.pt: made by another model \(fingerprint"),
        ({"FACE_CROP": 0.6}, r"gallery\.pt: made by another model \(face_crop 0\.5, here 0\.6\)"),
        ({"FALSE_ACCEPT": 0.01}, "measuring so low a rate takes 1000"),
        ({"CALIBRATE_ON": None, "FALSE_ACCEPT": 0.1}, r"FALSE_ACCEPT = 0\.5, TEMPLATE = 'mean', .* now 0\.1, 'mean'"),
        ({"CALIBRATE_ON": None, "REFUSE": 0.1}, r"REFUSE = 0\.01, now 0\.5, 'mean' and 0\.1; set them back"),
        ({"REMOVE": ("ann", "bob", "cy", "di")}, "cannot remove 'cy', the last person in the gallery"),
    ],
)
def test_an_error_leaves_the_gallery_unchanged(here, changes, message):
    identify.main()
    before = stamp()
    write("people/di/di_1.png", DI)
    for name, value in changes.items():
        setattr(identify, name, value)
    with pytest.raises(UserError, match=message):
        identify.main()
    assert stamp() == before


@pytest.fixture
def calibrated(here, monkeypatch):
    """Gives the network of `here` a calibration of its own."""
    load_model = checkpoints.load_model

    def give(calibration: dict) -> None:
        def loaded(checkpoint, pretrained, image_size, face_crop, device, framing):
            model, facts = load_model(None, pretrained, image_size, face_crop, device, framing)
            return model, facts | {"calibration": calibration}

        monkeypatch.setattr(checkpoints, "load_model", loaded)
        identify.CHECKPOINT = Path("best.pt")

    return give


CALIBRATION = {"pairs": 12000, "queries": 300, "persons": 41, "clean": 60, "quality": None}
CALIBRATION["cosines"] = {"mean": {"0.1": 0.2, "0.01": 0.95, "0.001": 0.98}, "best": {"0.1": 0.3, "0.01": 0.96}}


@pytest.mark.parametrize(
    "false_accept, cosine, share",
    [(0.5, 0.2, "30"), (0.05, 0.95, "3"), (0.004, 0.98, "0.3"), (1e-4, 0.98, "0.3")],  # of pairs, times three persons
)
def test_without_a_split_the_checkpoints_own_calibration_counts(calibrated, capsys, false_accept, cosine, share):
    calibrated(CALIBRATION)
    identify.CALIBRATE_ON, identify.FALSE_ACCEPT = None, false_accept
    assert {answer.threshold for answer in identify.main()} == {cosine}
    said = (
        f"named at cosine >= {cosine:.3f}: about {share} % of strangers' photos reach it among 3 persons, by the calib"
    )
    out = capsys.readouterr().out
    assert said in out
    too_low = false_accept < 0.003  # the lowest rate measured, times three
    assert (f"more than FALSE_ACCEPT = {false_accept:g}, for so few pairs measure no lower rate" in out) == too_low
    write("people/di/di_1.png", DI)  # the rate follows the gallery
    identify.main()
    assert "among 4 persons, by the calibration of best.pt (300 photos in 12000 pairs" in capsys.readouterr().out
    identify.CALIBRATE_ON, identify.FALSE_ACCEPT = Path("val"), 0.5
    assert identify.main()[0].threshold not in CALIBRATION["cosines"]["mean"].values()


def test_a_threshold_by_hand_comes_before_all(calibrated, capsys):
    calibrated(CALIBRATION)
    identify.THRESHOLD = 0.9
    answers = identify.main()
    assert {answer.threshold for answer in answers} == {0.9} and answers[0].person == "ann"
    assert "named at cosine >= 0.900, by THRESHOLD" in capsys.readouterr().out
    identify.THRESHOLD, identify.CALIBRATE_ON = None, None  # it is not kept
    identify.FALSE_ACCEPT = 0.05
    assert identify.main()[0].threshold == 0.95


def test_pairs_are_compared_by_the_calibration_or_by_hand_and_no_gallery_is_touched(calibrated, capsys):
    calibrated(CALIBRATION)
    Path("pairs.csv").write_text("photos/a.png,people/ann/clean/ann_1.png\nphotos/a.png,people/bob/bob_1.png\n")
    identify.PAIRS, identify.CALIBRATE_ON, identify.ENROLL, identify.PHOTOS = Path("pairs.csv"), None, None, ["nowhere"]
    identify.FALSE_ACCEPT, identify.JSON_LINES = 0.01, Path("pairs.jsonl")
    same, different = identify.main()
    assert (same.status, different.status) == ("same", "different") and not Path("gallery.pt").exists()
    assert same.cosine == pytest.approx(cosine(shade(ANN, 3), ANN), abs=1e-5) and same.threshold == 0.96
    assert same.far == 0.01 and "at most 1 % of pairs of different persons reach it" in capsys.readouterr().out
    assert [json.loads(line)["status"] for line in Path("pairs.jsonl").read_text().splitlines()] == [
        "same",
        "different",
    ]
    identify.PAIRS, identify.THRESHOLD = ["photos/a.png", "people/bob/bob_1.png"], -1.0
    assert [answer.status for answer in identify.main()] == ["same"]


def test_a_damaged_calibration_is_refused(calibrated):
    calibrated({"cosines": [1]})
    identify.CALIBRATE_ON = None
    with pytest.raises(UserError, match=r"best\.pt: its calibration is damaged; train it again, or set CALIBRATE_ON"):
        identify.main()


def test_image_size_and_crop_come_from_the_checkpoint(here, monkeypatch):
    monkeypatch.setattr(checkpoints, "FaceNet", TinyNet)
    torch.manual_seed(0)
    facts = {"stage": 1, "image_size": 80, "face_crop": 0.7, "dropout": 0.0}
    facts |= {"epoch": 1, "selected_on": "val", "persons": ["ann", "bob"], "holdout": [], "pretrained": "None"}
    checkpoints.save_checkpoint(Path("best.pt"), facts, {"model": TinyNet()})
    identify.CHECKPOINT, identify.CALIBRATE_ON = Path("best.pt"), None
    answers = by_name(identify.main())
    made_by = kept().made_by
    assert (made_by["image_size"], made_by["face_crop"], made_by["find_faces"]) == (80, 0.7, None)
    assert (answers["a.png"].person, answers["b.png"].person) == ("ann", "bob")


# --- photos that are not usable ---------------------------------------------------------------------------------------


@pytest.fixture
def rated(here, monkeypatch) -> Path:
    """`here` with a network that rates, and a grey photo to identify."""
    monkeypatch.setattr(ColourNet, "rates", True)
    monkeypatch.setattr(calibration, "LEAST_RATED", 5)
    write("photos/grey.png", GREY)
    write("val/v4/2.png", DULL)
    return here


def test_a_photo_of_too_low_a_quality_is_not_usable_and_gets_no_name(rated, capsys):
    identify.ANNOTATED = Path("annotated")
    answers = by_name(identify.main())
    bound = kept().threshold["quality"]
    assert bound == pytest.approx(quality(DULL), abs=1e-5)  # the worst of val's clean photos
    grey, a = answers["grey.png"], answers["a.png"]
    assert (grey.status, grey.person, grey.score, grey.resembles) == ("not usable", None, None, None)
    assert grey.quality == pytest.approx(quality(GREY), abs=1e-5)
    assert grey.reason == f"quality {quality(GREY):.2f}, below {bound:.2f}"
    assert a.status == "named" and a.quality == pytest.approx(quality(shade(ANN, 3)), abs=1e-5)
    out = capsys.readouterr().out
    assert "(not usable)" in out and "2 named, 1 unknown, 1 not usable\n" in out
    assert f"usable at quality >= {bound:.2f}: all but 1 % of the clean photos there" in out
    assert len(list(Path("annotated").glob("*_grey.jpg"))) == 1
    identify.CALIBRATE_ON = identify.ENROLL = None  # the bound is kept in the gallery
    assert by_name(identify.main())["grey.png"] == grey
    identify.CALIBRATE_ON, identify.REFUSE = Path("val"), None  # every photo is usable
    assert by_name(identify.main())["grey.png"].status in ("named", "unknown")


def test_few_clean_photos_set_no_bound_of_quality(rated, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "LEAST_RATED", 6)
    assert by_name(identify.main())["grey.png"].status in ("named", "unknown")
    assert (
        "every photo counts as usable: val has fewer than 6 clean photos to set a bound by" in capsys.readouterr().out
    )


def test_photos_that_are_not_usable_are_enrolled_with_enroll_unusable_only(rated, capsys):
    write("people/ann/clean/ann_3.png", GREY)
    identify.main()
    assert "people/ann/clean/ann_3.png: not usable (quality 0.0" in capsys.readouterr().out
    assert [path.name for path in kept().paths] == ["ann_1.png", "ann_2.png", "bob_1.png", "cy_1.png"]
    assert kept().quality.tolist() == pytest.approx([quality(c) for c in (ANN, shade(ANN, 9), BOB, CY)], abs=1e-5)
    identify.ENROLL_UNUSABLE = True
    identify.main()
    assert kept().quality[2].item() == pytest.approx(quality(GREY), abs=1e-5)


# --- mistakes and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("PHOTOS", [Path("nowhere")], "PHOTOS: nowhere: no such photo or folder"),
        ("PHOTOS", [Path("empty")], "PHOTOS: no photo in empty; give photos, or folders with photos"),
        ("ENROLL", None, r"gallery\.pt: no gallery; set ENROLL to a folder of persons to make one"),
        ("ENROLL", Path("empty"), "empty: no person with a photo; expected empty/<person>/clean"),
        ("ENROLL", Path("hazy"), "ENROLL = hazy: no clean photo to enroll; expected hazy/<person>"),
        ("ENROLL", Path("torn"), "ENROLL = torn: none of its clean photos shows a usable face"),
        ("REMOVE", "bob", r"REMOVE = 'bob': expected a list, \['bob'\]"),
        ("CALIBRATE_ON", Path("nowhere"), "CALIBRATE_ON = nowhere: no such folder; correct it"),
        ("CALIBRATE_ON", Path("clean"), "CALIBRATE_ON = clean: no distorted photo to use as a query"),
        ("FALSE_ACCEPT", "1%", "FALSE_ACCEPT = '1%': expected a share of strangers, above 0 and below 1"),
        ("REFUSE", 0.3, r"REFUSE = 0\.3: expected a share of clean photos, 0\.\.0\.2"),
        ("TOP", 0, r"TOP = 0: expected a whole number in 1\.\."),
        ("ANNOTATED", Path("photos/../photos/out"), "lies in photos, so the next run would identify its pictures too"),
        ("GALLERY", Path("photos/a.png"), r"photos/a\.png: damaged, or not a gallery"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_written(here, name, value, message):
    for folder in ("empty", "torn/ann"):
        Path(folder).mkdir(parents=True)
    Path("torn/ann/1.png").write_bytes(b"no picture")
    write("hazy/ann/distortion/1_foggy.png", ANN)
    write("clean/ann/1.png", ANN)
    before = sorted(here.rglob("*"))
    setattr(identify, name, value)
    with pytest.raises(UserError, match=message):
        identify.main()
    assert sorted(path for path in here.rglob("*") if path.suffix != ".lock") == before


@pytest.mark.parametrize("name, value", [("GALLERY", "new/gallery.pt"), ("JSON_LINES", "a.jsonl"), ("ANNOTATED", "b")])
@pytest.mark.parametrize("work", ["ENROLL", "CALIBRATE_ON"])
def test_a_place_that_cannot_be_written_to_is_refused_before_any_photo_is_embedded(
    here, monkeypatch, name, value, work
):
    identify.main()
    if name == "GALLERY":
        write("people/di/1.png", DI)
        Path("new").mkdir()
        shutil.copy("gallery.pt", value)
    if work == "ENROLL":
        identify.CALIBRATE_ON = None
    else:
        identify.ENROLL, identify.FALSE_ACCEPT = None, 0.6

    def read_only(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)  # root may write anywhere, whatever the modes
    setattr(identify, name, Path(value))
    before = ColourNet.embedded
    with pytest.raises(
        UserError, match=rf"{name} = {value}: .* cannot be written to \(Read-only file system\); choose"
    ):
        identify.main()
    assert ColourNet.embedded == before


def test_answers_are_written_before_they_are_printed(here, monkeypatch):
    def broken(*values) -> None:
        raise BrokenPipeError

    identify.JSON_LINES, identify.ANNOTATED = Path("answers.jsonl"), Path("annotated")
    monkeypatch.setattr(identify, "table", broken)
    with pytest.raises(BrokenPipeError):
        identify.main()
    assert len(Path("answers.jsonl").read_text().splitlines()) == 3 and len(list(Path("annotated").iterdir())) == 3
    identify.GALLERY = Path("other.pt")
    monkeypatch.setattr("builtins.print", broken)
    with pytest.raises(BrokenPipeError):
        identify.main()
    assert load_gallery(Path("other.pt")).persons == ["ann", "bob", "cy"]


def test_json_lines_are_the_answers_whatever_the_names(here):
    os.rename("people/bob", "people/Zoë 李")
    raw = os.fsdecode(b"photos/\xff\n.png")  # bytes that are not UTF-8
    write("s.png", BOB).rename(raw)
    identify.JSON_LINES = Path("out/answers.jsonl")
    answers = identify.main()
    text = Path("out/answers.jsonl").read_bytes().decode("utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert rows == [vars(answer) for answer in answers]
    assert "Zoë 李" in text and raw in [row["photo"] for row in rows]
    assert " ".join(rows[0]) == "photo status person score threshold resembles others box reason quality"


def pixels_near(picture: Image.Image, colour: str, tolerance: int = 30) -> np.ndarray:
    """(N, 2) columns and rows of the pixels of about that colour; a JPEG's differ a little."""
    wanted = np.array(Image.new("RGB", (1, 1), colour))[0, 0].astype(int)
    return np.argwhere(np.abs(np.array(picture).astype(int) - wanted).max(2) < tolerance)[:, ::-1]


def test_each_readable_photo_gets_a_picture_that_shows_the_answer_and_what_the_crop_keeps(here):
    Path("photos/torn.png").write_bytes(b"no picture")
    write("photos/more/a.png", STRANGER)  # its name is taken already
    for path in Path("photos").rglob("a.png"):
        Image.open(path).resize((80, 40)).save(path)
    identify.ANNOTATED, identify.ANNOTATED_SIDE = Path("pictures"), 800
    identify.main()
    names = sorted(path.name for path in Path("pictures").iterdir())
    assert names == ["0001_a.jpg", "0003_a.jpg", "0004_b.jpg", "0005_s.jpg"]  # 2: torn
    for name, status in (("0001_a.jpg", "named"), ("0003_a.jpg", "unknown")):
        with Image.open(Path("pictures") / name) as picture:
            found = pixels_near(picture.convert("RGB"), COLOURS[status])
        lower = found[found[:, 1] > 150]  # under the label
        assert lower.min(0).tolist() == pytest.approx([300, 151], abs=3)  # FACE_CROP = 0.5: 200 of 400 px
        assert lower.max(0).tolist() == pytest.approx([500, 300], abs=3)


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


def write_squares(path: Path | str, *squares) -> None:
    """A black photo of 300 x 100 px with squares: (colour, left, side)."""
    path = write(path, (0, 0, 0), size=(300, 100))
    photo = Image.open(path)
    for colour, left, side in squares:
        ImageDraw.Draw(photo).rectangle((left, 20, left + side - 1, 20 + side - 1), fill=tuple(colour))
    photo.save(path)


@pytest.fixture
def loose(here, monkeypatch) -> Path:
    """`here` with faces off the middle of loose photos, a bystander behind ann, and FIND_FACES on."""
    monkeypatch.setattr(identify, "FaceDetector", ColouredSquares)
    for name in ("people", "photos", "val"):
        for path in sorted(Path(name).rglob("*.png")):
            write_squares(path, (Image.open(path).getpixel((0, 0)), 200, 60))
    write_squares("people/ann/clean/ann_1.png", (BOB, 10, 30), (ANN, 200, 60))
    identify.FIND_FACES, identify.MARGIN = True, 0.0
    return here


def test_each_face_of_a_photo_has_its_row_and_its_box_in_the_picture(loose):
    write_squares("photos/all.png", (shade(ANN, 3), 10, 40), (STRANGER, 100, 50), (shade(BOB, 3), 200, 70))
    identify.ANNOTATED, identify.ANNOTATED_SIDE = Path("pictures"), 900
    answers = [answer for answer in identify.main() if answer.photo == "photos/all.png"]
    assert [(answer.status, answer.person, answer.box) for answer in answers] == [
        ("named", "bob", (200, 20, 270, 90)),
        ("unknown", None, (100, 20, 150, 70)),
        ("named", "ann", (10, 20, 50, 60)),
    ]
    assert answers[2].score == pytest.approx(1, abs=1e-3)
    with Image.open("pictures/0002_all.jpg") as picture:
        found = pixels_near(picture.convert("RGB"), COLOURS["unknown"])
    lower = found[found[:, 1] >= 3 * 20 + 5]  # under the label
    assert (lower[:, 0].min(), lower[:, 0].max(), lower[:, 1].max()) == pytest.approx((300, 450, 210), abs=4)


def test_a_photo_without_a_face_is_reported_and_gets_no_name(loose, capsys):
    write_squares("photos/empty.png")
    empty = by_name(identify.main())["empty.png"]
    assert (empty.status, empty.person, empty.score, empty.resembles, empty.box) == ("no face", None, None, None, None)
    out = capsys.readouterr().out
    assert "(no face)" in out and "4 photos: 2 named, 1 unknown, 1 without a face" in out
    identify.PHOTOS, identify.ANNOTATED = [Path("photos/empty.png")], Path("pictures")
    assert [answer.status for answer in identify.main()] == ["no face"]
    assert [path.name for path in Path("pictures").iterdir()] == ["0001_empty.jpg"]


def test_the_largest_face_of_a_clean_photo_is_enrolled_and_a_photo_without_one_is_not(loose, capsys, caplog):
    write_squares("people/di/di_1.png")
    identify.main()
    assert kept().paths[0] == loose / "people/ann/clean/ann_1.png" and kept().persons == ["ann", "bob", "cy"]
    assert kept().embeddings[0].tolist() == pytest.approx(direction(ANN), abs=1e-5)
    assert not [message for message in caplog.messages if "same photo" in message]  # the bystander was not enrolled
    assert "people/di/di_1.png: no face, not enrolled" in capsys.readouterr().out
    shutil.move("people/di", "faceless/di")
    identify.ENROLL, identify.GALLERY = Path("faceless"), Path("other.pt")
    with pytest.raises(UserError, match="ENROLL = faceless: none of its clean photos shows a usable face"):
        identify.main()


def test_the_threshold_is_calibrated_on_faces_found_in_the_same_way(loose, capsys):
    write_squares("val/v1/distortion/1_hidden.png")
    write_squares("val/v2/1.png", (CY, 10, 30), ((30, 200, 10), 200, 60))  # a bystander is ignored
    identify.main()
    assert "val: a face found in 28 of 29 photos, the others left out" in capsys.readouterr().out
    threshold = kept().threshold
    assert threshold["strangers"] == 24 and threshold["source"] == "val"
    # The same colours filling their photos give the same cosines.
    for path in Path("val").rglob("*.png"):
        faces = ColouredSquares(None, 0, 0).find(Image.open(path))
        write(path, Image.open(path).getpixel(faces[0].box[:2])) if faces else path.unlink()  # the largest
    identify.FIND_FACES, identify.FACE_CROP, identify.GALLERY = False, 1.0, Path("other.pt")
    identify.main()
    assert load_gallery(Path("other.pt")).threshold["cosine"] == pytest.approx(threshold["cosine"], abs=1e-5)


def test_a_split_without_a_face_to_calibrate_on_is_refused(loose):
    for pattern, part in (("1.png", "clean"), ("distortion/1_*.png", "distorted")):
        shutil.copytree("val", part)
        for path in Path(part).glob(f"*/{pattern}"):
            write_squares(path)
        identify.CALIBRATE_ON = Path(part)
        with pytest.raises(UserError, match=f"CALIBRATE_ON = {part}: no face found in any of its {part} photos"):
            identify.main()


def test_a_gallery_of_differently_framed_photos_is_refused(loose):
    identify.main()
    before = stamp()
    for name, value, difference in (("MARGIN", 0.1, "0.1"), ("FIND_FACES", False, "None")):
        setattr(identify, name, value)
        with pytest.raises(UserError, match=rf"made by another model \(.*find_faces 0\.0, here {difference}"):
            identify.main()
    assert stamp() == before


def test_the_margin_widens_what_the_network_sees(loose):
    identify.MARGIN, identify.CALIBRATE_ON, identify.PHOTOS = 1.0, None, []
    identify.main()
    quarter = direction([value / 4 for value in CY])  # twice the side: three quarters of it are black
    assert kept().embeddings[-1].tolist() == pytest.approx(quarter, abs=0.02)


def test_a_network_with_a_wide_crop_gets_the_whole_frame_of_a_face_that_is_cut_out(loose, monkeypatch):
    network = ColourNet()
    network.crops = Crops(face=0.5, wide_size=76, wide_weight=0.03)
    facts = {"image_size": 76, "face_crop": 1.0, "framing": "detected"}
    monkeypatch.setattr(identify.checkpoints, "load_model", lambda *_, **__: (network, facts))
    identify.MARGIN = 0.0
    assert identify.FaceReader(torch.device("cpu")).margin == 1.0  # twice the box, whose middle half is the face


@pytest.mark.parametrize("find_faces", [False, True])
def test_real_faces_get_their_names_and_real_strangers_low_scores(tmp_path, monkeypatch, constants, find_faces):
    shared = Path(__file__).resolve().parents[2] / "shared"  # where this checkout has them
    weights, faces = shared / "weights" / "facenet_msceleb_fp16.pt", shared / "lfw_faces" / "facecom" / "train"
    if not weights.is_file() or not faces.is_dir():
        pytest.skip("needs the real faces and weights")
    monkeypatch.chdir(tmp_path)
    persons = {person.name: sorted(person.glob("*.jpg")) for person in sorted(faces.iterdir())}
    several = [name for name, photos in persons.items() if len(photos) >= 6][:12]
    enrolled, strangers, others = several[:4], several[4:8], several[8:]
    copies = {f"people/{name}": persons[name][:1] for name in enrolled}
    copies |= {f"val/{name}": persons[name][:1] for name in others}
    copies |= {f"val/{name}/distortion": persons[name][1:6] for name in others}
    copies["photos"] = [persons[name][1] for name in enrolled + strangers]
    for folder, photos in copies.items():
        Path(folder).mkdir(parents=True)
        for photo in photos:
            shutil.copy(photo, folder)
    identify.PHOTOS, identify.ENROLL, identify.CALIBRATE_ON = [Path("photos")], Path("people"), Path("val")
    identify.CHECKPOINT, identify.PRETRAINED, identify.FIND_FACES = None, weights, find_faces
    identify.FALSE_ACCEPT, identify.REFUSE, identify.NUM_WORKERS = 0.5, None, 0
    largest = {}
    for answer in identify.main():
        largest.setdefault(Path(answer.photo).stem[:-5], answer)
    assert largest.keys() == {*enrolled, *strangers}
    for person, answer in largest.items():
        assert (answer.person == person and answer.score > 0.5) if person in enrolled else answer.score < 0.5
