import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import plots
import report
from report import Picture, Section, Table, page

VOID = {"meta", "img", "input", "br", "hr", "link"}
EVIL = "<script>alert('1')</script> & \"quoted\""


class Checked(HTMLParser):
    """Parses strictly: fails on a tag that is not closed in order; keeps elements, their attributes and text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.doctype = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_decl(self, decl):
        self.doctype = decl

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        element = {"tag": tag, "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1]["tag"] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag: str) -> list[dict]:
        return [element for element in self.elements if element["tag"] == tag]


def png(width: int, height: int, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "png")
    return file.getvalue()


def cells(*values, header=None) -> list[dict]:
    """The data cells of a table of one row, behind its name."""
    table = Table("t", header or ["name", *("x" for _ in values)], [["a", *values]])
    return Checked(page("t", "s", [Section("h", "", [table])])).all("td")


def column(*values) -> list[dict]:
    table = Table("t", ["name", "x"], [["a", value] for value in values])
    return Checked(page("t", "s", [Section("h", "", [table])])).all("td")


SECTIONS = [
    Section(
        "Summary", "First.\n\nSecond.", [Table("By kind", ["kind", "top-1, %"], [["rainy", 98.25], ["all", None]])]
    ),
    Section("Pictures", "", [], [Picture("Rates", png(40, 30), "three curves"), Picture("Run", png(90, 30), "loss")]),
]


def test_the_page_is_html5_with_balanced_tags_language_and_viewport():
    parsed = Checked(page("Evaluation", "stage 2", SECTIONS))
    assert parsed.doctype == "DOCTYPE html" and parsed.all("html")[0]["lang"] == "en"
    metas = {meta.get("name", meta.get("http-equiv")): meta for meta in parsed.all("meta")}
    assert metas["viewport"]["content"] == "width=device-width, initial-scale=1"
    assert parsed.all("meta")[0]["charset"] == "utf-8"
    assert parsed.all("title")[0]["text"] == parsed.all("h1")[0]["text"] == "Evaluation"
    assert [p["text"] for p in parsed.all("p")] == ["stage 2", "First.", "Second."]


def test_the_contents_lead_to_each_section_once():
    twins = [Section("Same", ""), Section("Same", "")]
    parsed = Checked(page("t", "s", [*SECTIONS, *twins]))
    links = [(a["href"], a["text"]) for a in parsed.all("a")]
    assert [text for _, text in links] == ["Summary", "Pictures", "Same", "Same"]
    assert [href for href, _ in links] == ["#" + section["id"] for section in parsed.all("section")]
    ids = [element["id"] for element in parsed.elements if "id" in element]
    assert len(set(ids)) == len(ids)
    assert [section["aria-labelledby"] for section in parsed.all("section")] == [h["id"] for h in parsed.all("h2")]


def test_nothing_is_fetched_and_no_script_runs():
    text = page("t", "s", SECTIONS)
    assert "http:" not in text and "https:" not in text and "//" not in re.sub(r"base64,[^\"]*", "", text)
    assert "url(" not in text and "@import" not in text
    parsed = Checked(text)
    assert {element["tag"] for element in parsed.elements}.isdisjoint({"script", "link", "iframe", "object", "embed"})
    assert all(src.startswith("data:") for e in parsed.elements for name, src in e.items() if name in ("src", "srcset"))
    assert not [name for element in parsed.elements for name in element if name.startswith("on")]
    policy = next(m["content"] for m in parsed.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_every_text_is_escaped_and_arrives_as_it_was():
    table = Table(EVIL, [EVIL, EVIL], [[EVIL, EVIL]])
    text = page(EVIL, EVIL, [Section(EVIL, EVIL, [table], [Picture(EVIL, png(4, 4), EVIL)])])
    parsed = Checked(text)
    assert not parsed.all("script") and "<script" not in text
    for tag in ("title", "h1", "p", "h2", "a", "th", "td", "figcaption"):
        assert {element["text"] for element in parsed.all(tag)} == {EVIL}, tag
    assert parsed.all("img")[0]["alt"] == EVIL and parsed.all("input")[0]["aria-label"] == f"Enlarge: {EVIL}"
    assert next(div for div in parsed.all("div") if div["class"] == "scroll")["aria-label"] == EVIL


def test_a_name_that_is_not_utf_8_can_still_be_written():
    text = page("Andr\udce9", "s", [])  # how Python shows a file name's Latin-1 byte
    assert b"<h1>Andr?</h1>" in text.encode("utf-8")


def test_pictures_decode_with_their_size_and_their_words():
    images = Checked(page("t", "s", SECTIONS)).all("img")
    assert [(image["width"], image["height"], image["alt"]) for image in images] == [
        ("40", "30", "three curves"),
        ("90", "30", "loss"),
    ]
    for image in images:
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as decoded:
            assert (str(decoded.width), str(decoded.height)) == (image["width"], image["height"])
            assert decoded.getpixel((0, 0)) == (255, 0, 0)


def test_a_wide_picture_takes_the_whole_row():
    figures = Checked(page("t", "s", SECTIONS[1:])).all("figure")
    assert [figure.get("class") for figure in figures] == [None, "wide"]


def test_each_picture_has_a_checkbox_of_its_own_label_to_enlarge_it():
    text = page("t", "s", SECTIONS)
    boxes = re.findall(
        r'<label><input type="checkbox" aria-label="([^"]*)"><span class="frame"><img [^>]*></span></label>', text
    )
    assert boxes == ["Enlarge: three curves", "Enlarge: loss"]


def test_a_jpeg_is_shown_as_one():
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, "jpeg")
    [image] = Checked(page("t", "s", [Section("h", "", [], [Picture("p", file.getvalue(), "a")])])).all("img")
    assert image["src"].startswith("data:image/jpeg;base64,") and (image["width"], image["height"]) == ("30", "20")


def test_a_picture_that_is_no_image_is_refused():
    with pytest.raises(ValueError, match=r"Rates: no PNG or JPEG, it begins with b'GIF89a"):
        page("t", "s", [Section("h", "", [], [Picture("Rates", b"GIF89a a GIF", "")])])


def test_a_missing_figure_is_a_dash_that_says_why():
    parsed = Checked(page("t", "s", SECTIONS))
    (span,) = (span for span in parsed.all("span") if "title" in span)
    assert (span["text"], span["title"]) == ("–", "too few samples")
    assert parsed.all("td")[1]["text"] == "–"


def test_a_table_has_header_cells_for_its_columns_and_rows():
    parsed = Checked(page("t", "s", SECTIONS))
    assert [(th["scope"], th["text"]) for th in parsed.all("th")] == [
        ("col", "kind"),
        ("col", "top-1, %"),
        ("row", "rainy"),
        ("row", "all"),
    ]
    assert parsed.all("figcaption")[0]["text"] == "By kind"


def test_floats_of_a_column_share_their_decimals():
    assert [cell["text"] for cell in column(98.25, 100.0, 0.5)] == ["98.2", "100.0", "0.5"]
    assert [cell["text"] for cell in column(0.4125, 1.0, -0.2, None)] == ["0.412", "1.000", "-0.200", "–"]
    assert [cell["text"] for cell in column(2758, 12.0)] == ["2,758", "12.0"]


@pytest.mark.parametrize(
    "value",
    [3, 0.5, "97.3", "1,234", "-0.2", "95.1–98.4", "97.3 ± 0.4", "1e-3", "58 of 60", "9.5 %", "+0.4 [-0.1, +0.9]"],
)
def test_numbers_stand_on_the_right(value):
    assert cells(value)[0].get("class") == "number"
    assert column(value, None)[0].get("class") == "number"


@pytest.mark.parametrize("value", ["rainy", "", "0001_rainy.jpg", "3 persons"])
def test_words_stand_on_the_left_and_take_their_column_along(value):
    assert [cell.get("class") for cell in column(1.5, value, "97.3")] == [None] * 3


def test_the_header_of_a_column_of_numbers_stands_over_them():
    heads = [th.get("class") for th in Checked(page("t", "s", SECTIONS)).all("th") if th["scope"] == "col"]
    assert heads == [None, "number"]


def test_a_row_of_another_length_than_its_header_is_refused():
    table = Table("By kind", ["kind", "top-1"], [["rainy", 1.0, 2.0]])
    with pytest.raises(ValueError, match="By kind: a row of 3 cells under a header of 2"):
        page("t", "s", [Section("h", "", [table])])


def test_a_table_without_rows_and_a_page_without_sections_are_whole():
    parsed = Checked(page("t", "s", [Section("h", "", [Table("none", ["a", "b"], [])])]))
    assert len(parsed.all("th")) == 2 and not parsed.all("td")
    assert not Checked(page("t", "s", [])).all("section")


def test_a_long_table_keeps_within_bytes_per_cell_and_a_picture_is_held_once():
    empty = len(page("t", "s", []))
    assert empty < 10_000
    rows = [[f"Person_{number}", number, 98.5, None] for number in range(222)]
    assert len(page("t", "s", [Section("h", "", [Table("t", ["a", "b", "c", "d"], rows)])])) - empty < 60_000
    noise = Image.effect_noise((200, 200), 90)
    file = io.BytesIO()
    noise.save(file, "png")
    held = len(page("t", "s", [Section("h", "", [], [Picture("p", file.getvalue(), "a")])])) - empty
    assert 4 / 3 * len(file.getvalue()) < held < 4 / 3 * len(file.getvalue()) + 1000


def test_the_style_knows_dark_screens_and_paper():
    style = Checked(page("t", "s", [])).all("style")[0]["text"]
    assert "@media (prefers-color-scheme: dark)" in style and "@media print" in style
    assert style.count("{") == style.count("}")


def all_colours(figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")


def test_a_heat_map_loses_two_thirds_of_its_bytes_and_nothing_that_can_be_seen():
    generator = torch.Generator().manual_seed(0)
    templates = torch.randn(20, 64, generator=generator)
    labels = torch.arange(20).repeat(20)
    queries = templates[labels] + torch.randn(400, 64, generator=generator)
    cosine = torch.cosine_similarity(queries[:, None], templates[None], dim=2)
    figure = plots.similarity_matrix(cosine, labels.tolist(), [f"Person_Number_{n}" for n in range(20)], templates)
    suffix, png = report.encoded(figure)
    assert suffix == ".png"
    assert len(png) < 100_000
    with Image.open(io.BytesIO(png)) as image:
        assert image.size == (8 * plots.DPI, round(7.5 * plots.DPI))
        difference = np.asarray(image.convert("RGB"), int) - np.asarray(all_colours(figure), int)
    assert np.abs(difference).mean() < 0.5


def test_photos_become_a_jpeg_that_looks_the_same():
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)).resize((160, 160))
    figure = plots.mistakes_sheet([([smooth] * 3, ("a", "b", "c"))] * 12)
    suffix, content = report.encoded(figure)
    assert suffix == ".jpg" and len(content) < 300_000
    with Image.open(io.BytesIO(content)) as image:
        difference = np.asarray(image.convert("RGB"), int) - np.asarray(all_colours(figure), int)
    assert np.abs(difference).mean() < 2


def test_curves_and_bars_stay_small_files():
    rates = np.linspace(0, 1, 3000)
    curves = {f"stage {n}": (rates**2, rates ** (1 / (n + 2))) for n in range(3)}
    kinds = ["blurred", "foggy", "lowlight", "noisy", "rainy", "resized", "sunny", "all"]
    figures = [
        plots.roc(curves, 600_000),
        plots.cmc({title: tar[1500::75] for title, (_, tar) in curves.items()}),
        plots.bars(kinds, {title: [(0.9, 0.85, 0.95)] * 8 for title in curves}),
    ]
    for figure in figures:
        assert len(report.encoded(figure)[1]) < 60_000
