"""Draw a small Task_B of synthetic persons, so that every script runs without the FACECOM photos.

    python -m tools.sample_faces

    OUT_DIR/{train,val}/person_0001/clean/person_0001_0001.jpg
    OUT_DIR/{train,val}/person_0001/distortion/person_0001_0001_blurred.jpg  and every other kind of DISTORTIONS
    OUT_DIR/sample_faces.png  a contact sheet of the first persons

No real person is in it: an identity is a set of numbers (head, eyes, brows, nose, mouth, hair, marks), a photo adds
pose, expression, light, clothes and background, drawn independently of the identity.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import checkpoints
import common
from common import UserError
from distortions import DISTORTIONS
from tools.face_drawing import draw_face
from tools.face_identity import random_identity

# --- output ---
OUT_DIR = Path("sample/Task_B")  # must not hold a train or val folder yet
IMAGE_SIDE = 250  # px, photos are square, 32..1000
JPEG_QUALITY = 92  # 1..95
# --- persons ---
SEED = 0  # 0, 1, 2, ...; the same seed gives the same files, byte for byte
TRAIN_PERSONS = 48  # >= 1, from person_0001 on
VAL_PERSONS = 20  # >= 1, numbered after the train persons
MIN_PHOTOS = 3  # clean photos per person, >= 1; most persons have few, as in LFW
MAX_PHOTOS = 6  # clean photos per person, >= MIN_PHOTOS
SEVERITY_RANGE = (0.3, 0.7)  # of each distorted file, within 0..1; 0.5 is FACECOM's average
# --- speed ---
WORKERS = 2  # processes, >= 1; one per CPU core is fastest
# --- contact sheet ---
SHEET_PERSONS = 6  # rows, >= 1
SHEET_PHOTOS = 3  # clean photos per row, >= 1; the distortions of the first one follow
SHEET_CELL = 96  # px, side of one cell


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The constants that write_person needs, for a process of its own, which sees this file as it is on disk."""

    seed: int
    min_photos: int
    max_photos: int
    side: int  # px
    severity_range: tuple[float, float]
    jpeg_quality: int


def main() -> None:
    common.resolve_constants(globals())
    check_constants()
    checkpoints.check_writable("OUT_DIR", OUT_DIR, folder=True)
    persons = TRAIN_PERSONS + VAL_PERSONS
    folders = [
        OUT_DIR / ("train" if number <= TRAIN_PERSONS else "val") / f"person_{number:04d}"
        for number in range(1, persons + 1)
    ]
    settings = Settings(
        seed=SEED,
        min_photos=MIN_PHOTOS,
        max_photos=MAX_PHOTOS,
        side=IMAGE_SIDE,
        severity_range=SEVERITY_RANGE,
        jpeg_quality=JPEG_QUALITY,
    )
    # spawn on every system: forking a process in which PyTorch has started threads may hang
    with ProcessPoolExecutor(min(WORKERS, persons), mp_context=get_context("spawn")) as pool:
        written = pool.map(write_person, folders, range(1, persons + 1), repeat(settings))
        photos = sum(tqdm(written, total=persons, desc="drawing", unit="person"))
    sheet = OUT_DIR / "sample_faces.png"
    image = contact_sheet(folders[:SHEET_PERSONS], SHEET_PHOTOS, SHEET_CELL)
    image = image.quantize(palette=image.quantize(256, kmeans=5))  # dithered palette: under half of the bytes
    image.save(sheet, optimize=True)
    print(f"{OUT_DIR}: {persons} persons, {photos} clean and {photos * len(DISTORTIONS)} distorted photos; see {sheet}")


def check_constants() -> None:
    """Raise UserError for a constant out of range, or an OUT_DIR that is already filled."""
    at_least_one = {
        "TRAIN_PERSONS": TRAIN_PERSONS,
        "VAL_PERSONS": VAL_PERSONS,
        "MIN_PHOTOS": MIN_PHOTOS,
        "WORKERS": WORKERS,
        "SHEET_CELL": SHEET_CELL,
        "SHEET_PERSONS": SHEET_PERSONS,
        "SHEET_PHOTOS": SHEET_PHOTOS,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise UserError(f"{name} = {value}: expected 1 or more")
    if IMAGE_SIDE < 32:
        raise UserError(f"IMAGE_SIDE = {IMAGE_SIDE}: expected 32 px or more, since less shows no face")
    if MAX_PHOTOS < MIN_PHOTOS:
        raise UserError(f"MAX_PHOTOS = {MAX_PHOTOS}: expected MIN_PHOTOS = {MIN_PHOTOS} or more")
    if not 0 <= SEVERITY_RANGE[0] <= SEVERITY_RANGE[1] <= 1:
        raise UserError(f"SEVERITY_RANGE = {SEVERITY_RANGE}: expected (lowest, highest) within 0..1")
    for folder in (OUT_DIR / "train", OUT_DIR / "val"):
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: delete {OUT_DIR} or choose another OUT_DIR")


def write_person(folder: Path, number: int, settings: Settings) -> int:
    """Draw the photos of person `number` (1, 2, ...) into `folder` and return how many clean ones there are.

    Random streams: (seed, person) for the identity, (seed, person, photo) for a photo, (seed, person, photo, kind) for
    a distortion. All count from 1, since NumPy takes (0, 1) and (0, 1, 0) for the same seed.
    """
    seed, quality = settings.seed, settings.jpeg_quality
    generator = np.random.default_rng((seed, number))
    identity = random_identity(generator)
    photos = min(settings.min_photos + int(generator.geometric(0.45)) - 1, settings.max_photos)
    for kind in ("clean", "distortion"):
        (folder / kind).mkdir(parents=True)
    for photo in range(1, photos + 1):
        name = f"{folder.name}_{photo:04d}"
        image = draw_face(identity, np.random.default_rng((seed, number, photo)), settings.side)
        image.save(folder / "clean" / f"{name}.jpg", quality=quality)
        for index, (kind, distort) in enumerate(DISTORTIONS.items(), 1):
            generator = np.random.default_rng((seed, number, photo, index))
            distorted = distort(image, generator.uniform(*settings.severity_range), generator)
            distorted.save(folder / "distortion" / f"{name}_{kind}.jpg", quality=quality)
    return photos


def contact_sheet(folders: list[Path], photos: int, cell: int) -> Image.Image:
    """One row per person folder: up to `photos` clean photos, then the distortions of the first; cells in px."""
    columns = ["clean"] * photos + list(DISTORTIONS)
    header = 16
    sheet = Image.new("RGB", (cell * len(columns), header + cell * len(folders)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column, name in enumerate(columns):
        draw.text(((column + 0.5) * cell, header / 2), name, "black", font, anchor="mm")
    for row, folder in enumerate(folders):
        clean = sorted((folder / "clean").glob("*.jpg"))
        distorted = [folder / "distortion" / f"{clean[0].stem}_{kind}.jpg" for kind in DISTORTIONS]
        paths = (clean[:photos] + [None] * photos)[:photos] + distorted
        for column, path in enumerate(paths):
            if path is not None:
                with Image.open(path) as image:
                    sheet.paste(image.resize((cell, cell)), (column * cell, header + row * cell))
    return sheet


if __name__ == "__main__":
    common.run_script(main)
