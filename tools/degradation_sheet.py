"""Write the sheet of samples in docs/ and print what each family of degradations costs.

    python -m tools.degradation_sheet

A row for each family, from severity 0 on the left to 1 on the right, each cell another draw; the last rows are chains
as training draws them. The photos are drawn faces (see tools/sample_faces.py), or those of PHOTOS_DIR.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import checkpoints
import common
from common import UserError
from degradations import FAMILIES, RandomDegradation
from folders import photos_below
from tools.face_drawing import draw_face
from tools.face_identity import random_identity
from transforms import load_image

PHOTOS_DIR = None  # folder of photos, at any depth; None: drawn faces
OUT = Path("docs/degradations.jpg")
SEED = 0  # 0, 1, 2, ...
SIDE = 308  # px, shorter side of the photos, >= 16; in training IMAGE_SIZE / FACE_CROP
MOST = 4  # families in a chain, 1..8
COLUMNS = 12  # >= 2
CHAINS = 2  # rows, >= 1
CELL = 88  # px
REPEATS = 300  # photos over which the time of a family is averaged, >= 1
QUALITY = 82  # of the JPEG, 1..95


def main() -> None:
    common.resolve_constants(globals())
    checkpoints.check_writable("OUT", OUT, folder=False)
    torch.set_num_threads(1)
    chain, photos = RandomDegradation(FAMILIES, 1.0, MOST, SIDE), load_photos()
    print(f"| family | ms a photo of {SIDE} px |\n|---|---|")
    for name, family in FAMILIES.items():
        cost = milliseconds(lambda place, f=family: f(photo_of(photos, place), place / REPEATS, seeded(place)))
        print(f"| {name} | {cost:.1f} |")
    torch.manual_seed(SEED)
    print(f"| a chain of 1 to {MOST} | {milliseconds(lambda place: chain(photo_of(photos, place))):.1f} |")
    sheet(photos, chain).save(OUT, quality=QUALITY, optimize=True)
    print(f"{OUT}: {len(FAMILIES)} families, severity 0 to 1 from left to right, and {CHAINS} rows of chains")


def load_photos() -> list[Image.Image]:
    """COLUMNS photos, or as many as PHOTOS_DIR has, the shorter side SIDE px. Raises UserError if it has none."""
    if PHOTOS_DIR is None:
        people = [random_identity(seeded(column)) for column in range(COLUMNS)]
        return [draw_face(person, seeded(column), SIDE) for column, person in enumerate(people)]
    paths = photos_below(PHOTOS_DIR)[:COLUMNS]
    if not paths:
        raise UserError(f"PHOTOS_DIR = {PHOTOS_DIR}: no photo found; correct it, or set it to None for drawn faces")
    photos = [load_image(path) for path in paths]
    return [photo.resize([round(length * SIDE / min(photo.size)) for length in photo.size]) for photo in photos]


def photo_of(photos: list[Image.Image], place: int) -> Image.Image:
    return photos[place % len(photos)]


def seeded(*numbers: int) -> np.random.Generator:
    return np.random.default_rng((SEED + 1, *numbers))


def milliseconds(degrade: Callable[[int], Image.Image]) -> float:
    """Time of this process that degrade(0), degrade(1), ... take on average over REPEATS calls."""
    degrade(0)  # the first call loads codecs
    start = time.process_time()
    for place in range(REPEATS):
        degrade(place)
    return 1000 * (time.process_time() - start) / REPEATS


def sheet(photos: list[Image.Image], chain: RandomDegradation) -> Image.Image:
    """Rows of CELL px with their names on the left."""
    margin, rows = 90, len(FAMILIES) + CHAINS
    image = Image.new("RGB", (margin + CELL * COLUMNS, CELL * rows), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    torch.manual_seed(SEED)
    for row in range(rows):
        name = [*FAMILIES, *["chains"] * CHAINS][row]
        draw.text((margin / 2, (row + 0.5) * CELL), name, "black", font, anchor="mm")
        for column in range(COLUMNS):
            photo, severity = photo_of(photos, column), column / (COLUMNS - 1)
            cell = FAMILIES[name](photo, severity, seeded(row, column)) if name in FAMILIES else chain(photo)
            image.paste(cell.resize((CELL, CELL), Image.Resampling.BOX), (margin + column * CELL, row * CELL))
    return image


if __name__ == "__main__":
    common.run_script(main)
