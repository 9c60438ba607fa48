"""What is drawn, at random: an identity, kept in every photo of a person, and the pose, light and mood of a photo."""

from dataclasses import dataclass

import numpy as np

Colour = tuple[int, int, int]  # RGB, 0..255
BLACK, WHITE, LASHES = (0, 0, 0), (255, 255, 255), (34, 22, 20)
SKINS = ((250, 221, 200), (238, 196, 164), (226, 178, 140), (205, 150, 110), (160, 108, 74), (104, 68, 48))
HAIRS = {
    "black": (30, 26, 28), "dark brown": (62, 42, 32), "brown": (104, 70, 46), "auburn": (124, 58, 36),
    "ginger": (190, 98, 44), "dark blond": (164, 124, 76), "blond": (222, 188, 128), "grey": (158, 156, 156),
    "white": (226, 224, 220),
}  # fmt: skip
IRISES = ((58, 36, 24), (92, 58, 32), (122, 96, 48), (78, 112, 68), (72, 122, 160), (118, 134, 142))
HAIR_STYLES = ("bald", "buzz", "short", "swept", "receding", "curly", "afro", "fringe", "bob", "parted", "long", "bun")
COVERED_EARS = ("fringe", "bob", "parted", "long")  # hair styles
BEARDS = ("none", "none", "stubble", "full", "goatee", "moustache")
FRAMES = ((24, 24, 28), (96, 58, 34), (150, 40, 44), (44, 66, 110), (168, 140, 84))  # colours of glasses
GLASSES = ("none", "none", "none", "round", "square", "browline")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What stays the same in every photo of a person.

    Lengths in head units: the middle of the face is (0, 0), the chin near y = 1, the hairline near y = -0.9, and one
    unit is 27 % of the frame, so that the face fills its central half. Slopes: > 0 is outer end up.
    """

    skin: Colour
    head_width: float  # half width at the ears
    jaw: float  # width at the mouth relative to head_width
    chin: float  # half width
    chin_y: float
    ear: float  # half height
    eye_x: float  # half the distance of the eyes
    eye_y: float
    eye_width: float  # half width
    eye_height: float  # half height, wide open
    eye_tilt: float  # slope
    iris: Colour
    lashes: float  # 0..1
    brow_y: float  # above the eye
    brow_thickness: float
    brow_tilt: float  # slope
    brow_arch: float
    nose_length: float
    nose_width: float  # half width
    mouth_y: float
    mouth_width: float  # half width
    lip_upper: float
    lip_lower: float
    lip: Colour
    hair: Colour
    hair_style: str  # of HAIR_STYLES
    hair_volume: float
    beard: str  # of BEARDS
    glasses: str  # of GLASSES
    frame: Colour  # of the glasses
    blush: float  # 0..1
    freckles: int  # count
    moles: tuple[tuple[float, float], ...]  # places
    age: float  # 0..1: lines in the face
    texture: int  # seed of strands and freckles


@dataclass(frozen=True, kw_only=True)
class Photo:
    """What differs between two photos of a person; lengths in head units, angles in radians."""

    shift_x: float
    shift_y: float
    scale: float
    roll: float
    yaw: float  # length by which the middle of the face moves sideways
    pitch: float  # the same, down
    smile: float  # < 0: corners of the mouth down
    mouth_open: float
    eye_open: float  # 1: wide open
    gaze: float  # -1 left .. 1 right
    brow_raise: float
    light: float  # angle, 0: from the right, -pi / 2: from above
    light_strength: float  # 0: even
    warmth: float  # -1 blue .. 1 yellow
    brightness: float  # factor
    collar: str
    clothes: Colour
    noise: float  # standard deviation, share of white


def random_identity(generator: np.random.Generator) -> Identity:
    """Draw a person. Beards and long hair exclude each other, grey hair comes with age; the rest is independent."""
    uniform = generator.uniform
    tone = uniform(0, len(SKINS) - 1.001)
    skin = mix(SKINS[int(tone)], SKINS[int(tone) + 1], tone % 1)
    age = max(0.0, uniform(-0.6, 1.0))
    colours = list(HAIRS)[: 4 if tone > 3.2 else 7]  # dark skin: dark hair
    hair = HAIRS[generator.choice(colours) if age < 0.6 else generator.choice(["grey", "white", colours[1]])]
    style = str(generator.choice(HAIR_STYLES))
    feminine = style in (*COVERED_EARS, "bun") or (style in ("curly", "afro", "swept") and uniform() < 0.4)
    lip = mix(skin, (176, 70, 74), uniform(0.3, 0.55))
    moles = generator.choice(4, p=(0.5, 0.25, 0.15, 0.1))
    return Identity(
        skin=skin,
        iris=IRISES[generator.integers(2 if tone > 3.5 else len(IRISES))],
        lashes=uniform(0.5, 1.0) if feminine else uniform(0.0, 0.4),
        brow_thickness=uniform(0.035, 0.075) if feminine else uniform(0.05, 0.12),
        lip=mix(lip, (170, 30, 60), uniform(0.0, 0.6)) if feminine else lip,  # lipstick
        hair=mix(hair, (120, 90, 70), uniform(0.0, 0.2)),
        hair_style=style,
        beard="none" if feminine else str(generator.choice(BEARDS)),
        glasses=str(generator.choice(GLASSES)),
        frame=FRAMES[generator.integers(len(FRAMES))],
        freckles=int(generator.integers(30, 70)) if uniform() < 0.2 else 0,
        moles=tuple((generator.choice((-1, 1)) * uniform(0.2, 0.52), uniform(0.05, 0.5)) for _ in range(moles)),
        age=age,
        texture=int(generator.integers(2**31)),
        head_width=uniform(0.74, 0.90),
        jaw=uniform(0.74, 0.97),
        chin=uniform(0.16, 0.42),
        chin_y=uniform(0.95, 1.08),
        ear=uniform(0.17, 0.26),
        eye_x=uniform(0.33, 0.43),
        eye_y=uniform(-0.16, -0.06),
        eye_width=uniform(0.16, 0.215),
        eye_height=uniform(0.075, 0.13),
        eye_tilt=uniform(-0.14, 0.22),
        brow_y=uniform(0.21, 0.31),
        brow_tilt=uniform(-0.45, 0.15),
        brow_arch=uniform(0.0, 0.10),
        nose_length=uniform(0.36, 0.54),
        nose_width=uniform(0.12, 0.22),
        mouth_y=uniform(0.56, 0.66),
        mouth_width=uniform(0.23, 0.36),
        lip_upper=uniform(0.025, 0.075),
        lip_lower=uniform(0.045, 0.105),
        hair_volume=uniform(0.06, 0.20),
        blush=uniform(0.1, 0.8),
    )


def random_photo(generator: np.random.Generator) -> Photo:
    """Draw pose, expression, light and clothes of one photo."""
    uniform = generator.uniform
    return Photo(
        mouth_open=uniform(0.03, 0.14) if uniform() < 0.4 else 0.0,
        collar=str(generator.choice(["crew", "v-neck", "shirt", "high"])),
        clothes=mix(uniform(20, 225, 3), [uniform(20, 225)] * 3, 0.4),  # mixed with grey: not too gaudy
        shift_x=uniform(-0.09, 0.09),
        shift_y=uniform(-0.07, 0.07),
        scale=uniform(0.95, 1.06),
        roll=uniform(-0.14, 0.14),
        yaw=uniform(-0.22, 0.22),
        pitch=uniform(-0.05, 0.06),
        smile=uniform(-0.15, 1.0),
        eye_open=uniform(0.65, 1.0),
        gaze=uniform(-0.7, 0.7),
        brow_raise=uniform(-0.02, 0.05),
        light=uniform(-np.pi, 0.3),
        light_strength=uniform(0.3, 1.0),
        warmth=uniform(-1.0, 1.0),
        brightness=uniform(0.82, 1.10),
        noise=uniform(0.0, 0.012),
    )


def mix(first, second, share: float) -> Colour:
    """(1 - share) first + share second."""
    return tuple(round(float(a + (b - a) * share)) for a, b in zip(first, second, strict=True))
