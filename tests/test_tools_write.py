"""Tools that write at the end of long work try first whether they may write there."""

import pytest

from common import UserError
from tools import align_faces, degradation_sheet, loose_frames, sample_faces, task_b_from_lfw, unseen_kinds

SLOW = {  # each tool's first slow step, and the constant that its photos come from
    align_faces: ("FaceDetector", "IN_DIR"),
    degradation_sheet: ("load_photos", None),
    loose_frames: ("move", "IN_DIR"),
    sample_faces: ("ProcessPoolExecutor", None),
    task_b_from_lfw: ("download_lfw", None),
    unseen_kinds: ("scan_persons", "SOURCE_DIR"),
}


@pytest.mark.parametrize("tool", SLOW, ids=lambda tool: tool.__name__)
def test_a_tool_finds_that_it_may_not_write_before_its_slow_work(tool, task_b, tmp_path, monkeypatch):
    step, photos = SLOW[tool]
    (tmp_path / "file").touch()
    out = "OUT_DIR" if hasattr(tool, "OUT_DIR") else "OUT"
    monkeypatch.setattr(tool, out, tmp_path / "file" / "out")
    monkeypatch.setattr(tool, step, lambda *_, **__: pytest.fail("slow work began"))
    if photos:
        monkeypatch.setattr(tool, photos, task_b / "val")
    with pytest.raises(UserError, match=f"{out} = .* cannot be written to"):
        tool.main()
