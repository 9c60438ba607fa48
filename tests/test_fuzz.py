"""Damaged files of every kind that the scripts read: each one loads or is refused with a message that names it."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from facenet_pytorch import InceptionResnetV1
from PIL import Image
from tiny_net import TinyNet

import backbones
import checkpoints
import enrolment
import models
from common import UserError
from datasets import find_unreadable
from transforms import eval_transform, load_image


def damaged(content: bytes, seed: int) -> bytes:
    """`content` with bytes flipped, cut off, cut out, doubled or zeroed: one of these, by `seed`."""
    generator = np.random.default_rng(seed)
    data, start = bytearray(content), int(generator.integers(len(content)))
    length = int(generator.integers(1, max(2, min(400, len(content) - start))))
    how = seed % 5
    if how == 0:
        near = 300 if generator.random() < 0.5 else len(data)  # the header as often as all the rest
        for place in generator.integers(min(near, len(data)), size=int(generator.integers(1, 12))):
            data[place] ^= int(generator.integers(1, 256))
    elif how == 1:
        del data[start:]
    elif how == 2:
        del data[start : start + length]
    elif how == 3:
        data[start:start] = data[start : start + length]
    else:
        data[start : start + length] = bytes(length)
    return bytes(data)


def encoded(suffix: str, mode: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    image = Image.fromarray(noise).resize((60, 70)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()[suffix], exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    "suffix, mode",
    [
        *((".jpg", "RGB"), (".jpg", "CMYK"), (".png", "RGBA"), (".png", "P"), (".bmp", "RGB"), (".webp", "RGB")),
        *((".tif", "RGB"), (".gif", "P")),
    ],
)
def test_a_damaged_photo_is_listed_or_it_loads(tmp_path, suffix, mode):
    whole, transform = encoded(suffix, mode), eval_transform(76, 0.52)
    paths = []
    for seed in range(100):
        paths.append(tmp_path / f"{seed}{suffix}")
        paths[-1].write_bytes(damaged(whole, seed))
    unreadable = find_unreadable(paths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd EXIF blocks
        for path in paths:
            if path in unreadable:
                assert unreadable[path]  # the reason
                with pytest.raises(UserError, match=path.name):
                    load_image(path)
            else:
                image = load_image(path)
                assert image.mode == "RGB" and transform(image).isfinite().all()
    assert 0 < len(unreadable) < 100  # both happen


@pytest.mark.parametrize("kind", ["AVIF", "DDS", "EPS"])
def test_a_damaged_photo_of_a_format_that_is_not_read_is_listed(tmp_path, kind):
    file = io.BytesIO()
    Image.new("RGB", (60, 70), (200, 100, 50)).save(file, kind)
    paths = [tmp_path / f"{seed}.jpg" for seed in range(100)]
    for seed, path in enumerate(paths):
        path.write_bytes(damaged(file.getvalue(), seed))
    assert find_unreadable(paths).keys() == set(paths)


def read_or_refused(path: Path, content: bytes, read: Callable[[Path], object]) -> bool:
    """Whether `read` takes the file; if not, it raises UserError with the file's path."""
    path.write_bytes(content)
    try:
        read(path)
    except UserError as error:
        assert str(path) in str(error) and "weights_only" not in str(error), error
        return False
    return True


CROPS = {"face": 0.52, "wide_size": 76, "wide_weight": 0.3}


def written(path: Path, crops: dict | None) -> bytes:
    facts = {"stage": 2, "image_size": 76, "face_crop": 0.52, "dropout": 0.0, "pretrained": "None", "epoch": 3}
    facts |= {"selected_on": "val", "persons": ["ann", "bob"], "holdout": [], "template": "mean", "top1": 0.5}
    if crops:
        facts |= {"image_size": 146, "face_crop": 1.0}
    facts["crops"] = crops
    checkpoints.save_checkpoint(path, facts, {"model": TinyNet(None, 0.0, crops=crops and models.Crops(**crops))})
    return path.read_bytes()


@pytest.mark.parametrize("crops", [None, CROPS], ids=["face", "both crops"])
def test_a_damaged_checkpoint_is_refused_or_it_loads(tmp_path, crops, monkeypatch):
    monkeypatch.setattr(checkpoints, "FaceNet", TinyNet)
    whole = written(tmp_path / "whole.pt", crops)

    def read(path: Path) -> None:
        model, saved = checkpoints.load_facenet(path, "cpu")
        eval_transform(saved["image_size"], saved["face_crop"])
        assert f"{saved['stage']:d} {saved['epoch']:d} {saved['selected_on']}" and set(saved["persons"])
        model.eval()(torch.zeros(1, 3, saved["image_size"], saved["image_size"]))

    taken = 0
    for seed in range(300):
        taken += read_or_refused(tmp_path / "damaged.pt", damaged(whole, seed), read)
    assert 0 < taken < 250


def test_a_checkpoint_with_a_fact_of_the_wrong_type_is_refused(tmp_path):
    saved = torch.load(io.BytesIO(written(tmp_path / "whole.pt", None)), weights_only=True)
    for name, types in checkpoints.STATED.items():
        values = [value for value in (None, "text", ["a", 1], {"a": 1}, torch.zeros(2)) if not isinstance(value, types)]
        assert values
        for value in values:
            torch.save(saved | {name: value}, tmp_path / "odd.pt")
            with pytest.raises(UserError, match=f"odd.pt: damaged, its {name} is "):
                checkpoints.read_checkpoint(tmp_path / "odd.pt")


def test_damaged_pretrained_weights_are_refused_or_they_load(tmp_path):
    torch.manual_seed(0)
    file = io.BytesIO()
    # Shapes and names are checked before anything else is done: zeros compress no file, but copy fast.
    torch.save({name: value.half() for name, value in InceptionResnetV1(pretrained=None).state_dict().items()}, file)
    whole = file.getvalue()
    taken = 0
    for seed in range(15):
        taken += read_or_refused(tmp_path / "weights.pt", damaged(whole, seed), backbones.load_pretrained)
    assert taken < 15


def test_a_damaged_gallery_is_refused_or_it_identifies(tmp_path):
    empty = enrolment.empty_gallery(2, template="mean", made_by={"image_size": 160}, rated=True, wide=False)
    persons, paths = ["ann", "ann", "bob"], [Path("1.png"), Path("2.png"), Path("3.png")]
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    enrolment.save_gallery(tmp_path / "whole.pt", enrolment.enroll(empty, rows, persons, paths, torch.ones(3)))
    whole = (tmp_path / "whole.pt").read_bytes()

    def read(path: Path) -> None:
        gallery = enrolment.load_gallery(path)
        assert len(enrolment.identify(gallery, gallery.embeddings)) == 3
        enrolment.save_gallery(tmp_path / "again.pt", gallery)
        assert enrolment.load_gallery(tmp_path / "again.pt").persons == gallery.persons

    taken = sum(read_or_refused(tmp_path / "damaged.pt", damaged(whole, seed), read) for seed in range(200))
    assert 0 < taken < 150
