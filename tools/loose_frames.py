"""Write a loosely framed copy of a tree: how much does it matter that photos show the face in the middle?

    python -m tools.loose_frames

    IN_DIR/.../<person>/...  ->  OUT_DIR/.../<person>/...

at any depth, with the same names, so the copy is evaluated and trained on as the tree is. Of each photo the square
around a moved centre is cut, larger or smaller than the photo's shorter side: the face is moved by up to SHIFT of that
side, in each direction, and scaled by SCALE. Beyond its edges a photo is continued by its mirror image. Each distorted
copy moves with its clean photo, where that is known by name. Files become PNGs, for no compression to be added.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import checkpoints
import common
from common import UserError, derived_seed
from folders import photos_of_person, source_photos, walk
from transforms import cut_square, load_image

IN_DIR = Path("Task_B")
OUT_DIR = Path("Task_B_loose")  # must not exist yet; not inside IN_DIR
SHIFT = 0.15  # of the photo's shorter side, 0..0.5
SCALE = (0.7, 1.3)  # smallest and largest, above 0; below 1 the face becomes smaller
SEED = 0  # 0, 1, 2, ...


def main() -> None:
    common.resolve_constants(globals())
    if not IN_DIR.is_dir():
        raise UserError(f"IN_DIR = {IN_DIR}: no such folder; set it to a tree with a folder per person")
    if OUT_DIR.exists() or OUT_DIR.resolve().is_relative_to(IN_DIR.resolve()):
        raise UserError(f"OUT_DIR = {OUT_DIR}: exists already, or lies in IN_DIR; give it another name")
    photos = find_photos_with_sources(IN_DIR)
    if not photos:
        raise UserError(f"IN_DIR = {IN_DIR}: no photo there; expected a folder per person at any depth")
    if len({path.with_suffix("") for path in photos}) < len(photos):
        raise UserError(f"IN_DIR = {IN_DIR}: photos of one folder differ in their suffix only; rename one of them")
    checkpoints.check_writable("OUT_DIR", OUT_DIR, folder=False)
    for path, source in tqdm(photos.items(), desc="moving", unit="photo", leave=False):
        seed = derived_seed(SEED, *(source or path).relative_to(IN_DIR).as_posix().encode())
        target = (OUT_DIR / path.relative_to(IN_DIR)).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        move(load_image(path), np.random.default_rng(seed)).save(target)
    print(f"{OUT_DIR}: {len(photos)} photos, moved by up to {SHIFT:g} of their side and scaled by {SCALE}")


def find_photos_with_sources(root: Path) -> dict[Path, Path | None]:
    """Each photo below `root`, clean or distorted -> the clean photo that a distorted one was made from."""
    found: dict[Path, Path | None] = {}
    for folder in walk(root):
        direct, in_clean, distorted = photos_of_person(folder)
        clean = in_clean or direct
        for path, source in zip(distorted, source_photos(distorted, clean), strict=True):
            found[path] = source
        for path in clean:  # the folders clean/ and distortion/ are walked too, but their photos have been found
            found.setdefault(path, None)
    return found


def move(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """`image` cut to a square as large as its shorter side over the scale, around a moved centre, at its resolution."""
    dx, dy = generator.uniform(-SHIFT, SHIFT, 2)
    scale = generator.uniform(*SCALE)
    shorter = min(image.size)
    return cut_square(image, image.width / 2 - dx * shorter, image.height / 2 - dy * shorter, shorter / scale)


if __name__ == "__main__":
    common.run_script(main)
