"""The table of answers on a terminal."""

import sys

from answers import Answer, printable, table, width


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
