"""The constants of both training scripts: which ones a resumed run takes over, and which ones may change."""

import reprlib
from pathlib import Path

from checkpoints import write_json
from common import UserError

# Each constant of the scripts is in one of three lists. A run is resumed only where these are as they were ...
MUST_EQUAL = (
    *("SEED", "BATCH_SIZE", "PERSONS_PER_BATCH", "PHOTOS_PER_PERSON", "ACCUMULATE", "EMA_DECAY"),  # its course
    *("MARGIN", "SCALE", "EASY_MARGIN", "CENTRES_FROM_MEANS"),  # stage 1's loss
    *("CONTRASTIVE_WEIGHT", "CONTRASTIVE_MARGIN", "INSTANCE_WEIGHT", "TEMPERATURE", "MAYBE_SAME"),  # stage 2's losses
    *("BACKBONE", "IMAGE_SIZE", "FACE_CROP", "FRAMING", "WIDE_WEIGHT", "WIDE_SIZE", "MIRROR"),  # the network ...
    *("FREEZE_UNTIL", "FREEZE_BATCHNORM", "DROPOUT"),  # ... and how it learns
    *("HOLDOUT_PERSONS", "SKIP_KINDS", "OFTEN", "BALANCE"),  # what it is trained on ...
    *("CLEAN", "DISTORT", "DISTORT_MOST", "WITHOUT_FAMILIES", "CROP_ZOOM", "CROP_SHIFT"),  # ... and how that is varied
    *("TEMPLATE", "QUICK_VALIDATION"),  # the figure that chooses the best epoch
)
# ... these may change, which a line reports, and are true from then on ...
MAY_CHANGE = (
    *("EPOCHS", "PATIENCE", "MAX_CLEAN_DROP"),
    *("BACKBONE_LR", "HEAD_LR", "WIDE_LR", "WARMUP_STEPS", "WEIGHT_DECAY", "GRAD_CLIP"),
    "AMP",
)
# ... and these do not matter: of files not the place counts but what is in them, which the run's facts identify.
DOES_NOT_MATTER = (
    *("DATA_DIR", "EXTRA_FACES", "PRETRAINED", "TEACHER", "STAGE1_CHECKPOINT", "RUN_DIR"),
    *("RESUME", "SAVE_EVERY", "CHECK_IMAGES", "NUM_WORKERS", "COMPILE"),
)
PLAIN = (bool, int, float, str, Path, tuple, list, set, type(None))  # a constant's value; not torch.nn.functional as F


def plain_constants(script: dict) -> dict:
    """The CAPITALS of a script's globals(), in types that JSON has."""

    def plain(value):
        if isinstance(value, (tuple, list)):
            return [plain(part) for part in value]
        if isinstance(value, set):
            return sorted(map(plain, value))
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in script.items() if name.isupper() and isinstance(value, PLAIN)}


def course(script: dict) -> dict:
    """The constants that a checkpoint states: all but those that do not matter."""
    return {name: value for name, value in plain_constants(script).items() if name in MUST_EQUAL + MAY_CHANGE}


def check_constants(path: Path, saved: dict, now: dict) -> dict[str, str]:
    """The constants that changed since the checkpoint `saved` at `path`, with "<then> -> <now>"; all of them may.

    Raises UserError for the first one that must be equal and is not, or for a checkpoint that does not state them.
    """
    then = saved.get("constants")
    if not isinstance(then, dict):
        raise UserError(
            f"{path}: cannot be resumed, its constants are {reprlib.repr(then)}; give RUN_DIR another name and set "
            "RESUME = False to start a new run"
        )
    missing = [name for name in now if name not in then and name in MUST_EQUAL]
    if missing:
        raise UserError(
            f"{path}: cannot be resumed, it is of a version of these scripts without {missing[0]}; give RUN_DIR "
            "another name to start a new run"
        )
    changed = [name for name in now if name in then and then[name] != now[name]]
    for name in changed:
        if name in MUST_EQUAL:
            raise UserError(
                f"{path}: cannot be resumed, {name} has changed ({then[name]!r} then, {now[name]!r} now); set it back, "
                "or give RUN_DIR another name to start a new run"
            )
    return {name: f"{then[name]!r} -> {now[name]!r}" for name in changed}


def note_constants(run_dir: Path, constants: dict) -> None:
    """Write `constants`, those of the last start or resumption, to `run_dir`/constants.json."""
    write_json(run_dir / "constants.json", constants)
