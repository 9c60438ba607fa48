"""Where faces are framed: the square that is cut, who takes which box, and what a checkpoint states."""

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import framing
from common import UserError
from datasets import scan_persons
from faces import Face, FaceDetector
from framing import FRAME, HIDDEN, INSET, LARGEST_CROP, Frames, find_box, find_frames, sources_of
from gallery import made_by
from models import Crops, FaceNet
from tools import sample_faces
from transforms import cut_square, eval_transform, load_image, train_transform

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def new_process(monkeypatch) -> None:
    """No photo has been searched yet."""
    monkeypatch.setattr(framing, "_found", {})


class Found:
    """A detector that always finds these boxes, in pixels."""

    def __init__(self, *boxes):
        self.boxes = boxes

    def find(self, image):
        return [Face(box, 0.99) for box in self.boxes]


def numbered(width: int, height: int) -> Image.Image:
    """Red counts columns, green counts rows."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], 2).astype(np.uint8))


@pytest.mark.parametrize("side, columns", [(4, [3, 4, 5, 6]), (12, [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9])])
def test_a_square_is_mirrored_beyond_the_edges(side, columns):
    cut = np.asarray(cut_square(numbered(10, 30), 5, 15, side))
    assert cut.shape == (side, side, 3) and cut[0, :, 0].tolist() == columns


def test_a_square_far_outside_is_still_cut():
    assert cut_square(numbered(10, 10), -40, 90, 35).size == (35, 35)


def test_the_face_is_in_the_middle_of_its_square(tmp_path):
    numbered(200, 100).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    frames = Frames({tmp_path / "a.png": (0.5, 0.4, 0.6, 0.6)})  # 20 x 20 around (110, 50)
    square = frames(image)
    assert square.size == (round(20 * FRAME),) * 2
    assert square.getpixel((square.width // 2, square.height // 2))[:2] == (110, 50)


def test_a_face_set_into_its_photo_is_the_one_in_its_square(tmp_path):
    numbered(200, 100).save(tmp_path / "a.png")
    path, image = tmp_path / "a.png", load_image(tmp_path / "a.png")
    boxes = {path: (0.6, 0.3, 0.8, 0.7)}  # 40 x 40 around (140, 50): a square of 82, of which 53 are set in
    framed, square = (np.asarray(Frames(boxes, inset)(image), int) for inset in (True, False))
    side, inset = round(40 * FRAME), round(40 * FRAME * LARGEST_CROP)
    assert framed.shape == (side, round(2 * 40 * FRAME), 3) and square.shape == (side, side, 3)

    def middle(pixels, share):
        rows, columns, half = pixels.shape[0] // 2, pixels.shape[1] // 2, int(share * side / 2)
        return pixels[rows - half : rows + half, columns - half : columns + half]

    assert abs(middle(framed, 0.6) - middle(square, 0.6)).max() <= 1
    scaled = np.asarray(image.resize((framed.shape[1], side), Image.Resampling.BILINEAR), int)
    differs = (framed != scaled).any(2)
    assert differs.sum() > 0.9 * inset**2 and differs.any(0).sum() <= inset and differs.any(1).sum() <= inset


@pytest.mark.parametrize("width, height, box", [(250, 250, 67), (320, 240, 35), (97, 300, 90), (640, 480, 210)])
def test_the_network_of_the_frame_never_sees_the_pasted_face(tmp_path, monkeypatch, width, height, box):
    """A black photo with a white face, and a white one with a black face, beside the same photos without a face."""
    with torch.device("meta"):
        network = FaceNet(None, dropout=0.0, crops=Crops(0.52, 112, 0.03, hidden=HIDDEN))
    x, y, half = 0.4 * width, 0.45 * height, box / 2
    found = ((x - half) / width, (y - half) / height, (x + half) / width, (y + half) / height)
    for colour, other in ((0, 255), (255, 0)):
        path, photo = tmp_path / "photo.png", Image.new("RGB", (width, height), (colour,) * 3)
        photo.info["path"] = path
        cut = cut_square(Image.new("RGB", photo.size, (other,) * 3), x, y, LARGEST_CROP * FRAME * box)
        monkeypatch.setattr(framing, "cut_square", lambda *args, cut=cut: cut)
        framed = Frames({path: found}, inset=True)(photo)
        assert framed.getpixel((framed.width // 2, framed.height // 2)) == (other,) * 3
        seen, expected = (network.whole(eval_transform(308, 1.0)(image)[None]) for image in (framed, photo))
        assert torch.equal(seen, expected)


def test_a_face_that_fills_a_large_photo_does_not_enlarge_it(tmp_path):
    image = numbered(1500, 2000)
    image.info["path"] = path = tmp_path / "selfie.png"
    boxes = {path: (0.1, 0.2, 0.9, 0.8)}  # 1200 x 1200: a square of 2446
    framed = Frames(boxes, inset=True)(image)
    assert framed.size == image.size
    square = Frames(boxes)(image).resize((1500, 1500), Image.Resampling.BILINEAR)
    difference = np.asarray(framed.crop((300, 550, 1200, 1450)), int) - np.asarray(square.crop((300, 300, 1200, 1200)))
    assert np.median(abs(difference)) <= 1


@pytest.mark.parametrize("inset", [False, True])
def test_a_photo_without_a_box_stays_as_it_is_and_an_unknown_one_is_an_error(tmp_path, inset):
    numbered(20, 20).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert Frames({tmp_path / "a.png": None}, inset)(image) is image
    with pytest.raises(KeyError):
        Frames({})(image)


PLAUSIBLE, SMALL, OUTSIDE = (100.0, 100.0, 200.0, 200.0), (150.0, 150.0, 170.0, 175.0), (-50.0, 100.0, 50.0, 200.0)


@pytest.mark.parametrize(
    "boxes, expected",
    [
        ([PLAUSIBLE], PLAUSIBLE),
        ([], None),
        ([SMALL], None),
        ([OUTSIDE], None),
        ([SMALL, OUTSIDE, PLAUSIBLE], PLAUSIBLE),
        ([(0.0, 0.0, 150.0, 150.0), PLAUSIBLE], PLAUSIBLE),  # the one nearer to the middle
    ],
)
def test_the_plausible_face_nearest_to_the_middle_counts(boxes, expected):
    found = find_box(numbered(320, 320), Found(*boxes))
    assert found == (None if expected is None else tuple(value / 320 for value in expected))


@pytest.mark.parametrize("white, expected", [(200, None), (100, PLAUSIBLE)])  # of 166 pixels that are the middle
def test_beside_a_burnt_out_middle_faces_are_of_others(white, expected):
    photo = numbered(320, 320)
    photo.paste((255, 255, 255), (160 - white // 2, 160 - white // 2, 160 + white // 2, 160 + white // 2))
    found = find_box(photo, Found(PLAUSIBLE))
    assert found == (expected and tuple(side / 320 for side in expected))


def test_a_moved_face_is_framed_as_if_it_had_not_been(tmp_path):
    identity = sample_faces.random_identity(np.random.default_rng((0, 1)))
    drawn = sample_faces.draw_face(identity, np.random.default_rng((0, 1, 1)), 250)
    photos = {"still": drawn, "moved": cut_square(drawn, 95, 150, 320)}
    for name, photo in photos.items():
        photo.save(tmp_path / f"{name}.png")
    paths = [tmp_path / f"{name}.png" for name in photos]
    frames, images = find_frames("detected", paths, CPU), [load_image(path) for path in paths]

    def difference(transform) -> float:
        first, second = map(transform, images)
        return float((first - second).abs().mean())

    assert difference(eval_transform(160, 0.52, frames)) < 0.5 * difference(eval_transform(160, 0.52))


def test_a_distorted_copy_takes_the_box_of_its_source(task_b, monkeypatch, capsys):
    searched = []
    monkeypatch.setattr(framing, "find_box", lambda image, detector: searched.append(image.info["path"]))
    persons = scan_persons(task_b / "train")
    photos, sources = [photo for person in persons for photo in person.photos], sources_of(persons)
    assert sources
    find_frames("detected", photos, CPU, sources)
    assert sorted(searched) == sorted(set(photos) - sources.keys())
    count = len(searched)
    assert f"searched for in {count} photos; {count} without" in capsys.readouterr().out
    find_frames("detected", photos, CPU)
    assert sorted(searched[count:]) == sorted(sources), "a photo is searched once"
    replaced = photos[0]
    numbered(30, 30).save(replaced)
    find_frames("detected", photos, CPU)
    assert searched[-1] == replaced and len(searched) == len(photos) + 1


def test_a_photo_is_framed_before_it_is_distorted_on_the_fly(tmp_path):
    numbered(200, 100).save(tmp_path / "a.png")
    frames, sizes = Frames({tmp_path / "a.png": (0.5, 0.4, 0.6, 0.6)}), []

    def note(image: Image.Image) -> Image.Image:
        sizes.append((image.size, image.info["path"]))
        return image

    train_transform(76, 0.5, 0.0, 0.0, note, frames=frames)(load_image(tmp_path / "a.png"))
    assert sizes == [((round(20 * FRAME),) * 2, tmp_path / "a.png")]


def test_only_a_network_of_the_whole_frame_has_the_face_set_into_the_photo(stages, train, stage1_best, tmp_path):
    saved = checkpoints.read_checkpoint(stage1_best)
    torch.save(saved | {"framing": "detected"}, tmp_path / "found.pt")
    for path, wide_weight, expected in ((tmp_path / "found.pt", 0.0, "detected"), (stage1_best, 0.3, "centre")):
        constants = {"STAGE1_CHECKPOINT": path, "WIDE_WEIGHT": wide_weight, "EPOCHS": 1}
        assert train(stages[1], expected, constants).best["framing"] == expected
    torch.save(saved | {"framing": "detected", "face_crop": 0.78}, tmp_path / "loose.pt")  # of an earlier version
    with pytest.raises(UserError, match=r"FACE_CROP = 0\.78: .*0\.65 at most"):
        train(stages[1], "loose", {"STAGE1_CHECKPOINT": tmp_path / "loose.pt", "WIDE_WEIGHT": 0.3})


def test_centre_finds_nothing_and_another_word_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(framing, "FaceDetector", None)
    assert find_frames("centre", [tmp_path / "a.jpg"], CPU) is None
    framing.check_framing("centre", 1.0)
    with pytest.raises(UserError, match="FRAMING = 'eyes': expected one of 'centre', 'detected'"):
        framing.check_framing("eyes", 0.52)


def test_photos_that_are_cut_to_the_face_are_not_searched_again():
    framing.check_framing("detected", 0.52)
    with pytest.raises(UserError, match=r"FRAMING = 'detected', FACE_CROP = 1\.0: .* or FRAMING = 'centre' for photos"):
        framing.check_framing("detected", 1.0)


def test_no_face_in_any_of_many_photos_is_suspicious(tmp_path, caplog):
    photos = [tmp_path / f"{number}.png" for number in range(framing.MANY)]
    for photo in photos:
        numbered(40, 40).save(photo)
    find_frames("detected", photos[1:], CPU)
    assert not caplog.text
    find_frames("detected", photos, CPU)
    assert f"there is a face in none of {framing.MANY} photos" in caplog.text


def test_an_unreadable_photo_has_no_box(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"none")
    assert find_frames("detected", [tmp_path / "a.jpg"], CPU).boxes == {tmp_path / "a.jpg": None}


def test_embeddings_of_different_framing_cannot_be_compared():
    model = torch.nn.Linear(2, 2)
    assert made_by(model, 160, 0.52) == made_by(model, 160, 0.52, "centre")
    assert made_by(model, 160, 0.52, "detected") == made_by(model, 160, 0.52) | {"framing": "detected"}


@pytest.mark.parametrize("size", [(3, 400), (20, 20)])
def test_tiny_photos_have_no_face(size):
    assert find_box(Image.new("RGB", size), FaceDetector("cpu", min_face=30)) is None


def test_both_stages_frame_every_photo_by_its_box_and_state_it(stages, train, stage1_best, monkeypatch):
    framed = set()

    def left_half(image, detector):
        framed.add(image.info["path"])
        return 0.1, 0.1, 0.3, 0.3

    assert checkpoints.read_checkpoint(stage1_best)["framing"] == "centre"
    monkeypatch.setattr(framing, "find_box", left_half)
    stage1, stage2 = stages
    best = train(stage1, "one", {"FRAMING": "detected", "FACE_CROP": 0.6}).best
    val = {path for person in scan_persons(stage1.DATA_DIR / "val") for path in person.photos}
    assert best["framing"] == "detected" and val <= framed
    framed.clear(), framing._found.clear()
    best = train(stage2, "two", {"STAGE1_CHECKPOINT": stage1.RUN_DIR / "best.pt"}).best
    clean = {path for person in scan_persons(stage2.DATA_DIR / "train") for path in person.clean}
    assert best["framing"] == INSET and val | clean <= framed  # it sees the whole frame too
    assert not any("train" in path.parts for path in framed - clean)  # distorted copies take their sources' boxes


def test_a_checkpoint_that_states_no_framing_means_the_centre(stage1_best, tmp_path):
    saved = checkpoints.read_checkpoint(stage1_best)
    for framing_then, expected in (("detected", "detected"), (None, "centre")):
        stated = {} if framing_then is None else {"framing": framing_then}
        torch.save({name: saved[name] for name in saved if name != "framing"} | stated, tmp_path / "a.pt")
        assert checkpoints.read_checkpoint(tmp_path / "a.pt")["framing"] == expected
    torch.save(saved | {"framing": "eyes"}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="its framing is 'eyes'"):
        checkpoints.read_checkpoint(tmp_path / "a.pt")
