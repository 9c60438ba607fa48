import base64
import html
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_photo
from PIL import Image

import metrics
import report
from gallery import Gallery, Queries, score
from result_tables import PRINTED

EVIL = "<script>alert('1')</script> & \"quoted\""
DIFFERENCES = {
    "rank-1": {"value": 0.02, "low": 0.01, "high": 0.03},
    "mAP": {"value": -0.01, "low": -0.02, "high": 0.0},
    "DIR@FPIR=0.01": {"value": 0.5, "low": None, "high": None},
}


def measured(right: list[int], impostor_pairs: int = 8) -> metrics.Measured:
    """Of queries answered right (1) or wrong (0); all figures but rank-1 have too few samples."""
    values = torch.tensor(right, dtype=torch.double)
    rank1 = {"value": values.mean().item(), "low": 0.25, "high": 0.875}
    figures = {name: {"value": None, "low": None, "high": None} for name in metrics.FIGURES} | {"rank-1": rank1}
    far, tar, edges = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 1.0]), torch.arange(3.0)
    roc = SimpleNamespace(far=far, tar=tar, edges=edges, genuine_bins=edges[1:].int(), impostor_bins=edges[:2].int())
    roc.genuine_pairs, roc.impostor_pairs = len(right), impostor_pairs
    by_query = {"rank-1": values, "mAP": values / 2}
    return metrics.Measured(figures, {"TAR@FAR=0.01": 0.5}, by_query, cmc=values.mean().repeat(3), roc=roc)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> report.Evaluated:
    """Persons ann, EVIL and cy, one photo each; a foggy photo of ann is answered right, two rainy ones wrong."""
    photos, people = tmp_path_factory.mktemp("photos"), ["ann", EVIL, "cy"]
    paths = [photos / f"{name}.png" for name in ("1", "2", "3", "a", "b", "c")]
    for seed, path in enumerate(paths):
        write_photo(path, (120, 120, 120), seed)
    shown = [("foggy", "ann", "ann", 0.9), ("rainy", "ann", EVIL, 0.5), ("rainy", "eve", EVIL, 0.7)]
    per_query = []
    for path, (kind, person, predicted, cosine) in zip(paths[3:], shown, strict=True):
        answer = {"predicted": predicted, "score": cosine, "rank": 1 + (person != predicted)}
        query = {"path": str(path), "kind": kind, "person": person, "quality": None, "mean": answer, "best": answer}
        per_query.append(query)
    half, none = {"mean": 0.5, "best": 0.5}, {"mean": 0.0, "best": 0.0}
    per_person = {"ann": {"queries": 2, "top1": half}, "eve": {"queries": 1, "top1": none}}
    details = {"template": "mean", "top1": {"mean": 1 / 3, "best": 1 / 3}, "persons": 3, "photos": 3, "queries": 3}
    details |= {"not_enrolled": 1, "persons_without_query": 2, "per_query": per_query, "per_person": per_person}
    groups = {"foggy": measured([1]), "rainy": measured([0, 0]), "all": measured([1, 0, 0])}
    made_by, embeddings = {"fingerprint": "0123"}, torch.eye(3)
    kinds, persons = ["foggy", "rainy", "rainy"], ["ann", "ann", "eve"]
    queries = Queries(embeddings, torch.tensor([0, 0, -1]), torch.full((3,), -1), paths[3:], persons, kinds)
    return report.Evaluated(
        title="stage2",
        source=EVIL,
        split="val",
        facts={"stage": 2, "image_size": 76, "face_crop": 0.5, "made_by": made_by, "weights": embeddings},
        gallery=Gallery(embeddings, torch.arange(3), people, paths[:3], "mean"),
        queries={"cross": queries},
        details={"cross": details},
        measured={"cross": {"mean": groups, "best": groups}},
        discard_curves={"cross": {"rainy": torch.tensor([2.0, 1, 0]), "all": torch.tensor([2.0, 1, 1, 0])}},
    )


def test_results_are_printed_with_intervals_dashes_for_missing_figures_and_stars(evaluated, capsys):
    report.print_results(evaluated, None, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(
        "cross: 3 clean photos of 3 persons in the gallery, 3 queries of 2 persons, 1 of them of "
    )
    assert lines[1].endswith("persons outside the gallery; 2 persons of the gallery have no query; mean template")
    assert lines[2].split()[:7] == ["%", "queries", "rank-1", "95", "%", "interval", "rank-5"]
    assert lines[5].split() == ["all", "3", "33.3", "[25.0,", "87.5]", *"-" * (len(PRINTED) - 1)]
    assert lines[6] == "rank-1 of all by template: mean 33.3, best 33.3"
    assert lines[7].endswith("the 20 % of the queries of lowest quality: rainy 100, all 100 (of 2; ideal: 100)")
    assert lines[8] == "cross: TAR@FAR=0.01 is not reported: 8 impostor pairs, 1000 needed"
    assert lines[12] == "cross: DIR@FPIR=0.1 is not reported: 3 queries, 200 needed"
    assert lines[-1].split() == ["cross", "33.3", "[25.0,", "87.5]", "3"]
    report.print_results(evaluated, evaluated, {"cross": {"all": DIFFERENCES}})
    row = capsys.readouterr().out.splitlines()[10]
    assert row.split(maxsplit=1)[1].startswith("+2.0 [+1.0, +3.0]*") and row.endswith("+50.0")


def test_figures_queries_persons_and_differences_are_written_as_csv_and_json(evaluated, tmp_path):
    report.write_results(tmp_path / "new", evaluated, None, {})
    assert not (tmp_path / "new" / "comparison.csv").exists()
    report.write_results(tmp_path, evaluated, evaluated, {"cross": {"all": DIFFERENCES}})
    written = {path.stem: path.read_bytes().decode().split("\n") for path in tmp_path.glob("*.csv")}
    header, *rows = written["figures"][:-1]
    ends = [f"{name}{end}" for name in metrics.FIGURES for end in ("", " low", " high")]
    assert header.split(",") == ["protocol", "template", "kind", "queries", *ends]
    assert rows[2] == "cross,mean,all,3,0.3333333333333333,0.25,0.875" + "," * (len(ends) - 3) and len(rows) == 6
    assert written["persons"] == [
        *("protocol,person,queries,top1_mean,top1_best,mAP", "cross,ann,2,0.5,0.5,0.25", "cross,eve,1,0.0,0.0,0.0", "")
    ]
    answer = "predicted_{0},score_{0},rank_{0}".format
    assert written["queries"][0] == f"protocol,path,kind,person,quality,{answer('mean')},{answer('best')}"
    path = evaluated.details["cross"]["per_query"][0]["path"]
    assert written["queries"][1] == f"cross,{path},foggy,ann,,ann,0.9,1,ann,0.9,1"
    assert written["comparison"][:2] == ["protocol,kind,figure,value,low,high", "cross,all,rank-1,0.02,0.01,0.03"]
    assert written["comparison"][3] == "cross,all,DIR@FPIR=0.01,0.5,,"
    saved = json.loads((tmp_path / "figures.json").read_text())
    assert saved["model"] == saved["compared_with"] and "weights" not in saved["model"]
    assert saved["protocols"]["cross"]["wrong_left"] == {"rainy": 1.0, "all": 1.0}
    assert saved["protocols"]["cross"]["figures"]["best"]["rainy"]["rank-1"]["value"] == 0.0


def test_files_of_an_earlier_evaluation_are_removed_and_others_stay(evaluated, tmp_path, caplog):
    folder = tmp_path / "results" / "val_stage2"
    assert report.without_earlier_files(folder) == folder  # nothing there yet
    report.write_results(folder, evaluated, evaluated, {"cross": {"all": DIFFERENCES}})
    report.write_report(folder, drawn(evaluated), evaluated, None, {})
    (folder / "mistakes.png").touch()  # of one without mistakes, whose sheet shows no photos
    for name in ("notes.txt", "my figures.csv", "roc.png"):
        (folder / name).touch()
    assert report.without_earlier_files(folder) == folder
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "my figures.csv", "roc.png"}

    (folder / "queries.csv").mkdir()  # cannot be removed, like a file that Excel holds
    other = report.without_earlier_files(folder)
    assert other.parent == folder.parent and other != folder and not list(other.iterdir())
    assert f"{folder / 'queries.csv'}: cannot be removed" in caplog.text and str(other) in caplog.text


def drawn(evaluated, before=None) -> dict:
    return report.draw_pictures(evaluated, before, persons=2, mistakes=2, mistakes_per_kind=1, seed=0)


def test_pictures_are_drawn_where_there_is_enough_to_show(evaluated):
    expected = {f"{name}_cross" for name in ("cmc", "roc", "scores", "kinds", "discard")} | {"similarity", "mistakes"}
    pictures = drawn(evaluated)
    assert set(pictures) == expected | {"tsne"}
    assert pictures["mistakes"].get_suptitle() == "Protocol “cross”: wrong answers of the highest cosine"
    assert pictures["scores_cross"].legends[0].get_texts()[-1].get_text() == "threshold 0.500 (FAR 1e-2)"
    together, kinds = pictures["discard_cross"].axes
    assert together.lines[0].get_label().startswith("all ") and kinds.lines[0].get_label().startswith("rainy ")
    alone = {"cross": {"mean": {"foggy": measured([1]), "all": measured([1], impostor_pairs=0)}}}
    few = replace(evaluated, measured=alone, discard_curves={"cross": {}})
    assert set(drawn(few)) == expected - {"roc_cross", "scores_cross", "discard_cross"} | {"tsne"}
    assert [label.get_text() for label in drawn(few)["kinds_cross"].axes[0].get_yticklabels()] == ["foggy"]


def test_a_group_without_an_enrolled_person_is_reported_as_the_reason_for_its_missing_figures(evaluated, tmp_path):
    groups = evaluated.measured["cross"]["mean"]
    strangers = measured([0, 0])
    strangers.roc.genuine_pairs = 0
    odd = replace(evaluated, measured={"cross": {"mean": {"odd": strangers} | groups, "best": groups}})
    reason = "cross: odd has no TAR, EER and DIR: its 2 queries show only persons outside the gallery"
    assert report.missing_figures(odd)[0] == reason
    report.write_results(tmp_path, odd, None, {})
    assert json.loads((tmp_path / "figures.json").read_text())["not_reported"] == report.missing_figures(odd)


@pytest.mark.parametrize("template", ["mean", "best"])
def test_the_similarity_matrix_shows_the_cosines_that_the_answers_are_by(template):
    """Of faces beside whole frames: under "mean" a person's mean face counts, beside its most similar frame."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(9, 1024, generator=generator))
    truth, none = torch.tensor([0, 1, 2]), torch.full((3,), -1)
    gallery = Gallery(embeddings[:6], torch.tensor([0, 0, 1, 1, 2, 2]), ["ann", "bob", "cy"], [Path("x")] * 6, template)
    queries = Queries(embeddings[6:], truth, none, [Path("q")] * 3, gallery.persons, ["foggy"] * 3)
    axes = report.embedding_pictures(gallery, queries, persons=2, seed=0)["similarity"].axes[0]
    order = [gallery.persons.index(label.get_text()) for label in axes.get_xticklabels()]
    expected = score(gallery, queries)[template].matrix[:2, :2]
    assert np.array_equal(np.asarray(axes.images[0].get_array()), expected[order][:, order].numpy())


def test_mistakes_are_shown_by_falling_score_and_few_of_a_kind(evaluated):
    rows = report.mistake_rows(evaluated, "cross", lambda image: image, most=9, most_per_kind=9)
    first = (("c.png", "rainy"), ("eve", "not enrolled"), (EVIL, "cosine 0.70"))
    second = (("b.png", "rainy"), ("ann", "cosine 0.00"), (EVIL, "cosine 0.50"))  # at a right angle to ann
    assert [captions for _, captions in rows] == [first, second]
    for most, most_per_kind in ((1, 9), (9, 1)):
        rows = report.mistake_rows(evaluated, "cross", lambda image: image, most=most, most_per_kind=most_per_kind)
        assert [captions for _, captions in rows] == [first]


def test_mistakes_are_shown_framed_as_the_network_sees_them(evaluated, monkeypatch):
    seen = []
    monkeypatch.setattr(report.plots, "mistakes_sheet", lambda rows, title: seen.extend(rows))
    drawn(replace(evaluated, frames=lambda image: Image.new("RGB", image.size, "red")))
    assert seen and all((np.asarray(image) == (255, 0, 0)).all() for images, _ in seen for image in images)


@pytest.mark.parametrize("name, suffix, loss", [("similarity", ".png", 0.5), ("mistakes", ".jpg", 2)])
def test_a_picture_becomes_a_small_file_without_a_visible_loss(evaluated, name, suffix, loss):
    figure, lossless = drawn(evaluated)[name], io.BytesIO()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # a second layout would move the photos by a pixel
    figure.savefig(lossless, format="png")
    picture = report.encode(figure)
    assert picture.suffix == suffix and len(picture.data) < 0.8 * len(lossless.getvalue())
    small, large = (Image.open(file).convert("RGB") for file in (io.BytesIO(picture.data), lossless))
    assert small.size == large.size == (picture.width, picture.height)
    assert np.abs(np.asarray(small, int) - np.asarray(large, int)).mean() < loss


@pytest.fixture(scope="module")
def folder(evaluated, tmp_path_factory) -> Path:
    """What write_report leaves."""
    written = tmp_path_factory.mktemp("results")
    before = replace(evaluated, title="stage1")
    after = replace(evaluated, source=f"{EVIL} Andr\udce9")  # how Python shows the byte of a Latin-1 file name
    report.write_report(written, drawn(after, before), after, before, {"cross": {EVIL: DIFFERENCES}})
    return written


@pytest.fixture
def page(folder) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def texts(page: str, tag: str) -> list[str]:
    return [html.unescape(text) for text in re.findall(rf"<{tag}(?: [^>]*)?>(.*?)</{tag}>", page, re.DOTALL)]


def attributes(page: str, tag: str, name: str) -> list[str]:
    return [html.unescape(value) for value in re.findall(rf'<{tag} [^>]*?{name}="([^"]*)"', page)]


def test_the_page_opens_with_a_sentence_and_a_table_of_protocols_by_name_and_all_else_is_folded_away(page):
    opening, _, folded = page.partition("<body>")[2].partition("<details")
    explained = "distorted photos, none of them compared with the clean photo that it was made from"
    found = "The stage2 network finds the right one of 3 persons for 33.3 % (95 % interval 25.0 to 87.5) of 3"
    assert texts(opening, "p") == [f"{found} {explained}."]
    assert texts(opening, "th") == ["protocol", "top-1, %", "queries", f"cross<small>{explained}</small>"]
    assert texts(opening, "td") == ["33.3 <small>[25.0, 87.5]</small>", "3"]
    assert "<img" not in opening and "<details open" not in page
    assert re.sub(r"<details.*?</details>", "", "<details" + folded, flags=re.DOTALL).split() == [
        *("</main>", "</body>", "</html>")
    ]


def test_the_page_is_html5_of_sections_that_open_by_their_titles(page):
    assert page.startswith("<!DOCTYPE html>") and attributes(page, "html", "lang") == ["en"]
    assert texts(page, "title") == texts(page, "h1") == ["stage2 on val"]
    assert texts(page, "summary") == [f"<h2>{title}</h2>" for title in texts(page, "h2")]
    assert attributes(page, "details", "id") == ["method", "cross", "figures", "embeddings"]
    assert "never compared with the clean photo that it was made from" in " ".join(page.split())
    [style] = texts(page, "style")
    assert "prefers-color-scheme: dark" in style and "@media print" in style and style.count("{") == style.count("}")
    for tag in set(re.findall(r"<(\w+)", page)) - {"meta", "img", "input", "wbr"}:
        assert len(re.findall(rf"<{tag}\b", page)) == page.count(f"</{tag}>")


def test_the_page_fetches_nothing_runs_no_script_and_escapes_every_text(page):
    assert "http:" not in page and "https:" not in page and "url(" not in page
    assert not re.search(r"<(script|link|iframe|object|embed)|<[^>]* on\w+=", page)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page
    assert f"The model is {EVIL} Andr?: 76 pixels, crop 0.5, model 0123." in texts(page, "p")
    assert EVIL in texts(page, "th")


def test_the_page_holds_every_picture_once_with_its_size_and_a_checkbox_to_enlarge_it(page, folder):
    files = {path.read_bytes() for path in folder.iterdir() if path.suffix != ".html"}
    shown = [attributes(page, "img", name) for name in ("src", "width", "height", "alt")]
    assert len(files) == len(shown[0]) == len(set(shown[3])) == 8  # no two texts are the same
    assert sum(words.startswith("Protocol “cross”: ") for words in shown[3]) == 5
    for source, width, height, words in zip(*shown, strict=True):
        kind, data = source.split(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as opened:
            assert kind == f"data:image/{opened.format.lower()}" and opened.size == (int(width), int(height))
        assert base64.b64decode(data) in files
        assert f"Enlarge: {words}" in attributes(page, "input", "aria-label")


def test_a_table_has_header_cells_and_its_dash_says_that_samples_are_too_few(page):
    heads = [head.replace("<wbr>", "") for head in texts(page, "th")]
    assert heads[4:11] == ["kind", "queries", *metrics.FIGURES[:5]]
    assert heads[14:24] == ["kind", "queries", *metrics.FIGURES[5:]]
    assert texts(page, "td")[2:5] == ["1", "100.0 <small>[25.0, 87.5]</small>", "-"]
    assert page.count(">-</td>") == page.count('<td title="too few samples">-</td>') > 0
    assert any("difference to stage1" in caption for caption in texts(page, "figcaption"))
    assert "+2.0 <small>[+1.0, +3.0]*</small>" in texts(page, "td")


def test_importing_training_loads_no_library_that_only_tables_and_pictures_need():
    needed = "import sys, training; print({'pandas', 'jinja2', 'matplotlib', 'sklearn'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", needed], text=True).strip() == "set()"
