"""From which cosine on is a face known? Thresholds by the scores of strangers, for a gallery or a checkpoint."""

import copy
import math
from pathlib import Path

import torch
from torch import nn

import metrics
from checkpoints import atomic_file, read_checkpoint, restore
from common import UserError, is_main
from gallery import Gallery, Queries, score
from scores import TIE
from validation import ValidationSet

LEAST_RATED = 100  # clean photos from which on their worst say what is usable; of 20, the worst is any photo
# False accept rates of pairs that a checkpoint's calibration states, as far as its pairs can measure them.
RATES = (1e-1, 5e-2, 2e-2, 1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5, 2e-5, 1e-5, 5e-6, 2e-6, 1e-6)
REFUSE = 0.01  # share of the clean photos, the worst, that a checkpoint's calibration calls not usable


# --- of a gallery -----------------------------------------------------------------------------------------------------


def check_false_accept(far: object) -> None:
    """Raise UserError unless `far` is a share above 0 and below 1."""
    if not isinstance(far, float) or not 0 < far < 1:
        raise UserError(f"FALSE_ACCEPT = {far!r}: expected a share of strangers, above 0 and below 1, such as 0.01")


def check_calibration(persons: int, queries: int, *, far: float, source: str) -> None:
    """Raise, before anything is embedded too, what `calibrate` raises for so many persons with clean photos and usable
    queries."""
    check_false_accept(far)
    if persons < 2:
        raise UserError(f"{source}: a threshold needs two persons with clean photos or more, found {persons}")
    if queries * far < metrics.MIN_ERRORS:
        raise UserError(
            f"FALSE_ACCEPT = {far:g}: {source} has {queries} usable queries, but measuring so low a rate takes "
            f"{math.ceil(metrics.MIN_ERRORS / far)}; add distorted photos, or set {least_rate(queries)}"
        )


def least_rate(queries: int) -> str:
    """The lowest FALSE_ACCEPT that so many queries can measure, with two digits, as a hint."""
    if queries <= metrics.MIN_ERRORS:
        return "it to a rate below 1 then"
    least = metrics.MIN_ERRORS / queries
    digit = 10.0 ** (math.floor(math.log10(least)) - 1)
    return f"at least {math.ceil(least / digit - 1e-9) * digit:.2g}"


def calibrate(gallery: Gallery, queries: Queries, far: float, source: str, refuse: float | None = None) -> dict:
    """The threshold for Gallery.threshold: the lowest cosine at which at most a share `far` of strangers gets a name.

    Every query counts as a stranger: it is matched against the gallery without its own person. The rate holds for a
    gallery of this size; with twice as many persons, a stranger resembles one of them about twice as often.
    refuse: share of the gallery's photos, those of lowest quality, that may count as not usable. The lowest quality of
    the others becomes the bound, and queries below it are left out. With None, a model that does not rate photos, or
    fewer than LEAST_RATED photos in the gallery, there is no bound. source: where the queries come from, for messages.
    Returns plain types: cosine, far, template, strangers (queries used), persons (that each was matched against),
    source, quality (the bound or None), refuse, unusable (queries left out).
    Raises UserError if `far` or `refuse` is not a share, the gallery holds one person only, or there are too few
    queries to expect metrics.MIN_ERRORS false accepts.
    """
    check_calibration(len(gallery.persons), len(queries.paths), far=far, source=source)
    if refuse is not None and not 0 <= refuse < 1:
        raise UserError(f"REFUSE = {refuse!r}: expected a share of clean photos, 0 or more and below 1, such as 0.01")
    total, bound = len(queries.paths), None if refuse is None else quality_bound(gallery, refuse)
    queries = usable(queries, bound)
    if not queries.paths:
        raise UserError(f"{source}: none of its {total} distorted photos is usable (REFUSE = {refuse:g})")
    found = metrics.ranking(score(gallery, queries, [gallery.template])[gallery.template])
    used = len(found.rival)
    check_calibration(len(gallery.persons), used, far=far, source=source)
    return {
        # A product of another shape rounds differently: who is refused here must not get a name there.
        "cosine": metrics.threshold_for(found.rival, far) + TIE,
        "far": far,
        "template": gallery.template,
        "strangers": used,
        "persons": len(gallery.persons) - 1,
        "source": source,
        "quality": bound,
        "refuse": refuse,
        "unusable": total - used,
    }


def quality_bound(gallery: Gallery, refuse: float) -> float | None:
    """The lowest quality of a usable photo: all but a share `refuse` of the gallery's photos reach it.

    None of a model that does not rate photos, and for fewer than LEAST_RATED photos.
    """
    if gallery.quality is None or len(gallery.quality) < LEAST_RATED:
        return None
    return gallery.quality.sort().values[metrics.rounded_down(refuse, len(gallery.quality))].item()


def usable(queries: Queries, bound: float | None) -> Queries:
    """The queries of at least that quality; all without a bound, or of a model that does not rate photos."""
    if bound is None or queries.quality is None:
        return queries
    return queries.subset((queries.quality >= bound).nonzero()[:, 0])


# --- of a checkpoint --------------------------------------------------------------------------------------------------


def calibrate_checkpoint(path: Path, model: nn.Module, on: ValidationSet) -> None:
    """Add to a checkpoint the calibration by the persons that its epoch was chosen on, for `identify.py`.

    model: of any weights, for those of the checkpoint; it stays as it is. Mirror images count, other than in quick
    validation. Under torchrun all processes embed and one writes.
    """
    saved, model = read_checkpoint(path), copy.deepcopy(model)
    restore(path, saved, {"model": model})
    gallery, queries = on.embed(model)
    if is_main():
        with atomic_file(path) as file:
            torch.save(saved | {"calibration": measure(gallery, queries)}, file)


def measure(gallery: Gallery, queries: Queries) -> dict:
    """What identification needs to know of a network's cosines, in plain types.

    cosines: template by which a person is matched -> false accept rate -> the lowest cosine that at most this share of
    the pairs of a usable query and another person reach, of those of RATES that so many pairs can measure. pairs,
    queries, persons: how many; clean: how many photos of the gallery; quality: the bound of `quality_bound`, or None.
    """
    bound = quality_bound(gallery, REFUSE)
    queries = usable(queries, bound)
    scores = score(gallery, queries)
    others = {name: of.matrix[of.truth[:, None] != torch.arange(len(gallery.persons))] for name, of in scores.items()}
    pairs = len(others["mean"])
    rates = [rate for rate in RATES if pairs * rate >= metrics.MIN_ERRORS]
    return {
        "cosines": {
            name: {f"{rate:g}": metrics.threshold_for(cosines, rate) + TIE for rate in rates}
            for name, cosines in others.items()
        },
        "pairs": pairs,
        "queries": len(queries.paths),
        "persons": len(gallery.persons),
        "clean": len(gallery.paths),
        "quality": bound,
    }


def measured_cosines(calibration: dict | None, template: str, source: str) -> dict[float, float]:
    """The `cosines` of `measure` by rate; {} without a calibration. Raises UserError if it is damaged."""
    if not calibration:
        return {}
    try:
        return {float(rate): float(cosine) for rate, cosine in calibration["cosines"][template].items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source}: its calibration is damaged; train it again, or set CALIBRATE_ON") from error


def reached(cosines: dict[float, float], cosine: float) -> float | None:
    """The lowest false accept rate whose cosine this one reaches; None if it reaches none."""
    return min((rate for rate, lowest in cosines.items() if cosine >= lowest), default=None)


def from_checkpoint(calibration: dict | None, far: float, persons: int, *, template: str, source: str) -> dict | None:
    """A threshold like that of `calibrate` for a gallery of so many `persons`, by what `measure` found.

    A stranger is matched against each of them, so the rate of pairs that counts is `far` over their number. Without a
    rate as low as that, the lowest one that was measured counts, and `far` is what it comes to. None if there is no
    calibration, or no rate in it. Raises UserError if it is damaged.
    """
    cosines = measured_cosines(calibration, template, source)
    if not cosines:
        return None
    try:
        counts = {name: int(calibration[name]) for name in ("queries", "pairs")}
        bound = None if calibration["quality"] is None else float(calibration["quality"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source}: its calibration is damaged; train it again, or set CALIBRATE_ON") from error
    rate = max([rate for rate in cosines if rate * persons <= far], default=min(cosines))
    return {
        "cosine": cosines[rate],
        "far": min(rate * persons, 1.0),
        "template": template,
        "strangers": counts["queries"],
        "persons": persons,
        "source": source,
        "quality": bound,
        "refuse": REFUSE,
        "unusable": 0,
        "pairs": counts["pairs"],
    }


def by_hand(cosine: float, bound: float | None, template: str) -> dict:
    """A threshold whose rate is not known."""
    threshold = {"cosine": float(cosine), "far": None, "template": template, "strangers": 0, "persons": 0}
    return threshold | {"source": "THRESHOLD", "quality": bound, "refuse": None, "unusable": 0}


# --- in words ---------------------------------------------------------------------------------------------------------


def describe(gallery: Gallery, far: float) -> str:
    """What the threshold of a gallery means, in words. far: the share of strangers that was asked for."""
    threshold = gallery.threshold
    if threshold is None:
        return (
            "no threshold: every face gets a name, a stranger's too; the network brings no calibration of its own, so "
            "set CALIBRATE_ON or THRESHOLD"
        )
    if threshold["far"] is None:
        return f"named at cosine >= {threshold['cosine']:.3f}, by THRESHOLD"
    if "pairs" in threshold:
        line = (
            f"named at cosine >= {threshold['cosine']:.3f}: about {100 * threshold['far']:.2g} % of strangers' photos "
            f"reach it among {threshold['persons']} persons, by the calibration of {threshold['source']} "
            f"({threshold['strangers']} photos in {threshold['pairs']} pairs with other persons)"
        )
        if threshold["far"] > far:
            line += (
                f"\n  more than FALSE_ACCEPT = {far:g}, for so few pairs measure no lower rate; set CALIBRATE_ON to a "
                "split of about as many persons, or a higher THRESHOLD by hand"
            )
        return line
    lines = [
        f"named at cosine >= {threshold['cosine']:.3f}: at most {100 * threshold['far']:g} % of the "
        f"{threshold['strangers']} photos of strangers in {threshold['source']} reach it, among "
        f"{threshold['persons']} persons"
    ]
    if threshold["quality"] is not None:
        total = threshold["unusable"] + threshold["strangers"]
        lines.append(
            f"usable at quality >= {threshold['quality']:.2f}: all but {100 * threshold['refuse']:g} % of the clean "
            f"photos there, and {threshold['strangers']} of the {total} distorted ones"
        )
    elif threshold["refuse"] is not None and gallery.quality is not None:
        lines.append(
            f"every photo counts as usable: {threshold['source']} has fewer than {LEAST_RATED} clean photos to set a "
            "bound by"
        )
    times = len(gallery.persons) / threshold["persons"]
    if times >= 2:
        lines.append(
            f"  the gallery has {times:.1f} times as many persons, so strangers get a name about that many times as "
            "often; calibrate on more persons, or lower FALSE_ACCEPT"
        )
    return "\n".join(lines)
