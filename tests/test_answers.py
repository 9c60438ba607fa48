"""The table of answers on a terminal, and the pictures."""

import sys
from pathlib import Path

from conftest import write_plain

from answers import Answer, annotate, printable, table, width


def test_wide_and_unprintable_names_keep_the_columns_aligned():
    names = ("a.png", "李小龍.png", "Zoe\u0308.png", "a\nb\udcff.png")
    answers = [Answer(photo=name, status="named", person=name, score=0.5, resembles="x") for name in names]
    lines = table(answers).splitlines()
    assert len({width(line[: line.rindex("0.500")]) for line in lines[1:-1]}) == 1
    assert lines[4].startswith("a\\nb\\udcff.png")
    assert [width(text) for text in ("abc", "李小龍", "e\u0308")] == [3, 6, 1]


def test_names_are_printable_without_a_console_too(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert printable("李\x1b") == "李\\x1b"


def test_a_folder_of_pictures_shows_one_run_and_keeps_what_is_not_ours(tmp_path):
    folder, photos = tmp_path / "annotated", [tmp_path / "a.png", tmp_path / "b.png"]
    for photo in (*photos, folder / "0003_mine.jpg"):
        write_plain(photo, (200, 0, 0))
    (folder / "0004_text.jpg").write_text("no picture")
    kept = {"0003_mine.jpg", "0004_text.jpg"}

    def pictures(*photos: Path) -> set[str]:
        annotate(folder, [Answer(photo=str(photo), status="no face") for photo in photos], side=200, fraction=1)
        return {path.name for path in folder.iterdir()} - kept

    assert pictures(*photos) == {"0001_a.jpg", "0002_b.jpg"}
    assert pictures(photos[1]) == {"0001_b.jpg"}
    assert pictures(folder / "0001_b.jpg") == {"0001_b.jpg", "0001_0001_b.jpg"}  # given as a photo itself
    assert kept <= {path.name for path in folder.iterdir()}
