"""Pairs of a clean photo and its copy: from a file, distorted anew, or clean itself; and photos that are not mirrored.

Each photo of the trees below is of one colour: (person, photo, 0) if clean, (person, photo, number of the copy) else.
"""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from datasets import FacePairDataset, distortion_kind
from distortions import DISTORTIONS
from transforms import RandomDistortion, eval_transform, load_image, train_transform

NONE = 99  # stands in a colour for "made of no clean photo"
ANEW = 200  # added to what `renewed` has made


def write(path: Path, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


@pytest.fixture
def tree(tmp_path) -> Path:
    """abe: no copy at all. bob: photos 1 and 1_10, 2 and 3 copies. cy: photo 1 has no copy. dee: a nameless one."""
    root = tmp_path / "train"
    clean = {"abe": ["1"], "bob": ["1", "1_10"], "cy": ["0", "1"], "dee": ["0"]}
    for p, (name, photos) in enumerate(clean.items()):
        for photo in photos:
            write(root / name / "clean" / f"{name}_{photo}.png", (p, int(photo.rpartition("_")[2]), 0))
    copies = {
        "bob": [("bob_1", 1, ("foggy", "rainy")), ("bob_1_10", 10, ("blurred", "foggy", "sunny"))],
        "cy": [("cy_0", 0, ("foggy", "rainy"))],
        "dee": [("photo_7", NONE, ("foggy", "rainy"))],
    }
    for p, name in ((1, "bob"), (2, "cy"), (3, "dee")):
        for stem, photo, kinds in copies[name]:
            for number, kind in enumerate(kinds, 1):
                write(root / name / "distortion" / f"{stem}_{kind}.png", (p, photo, number))
    return root


ANCHORS = [(1, 1, 0), (1, 10, 0), (2, 0, 0), (2, 1, 0), (3, 0, 0)]  # of `tree`, in this order


def first_pixel(image: Image.Image) -> torch.Tensor:
    return torch.tensor(image.getpixel((0, 0)))


def jittered_pixel(image: Image.Image) -> torch.Tensor:
    """Stands for a random augmentation: what it drew, and which photo."""
    return torch.cat([torch.rand(2), first_pixel(image).float()])


def renewed(image: Image.Image) -> Image.Image:
    """Stands for RandomDistortion: the same photo, with a last channel that tells it and what it drew."""
    person, photo, copy = image.getpixel((0, 0))
    return Image.new("RGB", (8, 8), (person, photo, copy + ANEW + int(torch.randint(50, ()))))


def no_distortion(image: Image.Image) -> Image.Image:
    pytest.fail("distorted without being asked to")


def pairs_over(dataset: FacePairDataset, epochs: int) -> list[list[tuple[tuple, tuple]]]:
    """For each anchor its (anchor, positive) colours, one for each epoch."""
    found: list[list] = [[] for _ in range(len(dataset))]
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        for index, (anchor, positive, *_) in enumerate(dataset):
            found[index].append((tuple(anchor.tolist()), tuple(positive.tolist())))
    return found


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", [False, True])
def test_with_copies_the_positive_is_always_a_copy_of_the_anchor_itself_and_each_of_them_comes(tree, negatives):
    dataset = FacePairDataset(tree, first_pixel, negatives=negatives, copies=True)
    found = pairs_over(dataset, epochs=60)
    assert [{anchor for anchor, _ in pairs} for pairs in found] == [{anchor} for anchor in ANCHORS]
    positives = [{positive for _, positive in pairs} for pairs in found]
    assert positives[0] == {(1, 1, 1), (1, 1, 2)}  # bob_1, and nothing of bob_1_10
    assert positives[1] == {(1, 10, 1), (1, 10, 2), (1, 10, 3)}
    assert positives[2] == {(2, 0, 1), (2, 0, 2)}


def test_an_anchor_without_a_copy_has_copies_of_other_photos_of_its_person(tree):
    found = pairs_over(FacePairDataset(tree, first_pixel, negatives=False, copies=True), epochs=60)
    positives = [{positive for _, positive in pairs} for pairs in found]
    assert positives[3] == {(2, 0, 1), (2, 0, 2)}  # cy_1: cy_0's
    assert positives[4] == {(3, NONE, 1), (3, NONE, 2)}  # dee_0: of a name that tells no photo


def test_without_copies_the_positive_is_of_any_photo_of_the_person(tree):
    found = pairs_over(FacePairDataset(tree, first_pixel, negatives=False), epochs=120)
    every = {(1, 1, 1), (1, 1, 2), (1, 10, 1), (1, 10, 2), (1, 10, 3)}
    for pairs in found[:2]:
        assert {positive for _, positive in pairs} == every


def test_a_kind_that_is_skipped_is_no_copy_and_an_anchor_that_has_no_other_falls_back(tree):
    dataset = FacePairDataset(tree, first_pixel, negatives=False, copies=True, skip_kinds=("foggy", "rainy"))
    found = pairs_over(dataset, epochs=60)  # bob_1 has no copy left, cy and dee no distorted photo at all
    assert [{anchor for anchor, _ in pairs} for pairs in found] == [{(1, 1, 0)}, {(1, 10, 0)}]
    for pairs in found:
        assert {positive for _, positive in pairs} == {(1, 10, 1), (1, 10, 3)}


def test_a_kind_drawn_often_comes_twice_as_often_as_another_and_the_others_equally(tree, caplog):
    """bob_1_10 has three copies: one of them twice as often."""
    kinds = {distortion_kind(path) for path in (tree / "bob" / "distortion").glob("bob_1_10_*")}
    assert len(kinds) == 3
    often = min(kinds)
    dataset = FacePairDataset(tree, first_pixel, negatives=False, copies=True, often=(often,))
    drawn = Counter(distortion_kind(dataset.draw(1, torch.Generator().manual_seed(seed))[1]) for seed in range(2000))
    shares = {kind: count / 2000 for kind, count in drawn.items()}
    assert shares == {kind: pytest.approx(0.5 if kind == often else 0.25, abs=0.04) for kind in kinds}
    assert "OFTEN" not in caplog.text
    FacePairDataset(tree, first_pixel, often=("suny",))
    assert "OFTEN: no train photo is of kind 'suny'; there are " in caplog.text


def test_the_files_of_an_item_are_the_anchor_and_the_copy_that_it_shows(tree):
    dataset = FacePairDataset(tree, first_pixel, negatives=False, copies=True)
    for epoch in range(5):
        dataset.set_epoch(epoch)
        for index in range(len(dataset)):
            shown = [tuple(pixel.tolist()) for pixel in dataset[index][:2]]
            assert [load_image(path).getpixel((0, 0)) for path in dataset.files(index)] == shown


def test_an_item_ends_with_the_label_and_the_place_of_its_anchor(tree):
    dataset = FacePairDataset(tree, first_pixel, negatives=False, copies=True)
    assert dataset.persons == ["abe", "bob", "cy", "dee"] and len(dataset) == 5
    for index in range(3 * len(dataset)):  # beyond the end: the same anchors once more
        anchor, _, label, place = dataset[index]
        assert place == index % 5
        path, labelled = dataset.anchors[place]
        assert load_image(path).getpixel((0, 0)) == tuple(anchor.tolist()) == ANCHORS[place]
        assert label == labelled == ANCHORS[place][0]
    *_, labels, places = next(iter(DataLoader(dataset, 5)))
    assert places.tolist() == [0, 1, 2, 3, 4] and places.dtype == torch.int64
    assert labels.tolist() == [1, 1, 2, 2, 3]


# --- shares of clean and of new positives -----------------------------------------------------------------------------


def kind_of(anchor: tuple, positive: tuple) -> str:
    """Whether a positive is the clean anchor itself, `renewed` of it, or a file."""
    if positive == anchor:
        return "clean"
    if positive[2] >= ANEW:
        assert positive[:2] == anchor[:2]  # of the anchor, and so not of a file
        return "anew"
    return "file"


@pytest.mark.parametrize("clean, anew", [(0.1, 0.5), (0.5, 0.1), (0.4, 0.0), (0.0, 0.4), (0.25, 0.75)])
def test_clean_and_new_positives_come_about_as_often_as_asked(tree, clean, anew):
    dataset = FacePairDataset(
        tree, first_pixel, negatives=False, copies=True, clean=clean, anew=anew, distort=renewed, check_images=False
    )
    found = pairs_over(dataset, epochs=240)
    count = Counter(kind_of(*pair) for pairs in found for pair in pairs)  # of 1200
    for kind, share in (("clean", clean), ("anew", anew), ("file", 1 - clean - anew)):
        deviation = math.sqrt(1200 * share * (1 - share))
        assert abs(count[kind] - 1200 * share) <= 4 * deviation, (kind, count)
    for pairs in found:  # no anchor is left out
        assert {kind_of(*pair) for pair in pairs} == set(count)


def test_a_share_of_0_never_comes_and_one_of_1_always(tree):
    def kinds(**options) -> set[str]:
        found = pairs_over(FacePairDataset(tree, first_pixel, negatives=False, copies=True, **options), epochs=20)
        return {kind_of(*pair) for pairs in found for pair in pairs}

    assert kinds(distort=no_distortion) == {"file"}
    assert kinds(clean=1.0, distort=no_distortion) == {"clean"}
    assert kinds(clean=0.5, distort=no_distortion) == {"clean", "file"}
    assert kinds(anew=1.0, distort=renewed) == {"anew"}


def test_files_are_the_copies_that_they_would_be_without_shares(tree):
    plain = pairs_over(FacePairDataset(tree, first_pixel, negatives=False, copies=True), epochs=30)
    options = {"clean": 0.2, "anew": 0.3, "distort": renewed}
    shared = pairs_over(FacePairDataset(tree, first_pixel, negatives=False, copies=True, **options), epochs=30)
    kept = [(a, b) for p, s in zip(plain, shared, strict=True) for a, b in zip(p, s, strict=True)]
    assert all(a == b for a, b in kept if kind_of(*b) == "file")
    assert 40 < sum(kind_of(*b) == "file" for _, b in kept) < 110  # of 150


def test_the_same_seed_epoch_and_index_give_the_same_item_whatever_came_before(tree):
    options = {"negatives": False, "copies": True, "clean": 0.3, "anew": 0.4, "distort": renewed}

    def items(seed: int, epoch: int, indices) -> dict[int, list]:
        dataset = FacePairDataset(tree, jittered_pixel, seed=seed, **options)
        dataset.set_epoch(epoch)
        return {i: [p.tolist() if isinstance(p, torch.Tensor) else p for p in dataset[i]] for i in indices}

    first = items(3, 5, range(40))
    torch.rand(7)  # what others draw from torch's generator is none of its business
    assert items(3, 5, reversed(range(40))) == first
    positives = [item[1][2:] for item in first.values()]
    for seed, epoch in ((4, 5), (3, 6)):
        others = items(seed, epoch, range(40))
        kinds = [
            [kind_of(tuple(item[0][2:]), tuple(item[1][2:])) for item in found.values()] for found in (first, others)
        ]
        assert kinds[0] != kinds[1]
        assert positives != [item[1][2:] for item in others.values()]


def test_workers_give_the_pairs_that_the_main_process_gives(tree):
    dataset = FacePairDataset(
        tree, jittered_pixel, negatives=False, copies=True, clean=0.3, anew=0.4, distort=renewed, seed=2
    )
    dataset.set_epoch(3)
    alone, by_workers = (
        [[column.tolist() for column in batch] for batch in DataLoader(dataset, 2, num_workers=workers)]
        for workers in (0, 2)
    )
    assert len(alone) == 3 and by_workers == alone


def test_a_positive_made_anew_is_the_anchor_under_real_distortions(tmp_path):
    for number, name in enumerate(("ann", "bob")):
        pixels = np.random.default_rng(number).integers(60, 200, (40, 40, 3), dtype=np.uint8)
        for file in (f"clean/{name}_0.png", f"distortion/{name}_0_foggy.png"):
            (tmp_path / name / file).parent.mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / name / file)
    dark = {"lowlight": DISTORTIONS["lowlight"]}
    dataset = FacePairDataset(
        *(tmp_path, eval_transform(76, 1.0)),
        **{"negatives": False, "copies": True, "anew": 1.0, "distort": RandomDistortion(dark, 1.0, 1, side=40)},
    )
    shares = []
    for epoch in range(10):
        dataset.set_epoch(epoch)
        for anchor, positive, *_ in dataset:
            bright, dim = (128 * image + 127.5 for image in (anchor, positive))
            share = (dim.mean() / bright.mean()).item()
            assert 0.09 < share < 0.51  # of `lowlight`; the file is as bright as the anchor
            assert (dim - share * bright).abs().max() < 2
            shares.append(share)
    assert len({round(share, 3) for share in shares}) > 10  # each time of another severity


@pytest.mark.parametrize(
    "clean, anew", [(-0.1, 0.5), (0.5, -0.1), (0.6, 0.5), (1.1, 0.0), (0.0, 1.1), (math.nan, 0.0), (0.0, math.nan)]
)
def test_shares_that_cannot_be_are_refused(tree, clean, anew):
    with pytest.raises(ValueError) as error:
        FacePairDataset(tree, first_pixel, clean=clean, anew=anew, distort=renewed)
    assert str(error.value) == (
        f"CLEAN = {clean}, DISTORT = {anew}: expected shares of 0..1 that make 1 at most, together"
    )


# --- no mirroring -----------------------------------------------------------------------------------------------------


def lopsided() -> Image.Image:
    """Dark on its left, bright on its right."""
    return Image.fromarray(np.tile(np.linspace(20, 230, 100).astype(np.uint8)[None, :, None], (100, 1, 3)))


def bright_sides(transform, times: int) -> Counter:
    """How often the right, and the left, half of what comes out is the brighter one."""
    torch.manual_seed(0)
    images = [transform(lopsided()) for _ in range(times)]
    assert all(image.shape == (3, 76, 76) for image in images)
    return Counter("right" if image[..., 38:].mean() > image[..., :38].mean() else "left" for image in images)


def test_without_mirroring_left_stays_left_and_with_it_every_second_image_turns():
    options = {"image_size": 76, "face_crop": 0.8, "zoom": 0.1, "shift": 0.03}
    assert bright_sides(train_transform(**options, mirror=False), 200) == {"right": 200}
    by_default, asked = (bright_sides(train_transform(**options, **more), 200) for more in ({}, {"mirror": True}))
    assert by_default == asked and 70 < asked["left"] < 130  # standard deviation 7


def test_without_mirroring_and_jitter_training_sees_what_evaluation_sees():
    transform = train_transform(76, 0.8, 0.0, 0.0, mirror=False)
    expected = eval_transform(76, 0.8)(lopsided())
    assert all(torch.equal(transform(lopsided()), expected) for _ in range(10))


def test_without_mirroring_the_crop_is_jittered_and_the_photo_distorted_all_the_same():
    jittered = train_transform(76, 0.8, 0.1, 0.03, mirror=False)
    torch.manual_seed(0)
    assert not torch.equal(jittered(lopsided()), jittered(lopsided()))

    def black(image: Image.Image) -> Image.Image:
        return Image.new("RGB", image.size)

    distorted = train_transform(76, 0.8, 0.0, 0.0, black, mirror=False)(lopsided())
    assert (distorted == distorted[0, 0, 0]).all() and distorted[0, 0, 0] < -0.99
