"""Shapes that faces are drawn from: arrays (N, 2) of points, in any unit."""

from itertools import pairwise

import numpy as np


def moved(shape: np.ndarray, x, y) -> np.ndarray:
    return shape + np.stack([x, y], -1)


def ellipse(x: float, y: float, width: float, height: float) -> np.ndarray:
    """Half width, half height -> (32, 2) points."""
    angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    return np.stack([x + width * np.cos(angle), y + height * np.sin(angle)], 1)


def mirrored(right) -> np.ndarray:
    """The right half of an outline, as points from one end to the other, and its mirror image."""
    return np.concatenate([np.array(right, float), np.array(right, float)[::-1] * (-1, 1)])


def rounded(points: np.ndarray) -> np.ndarray:
    """A closed polygon with its corners cut three times (Chaikin): a smooth curve."""
    for _ in range(3):
        after = np.roll(points, -1, axis=0)
        points = np.stack([0.75 * points + 0.25 * after, 0.25 * points + 0.75 * after], 1).reshape(-1, 2)
    return points


def bezier(*control) -> np.ndarray:
    """A Bezier curve of any degree -> (16, 2) points (de Casteljau)."""
    points, t = [np.array(point, float) for point in control], np.linspace(0, 1, 16)[:, None]
    while len(points) > 1:
        points = [a + (b - a) * t for a, b in pairwise(points)]
    return points[0]


def ribbon(spine: np.ndarray, width: float) -> np.ndarray:
    """A stroke along `spine`, `width` in its middle, pointed at both ends."""
    along = np.gradient(spine, axis=0)
    normal = along[:, ::-1] * (-1, 1) / np.maximum(np.hypot(*along.T), 1e-9)[:, None]
    half = 0.5 * width * np.sin(np.linspace(0, np.pi, len(spine)))[:, None] ** 0.6
    return np.concatenate([spine + half * normal, (spine - half * normal)[::-1]])
