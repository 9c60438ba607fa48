"""Draw a face: an identity, which stays the same in every photo of a person, and a photo, which adds all the rest.

    identity = random_identity(generator)
    image = draw_face(identity, photo_generator, 250)

Shapes are polygons in head units, see Identity; a Painter puts them on the canvas in the photo's pose.
"""

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from tools.face_identity import BLACK, COVERED_EARS, LASHES, WHITE, Colour, Identity, Photo, mix, random_photo
from tools.face_shapes import bezier, ellipse, mirrored, moved, ribbon, rounded


class Painter:
    """Soft shapes in head units, moved, rolled and turned with the photo's pose, on a square RGB canvas.

    A shape is an (N, 2) array of points. `depth=None` leaves it flat (hair, clothes). A number turns it with the
    face: the middle moves by yaw and pitch, the rim stays; above 0 it sticks out and moves more, like the nose.
    """

    def __init__(self, canvas: Image.Image, photo: Photo, head_width: float):
        self.canvas, self.photo, self.head_width = canvas, photo, head_width
        self.unit = 0.27 * canvas.width * photo.scale  # px per head unit

    def turn(self, points: np.ndarray, depth: float = 0.0) -> np.ndarray:
        weight = (1 - (points[:, :1] / self.head_width) ** 2).clip(0, 1) + depth
        return points + weight * (self.photo.yaw, self.photo.pitch)

    def to_pixels(self, shape: np.ndarray, depth: float | None) -> np.ndarray:
        cos, sin = np.cos(self.photo.roll), np.sin(self.photo.roll)
        shape = np.asarray(shape, float) if depth is None else self.turn(np.asarray(shape, float), depth)
        rolled = shape @ ((cos, sin), (-sin, cos)) + np.array((self.photo.shift_x, self.photo.shift_y))
        return rolled * self.unit + self.canvas.width / 2

    def mask(self, *shapes, blur=0.0, depth=None) -> Image.Image:
        """The union of polygons as an L image of the canvas' size."""
        mask = Image.new("L", self.canvas.size)
        for shape in shapes:
            ImageDraw.Draw(mask).polygon([tuple(xy) for xy in self.to_pixels(shape, depth).tolist()], 255)
        return mask.filter(ImageFilter.GaussianBlur(blur * self.unit)) if blur else mask

    def paint(self, shapes, colour, *, opacity=1.0, blur=0.0, line=0.0, within=None, depth=None) -> None:
        """Paint a polygon or a list of them (lines of width `line` if that is not 0), only in the mask `within`."""
        shapes = [self.to_pixels(shape, depth) for shape in (shapes if isinstance(shapes, list) else [shapes])]
        points, reach = np.concatenate(shapes), (2.5 * blur + line) * self.unit + 2
        low = np.floor(points.min(0) - reach).astype(int).clip(0, self.canvas.width)
        high = np.ceil(points.max(0) + reach).astype(int).clip(0, self.canvas.width)
        if (high <= low).any():
            return  # outside the frame
        box = (*low.tolist(), *high.tolist())  # only this box is drawn and blurred: small shapes are cheap
        mask = Image.new("L", (box[2] - box[0], box[3] - box[1]))
        draw, value = ImageDraw.Draw(mask), round(255 * opacity)
        for shape in shapes:
            corners = [tuple(xy) for xy in (shape - low).tolist()]
            if line:
                draw.line(corners, value, max(1, round(line * self.unit)), joint="curve")
            else:
                draw.polygon(corners, value)
        if blur:
            mask = mask.filter(ImageFilter.GaussianBlur(blur * self.unit))
        if within is not None:
            mask = ImageChops.multiply(mask, within.crop(box))
        self.canvas.paste(colour, box, mask)

    def round_off(self, mask: Image.Image, colour: Colour, blur: float) -> None:
        """Darken the rim of a mask from within: a flat shape looks round."""
        soft = mask.filter(ImageFilter.GaussianBlur(blur * self.unit))
        self.canvas.paste(colour, mask=ImageChops.multiply(mask, ImageChops.invert(soft)))


def draw_face(identity: Identity, photo_generator: np.random.Generator, size: int) -> Image.Image:
    """One photo of `identity`, RGB, `size` x `size` px; pose, light, clothes and background from the generator."""
    photo = random_photo(photo_generator)
    canvas = background(photo_generator, 2 * size)  # twice as large: halved at the end, edges come out smooth
    painter = Painter(canvas, photo, identity.head_width)
    strands = np.random.default_rng(identity.texture)
    draw_back_hair(painter, identity, strands)
    draw_body(painter, identity)
    face = draw_head(painter, identity)
    draw_marks(painter, identity, face, strands)
    draw_beard(painter, identity, face, strands)
    draw_nose(painter, identity, face)
    draw_mouth(painter, identity)
    for side in (-1, 1):
        draw_eye(painter, identity, side)
        draw_brow(painter, identity, side, strands)
    draw_front_hair(painter, identity, strands)
    draw_glasses(painter, identity)
    return expose(canvas.reduce(2), photo, photo_generator)


def background(generator: np.random.Generator, side: int) -> Image.Image:
    """A vertical gradient with boxes and discs out of focus."""
    top, bottom = 0.55 * generator.uniform(40, 235, (2, 1)) + 0.45 * generator.uniform(40, 235, (2, 3))
    pixels = top + (bottom - top) * np.linspace(0, 1, 64)[:, None, None]
    image = Image.fromarray(np.broadcast_to(pixels, (64, 64, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(generator.integers(1, 7)):
        (x, y), (width, height) = generator.uniform(-10, 64, 2), generator.uniform(8, 36, 2)
        shape = draw.rectangle if generator.random() < 0.5 else draw.ellipse
        shape((x, y, x + width, y + height), mix(top, generator.uniform(20, 240, 3), 0.5))
    image = image.filter(ImageFilter.GaussianBlur(generator.uniform(1.0, 4.0)))
    return image.resize((side, side), Image.Resampling.BICUBIC)


def expose(image: Image.Image, photo: Photo, generator: np.random.Generator) -> Image.Image:
    """The camera: uneven light over the frame, colour temperature, brightness, noise."""
    y, x = np.mgrid[-1 : 1 : image.height * 1j, -1 : 1 : image.width * 1j]
    gradient = 1 + 0.14 * photo.light_strength * (x * np.cos(photo.light) + y * np.sin(photo.light))
    tint = np.array((1 + 0.05 * photo.warmth, 1.0, 1 - 0.07 * photo.warmth))
    pixels = np.asarray(image) / 255 * gradient[..., None] * tint * photo.brightness
    pixels += photo.noise * generator.standard_normal(pixels.shape)
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def draw_body(painter: Painter, identity: Identity) -> None:
    """Neck, shoulders and clothes."""
    photo, skin, cloth = painter.photo, identity.skin, painter.photo.clothes
    width = 0.44 + 0.4 * (identity.head_width - 0.74)  # of the neck, half
    neck = rounded(mirrored([(0, 0.4), (width, 0.4), (width, 1.0), (width * 1.1, 1.35), (1.1, 1.75), (0, 2.4)]))
    painter.paint(neck, skin)
    under_chin = moved(head_outline(identity, photo), 0, 0.16)
    painter.paint(under_chin, shadow(skin, 0.5), opacity=0.9, blur=0.07, within=painter.mask(neck))
    for side in (-1, 1):
        tendon = bezier((side * width, 1.0), (side * 0.2, 1.3), (side * 0.08, 1.5))
        painter.paint(ribbon(tendon, 0.05), shadow(skin, 0.35), opacity=0.6, blur=0.03)
    neckline = {  # from the middle to the side of the neck
        "crew": [(0, 1.50), (0.3, 1.50), (width * 1.15, 1.22)],
        "v-neck": [(0, 1.85), (0.02, 1.85), (width * 1.15, 1.20)],
        "shirt": [(0, 1.66), (0.02, 1.66), (width * 1.10, 1.18)],
        "high": [(0, 1.24), (width * 0.8, 1.22), (width * 1.06, 1.12)],
    }[photo.collar]
    shoulder = [(width * 1.2, 1.25), (1.0, 1.48), (1.75, 1.68), (2.0, 2.2), (2.2, 3.4), (0, 3.4)]
    shirt = rounded(mirrored(neckline + shoulder))
    inside = painter.mask(shirt)
    painter.paint(shirt, cloth)
    for side in (-1, 1):
        fold = bezier((side * 0.5, 1.4), (side * 1.0, 1.7), (side * 1.05, 2.4))
        painter.paint(ribbon(fold, 0.3), mix(cloth, BLACK, 0.45), opacity=0.5, blur=0.12, within=inside)
        if photo.collar == "shirt":
            collar = np.array([(0.98 * width, 1.18), (1.3 * width, 1.3), (0.36, 1.72), (0, 1.62)]) * (side, 1)
            painter.paint(collar, mix(cloth, WHITE, 0.25))
            painter.paint(collar, mix(cloth, BLACK, 0.4), opacity=0.8, line=0.015)
    if photo.collar in ("crew", "high"):
        low = 1.58 if photo.collar == "crew" else 1.42
        edge = bezier((-1.05 * width, 1.24), (-0.5, low), (0.5, low), (1.05 * width, 1.24))
        painter.paint(edge, mix(cloth, BLACK, 0.3), opacity=0.8, blur=0.01, line=0.06, within=inside)


def head_outline(identity: Identity, photo: Photo) -> np.ndarray:
    w, chin, chin_y = identity.head_width, identity.chin, identity.chin_y
    right = [
        (0, -1.36),
        (0.5 * w, -1.32),
        (0.94 * w, -1.0),
        (1.04 * w, -0.4),
        (1.02 * w, 0.15),
        (w * identity.jaw, 0.66),
    ]
    outline = rounded(mirrored([*right, (chin + 0.12, 0.98 * chin_y), (0.6 * chin, chin_y + 0.05), (0, chin_y + 0.05)]))
    lean = ((outline[:, 1] + 0.2) / 1.2).clip(0, 1)  # the chin turns with the face, the skull does not
    return moved(outline, 0.35 * photo.yaw * lean, 0 * lean)


def draw_head(painter: Painter, identity: Identity) -> Image.Image:
    """Ears and shaded skin; returns the mask of the face."""
    photo, skin, eye_y = painter.photo, identity.skin, identity.eye_y
    light_x, light_y, strength = np.cos(photo.light), np.sin(photo.light), photo.light_strength
    for side in (-1, 1) if identity.hair_style not in COVERED_EARS else ():
        x = side * (identity.head_width + 0.03) - 0.3 * photo.yaw
        painter.paint(ellipse(x, eye_y + 0.15, 0.11, identity.ear), shadow(skin, 0.16))
        fold = bezier((x - side * 0.02, eye_y), (x + side * 0.1, eye_y + 0.05), (x - side * 0.02, eye_y + 0.26))
        painter.paint(ribbon(fold, 0.05), shadow(skin, 0.5), opacity=0.8, blur=0.012)
    outline = head_outline(identity, photo)
    face = painter.mask(outline)
    painter.paint(outline, skin)
    painter.round_off(face, shadow(skin, 0.5), 0.15)
    away = ellipse(-0.8 * light_x, 0.1 - 0.4 * light_y, 0.42, 1.1)
    painter.paint(away, shadow(skin, 0.5), opacity=0.55 * strength, blur=0.25, within=face)
    forehead = ellipse(0.3 * light_x, -0.62 + 0.1 * light_y, 0.38, 0.24)
    painter.paint(forehead, glow(skin, 0.45), opacity=0.55, blur=0.16, within=face)
    for side in (-1, 1):
        lit = max(0.0, 0.35 + 0.35 * side * light_x * strength)
        cheek, bone = (
            ellipse(side * 0.44, 0.25 - 0.04 * photo.smile, 0.20, 0.15),
            ellipse(side * 0.43, 0.12, 0.12, 0.07),
        )
        socket = ellipse(side * identity.eye_x, eye_y - 0.02, 1.25 * identity.eye_width, 0.15)
        painter.paint(
            cheek, mix(skin, (214, 70, 70), 0.42), opacity=0.55 * identity.blush, blur=0.10, within=face, depth=0
        )
        painter.paint(bone, glow(skin, 0.4), opacity=lit, blur=0.07, within=face, depth=0)
        painter.paint(socket, shadow(skin, 0.36), opacity=0.55, blur=0.06, within=face, depth=0)
    painter.paint(
        ellipse(0, identity.chin_y - 0.12, 0.13, 0.07), glow(skin, 0.35), opacity=0.5, blur=0.06, within=face, depth=0.1
    )
    return face


def draw_marks(painter: Painter, identity: Identity, face: Image.Image, strands: np.random.Generator) -> None:
    """Freckles, moles and the lines of age."""
    skin, places = identity.skin, strands.normal((0, 0.16), (0.32, 0.11), (identity.freckles, 2))
    if identity.freckles:
        spots = [ellipse(x, y, *strands.uniform(0.010, 0.020, 2)) for x, y in places]
        painter.paint(spots, mix(skin, (140, 70, 30), 0.55), opacity=0.75, blur=0.004, within=face, depth=0)
    for x, y in identity.moles:
        painter.paint(
            ellipse(x, y, 0.026, 0.026), mix(skin, (50, 26, 18), 0.75), opacity=0.9, blur=0.006, within=face, depth=0
        )
    lines = [bezier((-0.4, y), (0, y - 0.05), (0.4, y)) for y in (-0.72, -0.60)]
    outer, y, nose, mouth = (
        identity.eye_x + identity.eye_width,
        identity.eye_y,
        identity.nose_width,
        identity.mouth_width,
    )
    for side in (-1, 1):
        right = [bezier((outer + 0.03, y + d), (outer + 0.12, y + 2 * d)) for d in (-0.04, 0.0, 0.04)]
        right.append(bezier((nose + 0.04, 0.30), (0.34, 0.42), (mouth + 0.1, 0.66)))
        right.append(bezier((0.2, y + 0.17), (0.34, y + 0.24), (0.48, y + 0.17)))
        lines += [line * (side, 1) for line in right]
    lines = [ribbon(line, 0.03) for line in lines]
    painter.paint(lines, shadow(skin, 0.55), opacity=0.6 * identity.age, blur=0.010, within=face, depth=0)


def draw_beard(painter: Painter, identity: Identity, face: Image.Image, strands: np.random.Generator) -> None:
    if identity.beard == "none":
        return
    w, mouth, y = identity.head_width, identity.mouth_width, identity.mouth_y
    lip = [(0, y - 0.14), (0.7 * mouth, y - 0.13)]
    right = {
        "moustache": [*lip, (mouth + 0.05, y + 0.03), (0.6 * mouth, y - 0.02), (0, y - 0.04)],
        "goatee": [*lip, (mouth + 0.1, y + 0.05), (0.8 * mouth, 1.2), (0, 1.2)],
    }.get(
        identity.beard,
        [*lip, (0.45, y - 0.16), (0.85 * w, 0.1), (0.96 * w, -0.1), (1.2 * w, 0.1), (1.2 * w, 1.3), (0, 1.4)],
    )
    shape = rounded(mirrored(right))
    if identity.beard == "full":  # longer than the chin
        face = ImageChops.lighter(face, painter.mask(moved(head_outline(identity, painter.photo) * (0.96, 1), 0, 0.09)))
    mask = ImageChops.multiply(face, painter.mask(shape, depth=0.05))
    colour, stubble = mix(identity.hair, (20, 12, 10), 0.15), identity.beard == "stubble"
    painter.paint(
        shape, colour, opacity=0.32 if stubble else 0.92, blur=0.06 if stubble else 0.02, within=face, depth=0.05
    )
    roots = strands.uniform((-w, y - 0.15), (w, 1.15), (160, 2))
    hairs = [np.array([(x, y), (1.12 * x, y + strands.uniform(0.03, 0.09))]) for x, y in roots]
    for half, tone in ((hairs[::2], glow(colour, 0.25)), (hairs[1::2], mix(colour, BLACK, 0.5))):
        painter.paint(half, tone, opacity=0.35 if stubble else 0.5, line=0.012, within=mask, depth=0.05)


def draw_nose(painter: Painter, identity: Identity, face: Image.Image) -> None:
    skin, w = identity.skin, identity.nose_width
    top, tip = identity.eye_y - 0.08, identity.eye_y + identity.nose_length
    lit = 1 if np.cos(painter.photo.light) > 0 else -1  # the side toward the light
    flank = np.array([(0.10, top), (0.07, top + 0.2), (0.05, tip - 0.1), (w, tip), (0.95 * w, tip - 0.14)])
    for side in (-1, 1):
        opacity = 0.15 if side == lit else 0.5
        painter.paint(flank * (side, 1), shadow(skin, 0.42), opacity=opacity, blur=0.055, within=face, depth=0.15)
    painter.paint(
        ellipse(0, tip + 0.05, 0.9 * w, 0.05), shadow(skin, 0.5), opacity=0.5, blur=0.035, within=face, depth=0.05
    )
    painter.paint(ellipse(0, tip - 0.04, 0.62 * w, 0.09), skin, opacity=0.9, blur=0.03, depth=0.15)
    ridge = bezier((0.01 * lit, top), (0.03 * lit, (top + tip) / 2), (0.015 * lit, tip - 0.03))
    painter.paint(ribbon(ridge, 0.07), glow(skin, 0.5), opacity=0.6, blur=0.02, depth=0.15)
    painter.paint(ellipse(0.03 * lit, tip - 0.05, 0.045, 0.035), glow(skin, 0.75), opacity=0.7, blur=0.016, depth=0.18)
    wing = bezier((0.85 * w, tip - 0.12), (1.25 * w, tip - 0.02), (w, tip + 0.06), (0.6 * w, tip + 0.02))
    for side in (-1, 1):
        painter.paint(ribbon(wing, 0.035) * (side, 1), shadow(skin, 0.62), opacity=0.8, blur=0.007, depth=0.15)
        nostril = ellipse(0.45 * w * side, tip + 0.025, 0.24 * w, 0.022)
        painter.paint(nostril, shadow(skin, 0.85), opacity=0.9, blur=0.007, depth=0.15)


def draw_mouth(painter: Painter, identity: Identity) -> None:
    photo, lip, skin = painter.photo, identity.lip, identity.skin
    t = np.linspace(-1, 1, 41)  # from corner to corner
    x = t * identity.mouth_width * (1 + 0.18 * max(0.0, photo.smile))
    middle = identity.mouth_y + 0.03 * photo.smile - 0.12 * photo.smile * t**2
    cupid = 1 - 0.28 * np.exp(-((t / 0.16) ** 2))  # the notch of the upper lip
    upper = middle - identity.lip_upper * (1 - t**2) ** 0.7 * cupid
    inner = middle + photo.mouth_open * (1 - t**2)
    lower = inner + identity.lip_lower * (1 - t**2) ** 0.7

    def band(above, below, *, colour, opacity, blur, part=slice(None)):
        shape = np.concatenate([np.stack([x, above], 1)[part], np.stack([x, below], 1)[part][::-1]])
        painter.paint(shape, colour, opacity=opacity, blur=blur, depth=0.05)

    band(lower, lower + 0.05 * (1 - t**2), colour=shadow(skin, 0.5), opacity=0.6, blur=0.025)
    band(upper, middle, colour=mix(lip, (60, 10, 20), 0.18), opacity=1.0, blur=0.006)
    band(inner, lower, colour=lip, opacity=1.0, blur=0.006)
    band(
        0.7 * inner + 0.3 * lower,
        0.4 * inner + 0.6 * lower,
        colour=glow(lip, 0.5),
        opacity=0.5,
        blur=0.012,
        part=slice(12, -12),
    )
    if photo.mouth_open:
        band(middle, inner, colour=(70, 22, 26), opacity=1.0, blur=0.0)
        band(middle, 0.45 * middle + 0.55 * inner, colour=(240, 234, 224), opacity=0.95, blur=0.004)  # teeth
    line = ribbon(np.stack([1.04 * x, middle], 1), 0.024)
    painter.paint(line, mix(lip, (40, 8, 12), 0.75), opacity=0.85, blur=0.004, depth=0.05)
    corners = [ellipse(1.05 * x[end], middle[end], 0.03, 0.03) for end in (0, -1)]
    painter.paint(corners, shadow(skin, 0.5), opacity=0.6, blur=0.015, depth=0.05)


def draw_eye(painter: Painter, identity: Identity, side: int) -> None:
    photo, skin, lashes = painter.photo, identity.skin, identity.lashes
    t = np.linspace(-1, 1, 31)  # -1: inner corner, 1: outer corner
    x = side * (identity.eye_x + t * identity.eye_width)
    level = identity.eye_y - identity.eye_tilt * identity.eye_width * t
    height = identity.eye_height * photo.eye_open
    upper = np.stack([x, level - height * (1 - np.abs(t) ** 2.2)], 1)
    lower = np.stack([x, level + height * (0.75 - 0.3 * max(0.0, photo.smile)) * (1 - t**2)], 1)
    upper, lower = painter.turn(upper), painter.turn(lower)  # here, since the iris stays round
    eyeball = np.concatenate([upper, lower[::-1]])
    inside = painter.mask(eyeball)
    painter.paint(eyeball, (240, 236, 230), opacity=1.0, blur=0.004)
    middle = np.array([(side * identity.eye_x + 0.04 * photo.gaze, identity.eye_y - 0.1 * identity.eye_height)])
    (x, y), r = painter.turn(middle)[0], 0.062 + 0.25 * identity.eye_height  # of the iris
    painter.paint(ellipse(x, y, r, r), mix(identity.iris, BLACK, 0.55), opacity=1.0, blur=0.004, within=inside)
    painter.paint(ellipse(x, y, 0.84 * r, 0.84 * r), identity.iris, opacity=1.0, blur=0.008, within=inside)
    painter.paint(
        ellipse(x, y + 0.4 * r, 0.5 * r, 0.32 * r), glow(identity.iris, 0.45), opacity=0.7, blur=0.012, within=inside
    )
    painter.paint(ellipse(x, y, 0.42 * r, 0.42 * r), (12, 9, 9), opacity=1.0, blur=0.004, within=inside)
    painter.paint(ribbon(upper, 0.07), (60, 36, 34), opacity=0.55, blur=0.015, within=inside)  # shadow of the lid
    painter.paint(ellipse(x - 0.3 * r, y - 0.32 * r, 0.2 * r, 0.2 * r), WHITE, opacity=0.95, blur=0.003, within=inside)
    painter.paint(ribbon(moved(upper, 0, -0.008), 0.024 + 0.034 * lashes), LASHES, opacity=0.95, blur=0.003)
    tip = moved(upper[-1:], 0.05 * side * lashes, -0.05 * lashes)
    painter.paint(np.concatenate([upper[-1:], tip, upper[-5:-4]]), LASHES, opacity=0.9, blur=0.003)
    painter.paint(ribbon(lower, 0.018), shadow(skin, 0.7), opacity=0.7, blur=0.004)
    painter.paint(ribbon(moved(upper[2:-1], 0, -0.05), 0.022), shadow(skin, 0.62), opacity=0.75, blur=0.006)  # crease
    painter.paint(
        ribbon(moved(lower, 0, 0.05), 0.03), shadow(skin, 0.4), opacity=0.2 + 0.4 * identity.age, blur=0.012
    )  # bag


def draw_brow(painter: Painter, identity: Identity, side: int, strands: np.random.Generator) -> None:
    t = np.linspace(-1.15, 1.25, 24)  # inner to outer end
    x = side * (identity.eye_x + 1.05 * identity.eye_width * t)
    y = identity.eye_y - identity.brow_y - painter.photo.brow_raise
    y = y - 0.12 * identity.brow_tilt * t - identity.brow_arch * (1 - (t - 0.35) ** 2)
    half = 0.5 * identity.brow_thickness * np.interp(t, (-1.15, -0.9, 0.2, 1.25), (0.55, 1.0, 0.85, 0.1))
    brow = np.concatenate([np.stack([x, y - half], 1), np.stack([x, y + half], 1)[::-1]])
    colour = mix(identity.hair, (40, 24, 18), 0.45)
    painter.paint(brow, colour, opacity=0.85, blur=0.012, depth=0)
    hairs = []
    for at in strands.integers(20, size=26):
        low = y[at] + strands.uniform(-0.4, 0.5) * identity.brow_thickness
        hairs.append([(x[at], low), (x[at] + side * strands.uniform(0.03, 0.06), low - strands.uniform(0.0, 0.04))])
    painter.paint(hairs, mix(colour, BLACK, 0.35), opacity=0.6, line=0.010, depth=0)


def draw_glasses(painter: Painter, identity: Identity) -> None:
    if identity.glasses == "none":
        return
    x, y, style = identity.eye_x + 0.01, identity.eye_y + 0.03, identity.glasses
    for side in (-1, 1):
        square = np.array([(-0.30, -0.22), (0.30, -0.22), (0.28, 0.20), (-0.28, 0.20)]).repeat(2, 0)
        rim = moved(ellipse(0, 0, 0.265, 0.24) if style == "round" else rounded(square), side * x, y)
        rim = np.concatenate([rim, rim[:2]])  # closed
        painter.paint(rim, (225, 236, 245), opacity=0.12, depth=0.06)
        glare = moved(np.array([(-0.22, -0.3), (-0.10, -0.3), (-0.2, 0.3), (-0.32, 0.3)]), side * x, y)
        painter.paint(glare, WHITE, opacity=0.22, blur=0.02, within=painter.mask(rim, depth=0.06), depth=0.06)
        painter.paint(moved(rim, 0, 0.03), shadow(identity.skin, 0.6), opacity=0.35, blur=0.02, line=0.03, depth=0.06)
        painter.paint(rim, identity.frame, line=0.022 if style == "round" else 0.036, depth=0.06)
        if style == "browline":
            bar = np.array([(x - 0.29, y - 0.20), (x + 0.30, y - 0.20)]) * (side, 1)
            painter.paint(bar, mix(identity.frame, BLACK, 0.3), line=0.075, depth=0.06)
        temple = np.array([(x + 0.27, y - 0.08), (1.02 * identity.head_width, y - 0.06)]) * (side, 1)
        painter.paint(temple, identity.frame, line=0.035, depth=0.03)
    bridge = bezier((0.27 - x, y - 0.04), (0, y - 0.12), (x - 0.27, y - 0.04))
    painter.paint(bridge, identity.frame, line=0.03, depth=0.08)


def draw_back_hair(painter: Painter, identity: Identity, strands: np.random.Generator) -> None:
    """The hair behind head and neck."""
    style, half, v = identity.hair_style, identity.head_width + 0.10 + identity.hair_volume, identity.hair_volume
    if style == "bun":
        paint_hair(
            painter, identity, shapes=[ellipse(0, -1.46 - v, 0.36, 0.30)], crown=(0, -1.2), strands=strands, count=20
        )
    elif style == "afro":
        paint_hair(
            painter,
            identity,
            shapes=curls(ellipse(0, -0.55, half + 0.15, 0.95 + v), 0.17, strands),
            crown=(0, -0.5),
            strands=strands,
            count=0,
        )
    elif style in COVERED_EARS:
        low = 0.95 if style in ("fringe", "bob") else 1.75
        right = [(0, -1.45 - v), (0.2, -1.45 - v), (0.75 * half, -1.2 - v), (half, -0.7), (half + 0.05, 0)]
        shape = rounded(mirrored([*right, (half + 0.08, low), (0.4, low), (0, low)]))
        paint_hair(painter, identity, shapes=[shape], crown=(0, -1.6), strands=strands, count=50, shade=0.28)


def draw_front_hair(painter: Painter, identity: Identity, strands: np.random.Generator) -> None:
    """The hair over the forehead and beside the face, from the skull down to the style's hairline."""
    style, w = identity.hair_style, identity.head_width
    if style == "bald":
        return
    parting = [(0.9 * w, -0.45), (0.7 * w, -0.84), (0.34, -1.04), (0.05, -0.88), (-0.35, -0.72), (-0.8 * w, -0.5)]
    line = {  # from the right side of the face to the middle, or all across
        "receding": [(0.98 * w, -0.1), (0.96 * w, -0.55), (0.84 * w, -1.02), (0.36, -1.12), (0.2, -0.95), (0, -0.9)],
        "swept": [(0.97 * w, -0.05), *parting, (-0.95 * w, -0.3), (-0.97 * w, -0.05)],
        "fringe": [(0.95 * w, 0.75), (0.92 * w, -0.1), (0.9 * w, -0.42), (0.4, -0.47), (0, -0.5)],
        "bob": [(0.95 * w, 0.72), (0.92 * w, 0.0), *parting, (-0.92 * w, 0.0), (-0.95 * w, 0.72)],
        "parted": [(0.97 * w, 1.1), (0.93 * w, 0.0), (0.84 * w, -0.5), (0.34, -0.98), (0.02, -1.14), (0, -1.14)],
        "long": [(0.97 * w, 1.1), (0.92 * w, 0.0), *parting, (-0.92 * w, 0.0), (-0.97 * w, 1.1)],
        "bun": [(0.98 * w, -0.2), (0.93 * w, -0.6), (0.5, -0.92), (0, -0.97)],
    }.get(style, [(0.97 * w, -0.05), (0.93 * w, -0.35), (0.84 * w, -0.74), (0.35, -0.88), (0, -0.9)])
    line, crown = np.array(line), 0.0
    if line[-1, 0] == 0:
        line = mirrored(line)
    elif identity.texture % 2:
        crown = 0.34
    else:
        line, crown = (line * (-1, 1))[::-1], -0.34  # parted on the other side
    v = {"buzz": 0.02, "receding": 0.04, "bun": 0.05}.get(style, identity.hair_volume)
    outer = [
        (w + 0.5 * v, line[0, 1]),
        (w + 0.06 + 0.5 * v, -0.3),
        (0.98 * w + v, -0.8),
        (0.62 * w + 0.5 * v, -1.26 - v),
    ]
    outer = mirrored([*outer, (0.2, -1.46 - v), (0, -1.46 - v)])
    cap = rounded(np.concatenate([outer[::-1], painter.turn(line)]))
    head = painter.mask(head_outline(identity, painter.photo), blur=0.015)
    if style == "buzz":
        painter.paint(
            moved(cap, 0, 0.02), mix(identity.hair, identity.skin, 0.15), opacity=0.85, blur=0.05, within=head
        )
        return
    painter.paint(moved(cap, 0, 0.05), shadow(identity.skin, 0.6), opacity=0.45, blur=0.05, within=head)
    if style in ("curly", "afro"):
        paint_hair(painter, identity, shapes=curls(cap, 0.13, strands), crown=(crown, -1.2), strands=strands, count=0)
    else:
        paint_hair(painter, identity, shapes=[cap], crown=(crown, -1.44 - v), strands=strands, count=70)


def curls(outline: np.ndarray, radius: float, strands: np.random.Generator) -> list[np.ndarray]:
    """The outline and, along it, discs of about `radius`."""
    length = np.cumsum(np.hypot(*np.diff(outline, axis=0, prepend=outline[:1]).T))
    spots = outline[np.searchsorted(length, np.arange(0, length[-1], 0.8 * radius))]
    radii = radius * strands.uniform(0.75, 1.15, len(spots))
    return [outline] + [ellipse(x, y, r, r) for (x, y), r in zip(spots, radii, strict=True)]


def paint_hair(painter, identity, *, shapes, crown, strands, count, shade=0.0) -> None:
    """Fill `shapes` with hair: `count` strands from the crown outwards (0: curls), a dark rim, shine by the light."""
    colour, light, mask = mix(identity.hair, BLACK, shade), painter.photo.light, painter.mask(*shapes)
    painter.paint(shapes, colour)
    painter.round_off(mask, mix(colour, BLACK, 0.5), 0.10)
    lines = []
    for _ in range(count):
        start, x = np.array(crown) + strands.normal(0, 0.05, 2), strands.uniform(-1.15, 1.15)
        end = (1.2 * x, strands.uniform(-0.6, 1.8))
        lines.append(ribbon(bezier(start, (0.8 * x, crown[1]), (1.15 * x, -0.9), end), 0.035))
    low, high = np.concatenate(shapes).min(0), np.concatenate(shapes).max(0)
    for x, y in strands.uniform(low, high, (0 if count else 130, 2)):
        lines.append(ribbon(ellipse(x, y, 0.07, 0.07)[strands.integers(16) :][:14], 0.03))
    painter.paint(lines[::2], mix(colour, BLACK, 0.4), opacity=0.55, blur=0.004, within=mask)
    painter.paint(lines[1::2], glow(colour, 0.28), opacity=0.5, blur=0.004, within=mask)
    shine = ellipse(0.42 * np.cos(light), -1.12 + 0.1 * np.sin(light), 0.36, 0.10)
    painter.paint(shine, glow(colour, 0.5), opacity=0.55, blur=0.07, within=mask)


def shadow(skin: Colour, share: float) -> Colour:
    """Skin in shadow: darker and redder."""
    return mix(skin, (72, 22, 18) if sum(skin) > 330 else (18, 6, 6), share)


def glow(colour: Colour, share: float) -> Colour:
    """Skin or hair in the light."""
    return mix(colour, (255, 246, 232), share)
