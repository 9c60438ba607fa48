"""Scanner, lists of persons and datasets, on small trees of one-coloured photos, so that a pixel identifies a photo."""

import io
import shutil
import struct
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_plain
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from common import UserError
from datasets import (
    FaceClassificationDataset,
    FaceCleanValDataset,
    FacePairDataset,
    Person,
    files_digest,
    find_unreadable,
    folder_of,
    persons_of,
    scan_persons,
    split_holdout,
    split_persons,
    warn_duplicate_photos,
    warn_shared_persons,
    without_kinds,
)
from degradations import RandomDegradation
from distortions import DISTORTIONS
from folders import distortion_kind
from transforms import load_image, suffixes


def write_all(root: Path, *files: str) -> list[Path]:
    return [write_plain(root / file) for file in files]


# --- scanner ----------------------------------------------------------------------------------------------------------

EACH_SUFFIX = ["a.jpg", "b.jpeg", "c.png", "d.bmp", "e.webp", "f.JPG", "g.Jpeg", "h.PNG", "i.BMP", "j.WebP"]
EACH_SUFFIX += ["k.tif", "l.TIFF", "m.gif", "n.jfif", "o.jpe", "p.mpo"]
HIDDEN = ["ann/.1.png", ".cache/4.png", "__MACOSX/ann/1.png", "$RECYCLE.BIN/1.png", "@eaDir/1.png", "#recycle/1.png"]
STRAY = ["5.png", "ann/distorted/1_foggy.png", "ann/distorted/1_rainy.png", "ann/new/2.jpg", "ann/clean/old/3.jpg"]
STRAY += ["list", "ann/x.csv", "ann/1.mp4"]
HIDDEN += ["ann/clean/@eaDir/1.png", "ann/@1.png", "ann/Thumbs.db", "ann/desktop.ini", "ann/.DS_Store"]
TREES = {  # files (a folder ends in /) -> clean and distorted photos of each person, and the warning
    "clean photos in clean/": (
        ["bob/clean/1.png", "ann/distortion/1_rainy.png", "ann/clean/2.png", "ann/clean/1.png"],
        {"ann": (["clean/1.png", "clean/2.png"], ["distortion/1_rainy.png"]), "bob": (["clean/1.png"], [])},
        None,
    ),
    "clean photos in the person's folder, in the order of names": (
        ["bob_2/2.png", "bob_2/10.png", "bob_2/1.png", "bob_2/distortion/1_rainy.png", "bob_10/clean/", "bob_10/1.png"],
        {"bob_10": (["1.png"], []), "bob_2": (["1.png", "10.png", "2.png"], ["distortion/1_rainy.png"])},
        None,
    ),
    "clean photos in both": (
        ["ann/clean/1.png", "ann/2.png"],
        {"ann": (["clean/1.png"], [])},
        "1 file left out: 1 beside clean/, which counts (ann/2.png)",
    ),
    "any image suffix, and hidden files and folders": (
        [f"ann/{name}" for name in EACH_SUFFIX] + HIDDEN,
        {"ann": (EACH_SUFFIX, [])},
        None,
    ),
    "clean/ and distortion/ in another case": (
        ["ann/CLEAN/1.png", "ann/Distortion/1_rainy.png"],
        {"ann": (["CLEAN/1.png"], ["Distortion/1_rainy.png"])},
        None,
    ),
    "other files, and photos where none is expected": (
        ["ann/clean/1.png", *STRAY, *(f"ann/clean/{number}.HEIC" for number in range(4))],
        {"ann": (["clean/1.png"], [])},
        "12 files left out: 4 .heic (pip install pillow-heif); 2 too deep, expected in <person>/, <person>/clean/ or "
        "<person>/distortion/ (ann/clean/old/3.jpg, ann/new/2.jpg); 2 in distorted/, to be named distortion/ "
        "(ann/distorted/1_foggy.png, ann/distorted/1_rainy.png); 1 outside the folders of persons (5.png); "
        "1 without a suffix (list); 1 .mp4; 1 .csv",
    ),
    "no photo": (["ann/1.png", "bob/2.png/"], {"ann": (["1.png"], [])}, "1 folders without a photo, ignored (bob)"),
    "no clean photo": (
        [f"p{number}/distortion/a_foggy.png" for number in range(7)],
        {f"p{number}": ([], ["distortion/a_foggy.png"]) for number in range(7)},
        "7 persons without a clean photo, never enrolled and never an anchor; add one to clean/ or remove the folder "
        "(p0, p1, p2, p3, p4 and 2 more)",
    ),
}


@pytest.mark.parametrize("files, expected, warning", TREES.values(), ids=TREES)
def test_a_scan_finds_the_photos_of_each_person_and_warns_once(tmp_path, caplog, files, expected, warning):
    for name in files:
        path = tmp_path / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        elif path.suffix.lower() in suffixes():
            write_plain(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    persons = scan_persons(tmp_path)
    assert scan_persons(str(tmp_path)) == persons and [person.name for person in persons] == list(expected)
    for person, (clean, distorted) in zip(persons, expected.values(), strict=True):
        photos = [path.relative_to(tmp_path / person.name).as_posix() for path in person.photos]
        assert photos == clean + distorted and len(person.clean) == len(clean)
    assert caplog.messages == ([f"{tmp_path}: {warning}"] if warning else [])


@pytest.mark.parametrize("root", ["missing", "ann/1.jpg", "ann", "."])  # the only photo is broken
def test_a_root_without_persons_is_refused_with_what_is_expected(tmp_path, root):
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann/1.jpg").write_bytes(b"")
    message = "no person with a photo; expected " if (tmp_path / root).is_dir() else "no such folder; set DATA_DIR to "
    with pytest.raises(UserError, match=f"^{tmp_path / root}: {message}"):
        scan_persons(tmp_path / root)


# --- unreadable files -------------------------------------------------------------------------------------------------


def encoded(kind: str) -> bytes:
    """A sound file of 64 x 64 pixels of noise."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


BROKEN = {
    "truncated.jpg": encoded("JPEG")[: len(encoded("JPEG")) * 6 // 10],
    "truncated.png": encoded("PNG")[: len(encoded("PNG")) * 6 // 10],
    "empty.jpg": b"",
    "text.jpg": b"this is no picture\n" * 100,
}


def test_broken_files_are_left_out_with_a_warning_or_raise_when_loaded_unchecked(tmp_path, caplog):
    sound, copy = write_all(tmp_path, "ann/clean/sound.png", "ann/distortion/sound_foggy.png")
    (tmp_path / "bob").mkdir()
    broken = [tmp_path / folder / name for folder in ("ann/clean", "ann/distortion", "bob") for name in BROKEN]
    for path in broken:
        path.write_bytes(BROKEN[path.name])
    damaged = tuple(sorted(path for path in broken if path.parent.name == "clean"))
    assert scan_persons(tmp_path) == [Person("ann", (sound,), (copy,), unreadable=damaged)]
    [message] = caplog.messages
    assert "12 unreadable images" in message and str(sound) not in message
    unchecked = FaceClassificationDataset(scan_persons(tmp_path, check_images=False), pil_to_tensor)
    index_of = {path: index for index, (path, _) in enumerate(unchecked.samples)}
    for path in broken:
        assert f"{path}: " in message
        with pytest.raises(UserError, match=f"^{path}: cannot be read as an image .*; replace or delete it$"):
            unchecked[index_of[path]]


def test_a_file_replaced_between_scans_is_read_again(tmp_path):
    changing, sound = write_all(tmp_path, "ann/clean/changing.png", "ann/clean/sound.png")
    photo = changing.read_bytes()
    for data, expected in ((photo, (changing, sound)), (photo[:40], (sound,)), (photo, (changing, sound))):
        changing.write_bytes(data)
        assert scan_persons(tmp_path)[0].clean == expected


def test_checking_files_leaves_the_warning_filters_as_they_were(tmp_path):
    paths = write_all(tmp_path, *(f"{number}.jpg" for number in range(400)))
    with warnings.catch_warnings():  # so that a failure here cannot turn off the warnings of later tests
        before = list(warnings.filters)
        assert find_unreadable(paths) == {} and warnings.filters == before


def exif(*entries: bytes) -> bytes:
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(entries) + b"\0\0\0\0"


ORIENTATION_6 = struct.pack(">HHIHH", 0x112, 3, 1, 6, 0)
ODD_EXIF = {
    "no TIFF header": b"Exif\0\0XXXXXXXXXXXX",
    "pointer that is text": exif(ORIENTATION_6, struct.pack(">HHII", 0x8769, 2, 2, 0x41000000)),
    "strip offset that is a float": exif(struct.pack(">HHIf", 0x111, 11, 1, 1.5), ORIENTATION_6),
}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("block", ODD_EXIF.values(), ids=ODD_EXIF)
def test_a_photo_with_an_odd_exif_block_is_readable(tmp_path, block, suffix):
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (32, 32), (200, 100, 50)).save(path, exif=block)
    assert find_unreadable([path]) == {}
    assert load_image(path).getpixel((16, 16)) == pytest.approx((200, 100, 50), abs=6)  # JPEG and WebP lose a little


# --- names and lists of persons ---------------------------------------------------------------------------------------


def test_the_kind_of_distortion_is_what_follows_the_last_underscore():
    kinds = {"a_0001_blurred": "blurred", "001_frontal_SUNNY": "sunny", "a_1.v2_noisy": "noisy"}
    kinds |= dict.fromkeys(("portrait", "portrait_", "portrait_7"), "unknown")
    assert {stem: distortion_kind(Path(f"train/ann_lee/distortion/{stem}.jpg")) for stem in kinds} == kinds


def test_a_split_is_given_as_a_folder_or_as_the_persons_scanned_there(task_b):
    persons = scan_persons(task_b / "train")
    assert persons_of(task_b / "train") == persons_of(str(task_b / "train")) == persons_of(persons) == persons
    some = FaceClassificationDataset(persons[1:3], pil_to_tensor)
    assert some.persons == ["bob", "cy"] and some.label2idx == {"bob": 0, "cy": 1}
    assert [path for path, _ in some.samples] == [*persons[1].photos, *persons[2].photos]


@pytest.mark.parametrize("photo", ["ann/1.png", "ann/clean/1.png", "ann/distortion/1_foggy.png"])
def test_the_folder_of_persons_is_the_one_that_was_scanned(tmp_path, photo):
    root = tmp_path / "ann" / "train"  # a person's name may occur above as well
    write_all(root, photo)
    assert folder_of(scan_persons(root)) == root


@pytest.mark.parametrize("use", [persons_of, folder_of, lambda persons: without_kinds(persons, ())])
def test_an_empty_list_of_persons_is_refused(use):
    with pytest.raises(UserError, match="no person is left; if all of them are held out, lower HOLDOUT_PERSONS"):
        use([])


def test_persons_are_split_by_name_and_a_missing_one_is_refused(task_b):
    ann, bob, cy, di = scan_persons(task_b / "train")
    assert split_persons([ann, bob, cy, di], ["di", "ann"]) == ([bob, cy], [ann, di])
    with pytest.raises(UserError, match="train: 2 of the 3 held-out persons have no readable photo there, 'xi' first"):
        split_persons([ann, bob, cy, di], ["zed", "ann", "xi"])


def test_skipped_kinds_are_left_out_and_so_are_persons_with_no_other_photo(caplog):
    photo, rainy, sunny = Path("train/ann/1.png"), Path("train/ann/1_rainy.png"), Path("train/ann/1_sunny.png")
    bob = Person("bob", (), (Path("train/bob/distortion/1_sunny.png"),))
    persons = [Person("ann", (photo,), (rainy, sunny)), bob]
    assert without_kinds(persons, ("sunny",)) == [Person("ann", (photo,), (rainy,))]
    with pytest.raises(UserError, match="train: SKIP_KINDS leaves no photo to train on"):
        without_kinds([bob], ("sunny",))
    assert caplog.messages == [] and without_kinds(persons, ("suny",)) == persons
    without_kinds([Person("ann", (photo,), ())], ("foggy",))
    assert caplog.messages == [
        "SKIP_KINDS: no train photo is of kind 'suny'; there are rainy, sunny",
        "SKIP_KINDS: no train photo is of kind 'foggy'; there are no distorted photos",
    ]


def test_the_digest_of_files_changes_with_names_persons_and_sizes_not_with_their_folder(tmp_path):
    def digest(person: str, photo: str, size: int = 9) -> str:
        path = tmp_path / photo
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))
        return files_digest([Person(person, (path,), ())])

    first = digest("ann", "train/1.png")
    assert first == digest("ann", "elsewhere/1.png")
    others = {digest("bob", "train/1.png"), digest("ann", "train/2.png"), digest("ann", "train/1.png", size=10)}
    assert len(others | {first}) == 4


def test_the_holdout_is_a_sorted_draw_by_seed_and_leaves_two_persons():
    names = [f"p{number:02d}" for number in range(30)]
    held_out = split_holdout(names, 5, seed=0)
    assert len(set(held_out)) == 5 and set(held_out) < set(names) and held_out == sorted(held_out)
    assert split_holdout(names[::-1], 5, seed=0) == held_out
    assert len({tuple(split_holdout(names, 5, seed)) for seed in range(5)}) == 5
    assert split_holdout(names, 0, seed=0) == [] and len(split_holdout(names, 28, seed=0)) == 28
    for count in (-1, 29, 31):
        with pytest.raises(UserError, match=f"HOLDOUT_PERSONS = {count}: 30 persons are there, and two must stay"):
            split_holdout(names, count, seed=0)


@pytest.mark.parametrize(
    "source, target, warning",
    [
        ("train/bob", "val/bob", "1 of 3 val persons are train persons too: val then does not measure"),
        ("train/bob/clean/bob_0001.png", "train/di/clean/z.png", "1 images lie under more than one person; one of"),
        ("train/bob/clean/bob_0001.png", "val/eve/clean/z.png", "1 images lie under more than one person; one of"),
        ("train/bob/clean/bob_0001.png", "train/bob/clean/z.png", "1 clean photos of one person are one file: its"),
    ],
)
def test_shared_persons_and_identical_photos_are_reported(task_b, caplog, source, target, warning):
    source, target = task_b / source, task_b / target
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    train, val = scan_persons(task_b / "train"), scan_persons(task_b / "val")
    warn_shared_persons(train, val)
    warn_duplicate_photos(train)
    [message] = caplog.messages
    assert message.startswith(warning)
    assert message.endswith("(bob)" if source.is_dir() else f"\n  {source} = {target}")


def test_different_persons_and_different_files_of_equal_size_are_not_reported(tmp_path, caplog):
    paths = [write_plain(tmp_path / f"{n}.bmp", (n, 3 - n, 0)) for n in range(4)]
    ann, bob = Person("ann", tuple(paths[:2]), ()), Person("bob", tuple(paths[2:]), ())
    warn_shared_persons([ann], [bob])
    warn_duplicate_photos([ann, bob])
    assert caplog.messages == [] and len({path.stat().st_size for path in paths}) == 1


# --- datasets ---------------------------------------------------------------------------------------------------------

# Colours are (person, photo, 0) for a clean photo and (person, source photo, number of the copy) for a distorted one.
PHOTOS = {
    "abe/distortion/abe_1_foggy.png": (0, 1, 1),  # no clean photo: no pair
    "bob/clean/bob_1.png": (1, 1, 0),
    "bob/clean/bob_1_10.png": (1, 10, 0),
    "bob/distortion/bob_1_foggy.png": (1, 1, 1),
    "bob/distortion/bob_1_rainy.png": (1, 1, 2),
    "bob/distortion/bob_1_10_blurred.png": (1, 10, 1),
    "bob/distortion/bob_1_10_foggy.png": (1, 10, 2),
    "bob/distortion/bob_1_10_sunny.png": (1, 10, 3),
    "cy/clean/cy_0.png": (2, 0, 0),
    "cy/clean/cy_1.png": (2, 1, 0),  # no copy of its own
    "cy/distortion/cy_0_foggy.png": (2, 0, 1),
    "dee/clean/dee_0.png": (3, 0, 0),
    "dee/distortion/photo_7_foggy.png": (3, 99, 1),  # copies of a photo that is not there
    "dee/distortion/photo_7_rainy.png": (3, 99, 2),
}
EXTRA = [(9, 1, 0), (9, 2, 0)]  # of nobody, in another folder
ANCHORS = [(1, 1, 0), (1, 10, 0), (2, 0, 0), (2, 1, 0), (3, 0, 0)]


@pytest.fixture
def tree(tmp_path) -> Path:
    for name, colour in PHOTOS.items():
        write_plain(tmp_path / "train" / name, colour)
    return tmp_path / "train"


def jittered(image: Image.Image) -> torch.Tensor:
    """Stands for a random augmentation: the whole part of a pixel identifies the photo, the fraction what was drawn."""
    return pil_to_tensor(image) + torch.rand(())


def plain(items) -> list[tuple]:
    """Items as plain numbers, each image as its first pixel."""
    return [tuple(tuple(part[:, 0, 0].tolist()) if torch.is_tensor(part) else part for part in item) for item in items]


def items(dataset, epoch: int, indices=None) -> list[tuple]:
    dataset.set_epoch(epoch)
    return plain(dataset if indices is None else (dataset[index] for index in indices))


def test_classification_holds_every_photo_with_the_label_of_its_person(tree):
    dataset = FaceClassificationDataset(tree, pil_to_tensor)
    assert dataset.label2idx == {"abe": 0, "bob": 1, "cy": 2, "dee": 3} and dataset.persons == list(dataset.label2idx)
    photos = items(dataset, 0)
    assert sorted(photos) == sorted((colour, colour[0]) for colour in PHOTOS.values())
    assert items(dataset, 0, range(2 * len(dataset))) == 2 * photos  # beyond len: the same photos again
    for index, (pixel, _) in enumerate(2 * photos):
        assert [load_image(path).getpixel((0, 0)) for path in dataset.files(index)] == [pixel]


def marked(image: Image.Image) -> Image.Image:
    """Stands for a distortion, one that works in place: it adds 100 and a random number to the last channel."""
    person, photo, copy = image.getpixel((0, 0))
    image.paste((person, photo, copy + 100 + int(torch.randint(50, ()))), (0, 0, *image.size))
    return image


MARKED = v2.Compose([marked, pil_to_tensor])


def pairs(root, transform, seed: int = 0) -> FacePairDataset:
    """Of all kinds of positives."""
    degraded = v2.Compose([marked, transform])
    return FacePairDataset(root, transform, clean=0.3, on_the_fly=0.4, degraded=degraded, seed=seed)


each_dataset = pytest.mark.parametrize("build", [FaceClassificationDataset, pairs])


@each_dataset
def test_random_draws_depend_on_seed_epoch_and_index_alone_and_differ_between_photos(tree, build):
    indices = range(20)
    first = items(build(tree, jittered, seed=3), 5, indices)
    torch.manual_seed(99)  # torch's own generator has no influence
    assert items(build(tree, jittered, seed=3), 5, indices[::-1])[::-1] == first
    others = [items(build(tree, jittered, seed=seed), epoch, indices) for seed, epoch in ((3, 6), (4, 5), (5, 3))]
    photos = [part for found in (first, *others) for item in found for part in item if isinstance(part, tuple)]
    assert len({photo[0] % 1 for photo in photos}) == len(photos) >= 4 * 20


def test_without_anchors_only_the_positives_are_read(tree, opened):
    dataset = FacePairDataset(tree, pil_to_tensor, with_anchors=False, clean=0.0, on_the_fly=0.3, degraded=MARKED)
    for index in range(len(dataset)):
        opened.clear()
        anchor, positive, _, _ = dataset[index]
        assert anchor.numel() == 0 and positive.dim() == 3
        assert opened == [dataset.files(index)[1]]


@each_dataset
def test_drawing_an_item_leaves_torchs_generators_as_they_were(tree, monkeypatch, build):
    gpu_seeds = []
    torch.manual_seed(5)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", gpu_seeds.append)
    state = torch.get_rng_state()
    dataset = build(tree, jittered)
    assert len(dataset[3]) and len(dataset.files(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert gpu_seeds == []  # otherwise, without workers, every step on a GPU would draw dropout from the same few seeds


@each_dataset
def test_workers_that_live_on_give_the_items_of_the_main_process_in_every_epoch(tree, build):
    dataset = build(tree, jittered)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in (0, 1, 0):
        assert items(dataset, epoch) == plain(loader)


def test_a_validation_split_has_the_labels_of_the_training_set(tree, tmp_path):
    write_all(tmp_path / "val", "dee/2.png", "dee/3.png", "bob/1.png", "bob/distortion/1_foggy.png")
    train_set = FaceClassificationDataset(tree, pil_to_tensor)
    for root in (tmp_path / "val", scan_persons(tmp_path / "val")):
        dataset = FaceCleanValDataset(root, train_set.persons, train_set.label2idx, pil_to_tensor)
        assert [(path.name, label) for path, label in dataset.samples] == [("1.png", 1), ("2.png", 3), ("3.png", 3)]
        assert items(dataset, 0) == [((90, 90, 90), 1), ((90, 90, 90), 3), ((90, 90, 90), 3)]
        assert dataset.persons == train_set.persons and dataset.label2idx == train_set.label2idx


def test_a_validation_split_that_does_not_fit_the_training_set_is_refused(tree):
    with pytest.raises(UserError, match=r"2 of 4 persons are not among the 2 trained ones \(abe, dee\)"):
        FaceCleanValDataset(tree, ["bob", "cy"], {"bob": 0, "cy": 1}, pil_to_tensor)
    with pytest.raises(UserError, match="persons and label2idx hold different persons"):
        FaceCleanValDataset(tree, ["abe", "bob"], {"abe": 0}, pil_to_tensor)
    no_clean_photo = [Person("bob", (), (tree / "bob/distortion/bob_1_foggy.png",))]
    with pytest.raises(UserError, match=f"^{tree}: no clean photo; expected"):
        FaceCleanValDataset(no_clean_photo, ["bob"], {"bob": 0}, pil_to_tensor)


def test_persons_without_distorted_photos_are_named_before_training(tmp_path, caplog):
    write_all(tmp_path, "ann/1.png", "bob/1.png", "bob/distortion/1_foggy.png")
    FaceClassificationDataset(tmp_path, pil_to_tensor)
    expected = "1 of 2 persons have no distorted photo to train on (ann); expected "
    assert caplog.messages == [f"{tmp_path}: {expected}{tmp_path}/<person>/distortion/*.jpg"]


# --- pairs ------------------------------------------------------------------------------------------------------------


def positives(dataset: FacePairDataset, epochs: int) -> list[set[tuple]]:
    """All positives of each anchor, as pixels."""
    drawn = ([item[1] for item in items(dataset, epoch)] for epoch in range(epochs))
    return [set(of_anchor) for of_anchor in zip(*drawn, strict=True)]


def test_an_item_is_anchor_positive_label_and_index_of_the_anchor(tree, caplog):
    dataset = pairs(tree, pil_to_tensor)
    assert dataset.persons == ["abe", "bob", "cy", "dee"] and len(dataset) == 5
    assert caplog.messages[1:] == [f"{tree}: 1 of 4 persons lack clean photos and give no pair (abe)"]
    for number, (anchor, positive, label, index) in enumerate(items(dataset, 2, range(40))):  # beyond len: again
        assert index == number % 5 and anchor == ANCHORS[index] and anchor[0] == positive[0] == label
        files = dataset.files(number)
        assert dataset.anchors[index] == (files[0], label)
        shown = anchor if origin(anchor, positive) == "on the fly" else positive
        assert [load_image(path).getpixel((0, 0)) for path in files] == [anchor, shown]
    *_, labels, indices = next(iter(DataLoader(dataset, 5)))
    assert torch.equal(labels, torch.tensor([1, 1, 2, 2, 3])) and torch.equal(indices, torch.arange(5))


def test_positives_are_all_copies_of_the_anchor_or_of_the_persons_other_photos_if_it_has_none(tree):
    assert positives(FacePairDataset(tree, pil_to_tensor), epochs=60) == [
        {(1, 1, 1), (1, 1, 2)},  # bob_1, and nothing of bob_1_10
        {(1, 10, 1), (1, 10, 2), (1, 10, 3)},
        {(2, 0, 1)},
        {(2, 0, 1)},  # cy_1: cy_0's
        {(3, 99, 1), (3, 99, 2)},
    ]
    some = FacePairDataset(without_kinds(scan_persons(tree), ("rainy",)), pil_to_tensor)
    assert positives(some, epochs=20)[::2] == [{(1, 1, 1)}, {(2, 0, 1)}, {(3, 99, 1)}]


def test_a_kind_in_often_is_drawn_twice_as_often_as_the_others(tree, caplog):
    dataset = FacePairDataset(tree, pil_to_tensor, often=("sunny",))
    count = Counter(distortion_kind(dataset.files(1 + n * len(dataset))[1]) for n in range(2000))
    assert count == pytest.approx({"sunny": 1000, "blurred": 500, "foggy": 500}, abs=80)
    FacePairDataset(tree, pil_to_tensor, often=("suny",))
    assert caplog.messages[1:] == [
        f"{tree}: 1 of 4 persons lack clean or distorted photos and give no pair (abe)",
        "OFTEN: no train photo is of kind 'suny'; there are blurred, foggy, rainy, sunny",
    ]


def origin(anchor: tuple, positive: tuple) -> str:
    if positive == anchor:
        return "clean"
    if positive[2] >= 100:
        assert positive[:2] == anchor[:2] and anchor[2] == 0  # made of the clean photo, which stays as it is
        return "on the fly"
    return "file"


@pytest.mark.parametrize(
    "clean, on_the_fly, degraded",
    [(0.0, 0.0, None), (1.0, 0.0, None), (0.4, 0.0, None), (0.0, 1.0, MARKED), (0.1, 0.5, MARKED)],
)
def test_positives_are_the_anchor_itself_or_distorted_on_the_fly_in_the_given_shares(tree, clean, on_the_fly, degraded):
    dataset = FacePairDataset(tree, pil_to_tensor, clean=clean, on_the_fly=on_the_fly, degraded=degraded)
    count = Counter(origin(anchor, positive) for anchor, positive, *_ in items(dataset, 0, range(1200)))
    for kind, share in (("clean", clean), ("on the fly", on_the_fly), ("file", 1 - clean - on_the_fly)):
        assert abs(count[kind] - 1200 * share) <= 4 * (1200 * share * (1 - share)) ** 0.5, (kind, count)


def test_shares_do_not_change_which_copies_are_drawn(tree):
    plain, mixed = (items(build(tree, pil_to_tensor), 0, range(150)) for build in (FacePairDataset, pairs))
    same = [item == other for item, other in zip(mixed, plain, strict=True) if origin(*item[:2]) == "file"]
    assert all(same) and 20 < len(same) < 70


def test_both_photos_of_every_second_item_are_mirrored_whatever_the_positive(tmp_path):
    lopsided = Image.new("RGB", (8, 8))
    lopsided.paste((200, 200, 200), (0, 0, 4, 8))  # the left half is bright
    for path in write_all(tmp_path, *(f"{name}/{file}.png" for name in "ab" for file in ("1", "distortion/1_foggy"))):
        lopsided.save(path)
    dim = RandomDegradation({"lowlight": DISTORTIONS["lowlight"]}, probability=1.0, most=1, side=8)
    dataset = FacePairDataset(
        tmp_path, pil_to_tensor, clean=0.3, on_the_fly=0.3, degraded=v2.Compose([dim, pil_to_tensor])
    )
    mirrored = [[bool(image[0, 0, 7] > image[0, 0, 0]) for image in dataset[index][:2]] for index in range(400)]
    assert all(anchor == positive for anchor, positive in mirrored)
    assert sum(anchor for anchor, _ in mirrored) == pytest.approx(200, abs=40)  # 4 standard deviations of 10


@pytest.mark.parametrize(
    "clean, on_the_fly, degraded",
    [(-0.1, 0.5, MARKED), (0.5, -0.1, MARKED), (0.6, 0.5, MARKED), (float("nan"), 0.0, MARKED), (0.1, 0.5, None)],
)
def test_shares_outside_0_to_1_and_a_share_without_a_distortion_are_refused(tree, clean, on_the_fly, degraded):
    shares = f"^CLEAN = {clean}, DISTORT = {on_the_fly}: expected shares in 0..1 whose sum is at most 1"
    with pytest.raises(UserError, match=shares if degraded else f"^DISTORT = {on_the_fly}: .* `degraded` is None"):
        FacePairDataset(tree, pil_to_tensor, clean=clean, on_the_fly=on_the_fly, degraded=degraded)


@pytest.mark.parametrize("names, found", [(["abe"], "found 0 among 1"), (["abe", "cy"], "found 1 among 2")])
def test_pairs_need_two_persons_that_have_some(tree, names, found):
    persons = split_persons(scan_persons(tree), names)[1]
    for degraded, needed in ((None, "both clean and distorted"), (MARKED, "clean")):
        with pytest.raises(
            UserError, match=f"^{tree}: training on pairs needs two persons with {needed} photos, {found}"
        ):
            FacePairDataset(persons, pil_to_tensor, degraded=degraded)


def test_photos_without_copies_or_without_persons_are_anchors_distorted_on_the_fly(tree, tmp_path, caplog):
    shutil.rmtree(tree / "cy" / "distortion")
    extra = [write_plain(tmp_path / f"extra/{number}.png", (9, number, 0)) for number in (1, 2)]
    dataset = FacePairDataset(tree, pil_to_tensor, extra=extra, clean=0.25, degraded=MARKED)
    assert caplog.messages[-1] == (
        f"{tree}: 1 of 4 persons have no distorted photo; their clean photos are distorted on the fly instead (cy)"
    )
    assert dataset.persons == ["abe", "bob", "cy", "dee"]
    assert [label for _, label in dataset.anchors] == [1, 1, 2, 2, 3, 4, 5]  # each extra photo has a label of its own
    count = Counter()
    for number, (anchor, positive, label, index) in enumerate(items(dataset, 1, range(1400))):
        assert index == number % 7 and label == dataset.anchors[index][1] and anchor == (*ANCHORS, *EXTRA)[index]
        count[label, origin(anchor, positive)] += 1
        if origin(anchor, positive) == "on the fly":
            assert dataset.files(number) == 2 * [dataset.anchors[index][0]]
    assert {kind for _, kind in count} == {"clean", "file", "on the fly"}
    for label, kind in ((1, "file"), (2, "on the fly"), (3, "file"), (4, "on the fly"), (5, "on the fly")):
        photos = 200 * [anchor[0] for anchor in (*ANCHORS, *EXTRA)].count(label) if label < 4 else 200
        assert count[label, kind] + count[label, "clean"] == photos
        assert count[label, "clean"] == pytest.approx(photos / 4, abs=4 * (photos * 3 / 16) ** 0.5)


def test_extra_photos_change_nothing_of_the_photos_with_persons(tree, tmp_path):
    extra = [write_plain(tmp_path / "extra/1.png", (9, 1, 0))]
    alone = pairs(tree, jittered)
    degraded = v2.Compose([marked, jittered])
    more = FacePairDataset(tree, jittered, extra=extra, clean=0.3, on_the_fly=0.4, degraded=degraded)
    assert items(more, 3, range(5)) == items(alone, 3, range(5))
    with pytest.raises(UserError, match="photos are to be distorted on the fly, but `degraded` is None"):
        FacePairDataset(tree, pil_to_tensor, extra=extra)
