"""Retrieval, on trees whose answers can be worked out by hand or by a loop over the files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MeanColour, as_float, write_plain
from PIL import Image
from torch import nn

import metrics
from common import UserError
from datasets import scan_persons
from gallery import (
    Gallery,
    NoQueries,
    Queries,
    build_gallery,
    discard_curves,
    embed_queries,
    embed_split,
    evaluate,
    measure,
    person_means,
    retrieve,
    score,
    select_queries,
)


def retrieved(root: Path, protocol: str = "same", template: str = "mean") -> tuple[Gallery, Queries, dict]:
    """Gallery, the protocol's queries and their answers."""
    gallery, distorted = embed_split(MeanColour(), root, as_float, "cpu", template=template)
    queries = select_queries(gallery, distorted, protocol)
    return gallery, queries, retrieve(gallery, queries, score(gallery, queries))


# Clean photos, then distorted ones. Ann's mean template points to (1, 1, 0).
FOUR_QUERIES = {
    "ann/clean/1.png": (200, 0, 0),
    "ann/clean/2.png": (0, 200, 0),
    "bob/clean/1.png": (200, 0, 100),
    "ann/distortion/1_foggy.png": (255, 20, 0),  # best: ann's photo 1; mean: bob
    "ann/distortion/2_sunny.png": (100, 110, 0),  # mean: ann; best: bob 100*200 / 223.6 = 89.4 < ann's photo 2, 110
    "bob/distortion/1_foggy.png": (100, 0, 50),  # bob
    "bob/distortion/1_rainy.png": (50, 60, 0),  # ann, wrong under both
}


@pytest.fixture
def four_queries(tmp_path) -> Path:
    for name, colour in FOUR_QUERIES.items():
        write_plain(tmp_path / "val" / name, colour)
    return tmp_path / "val"


@pytest.fixture
def random_colours(tmp_path) -> Path:
    """6 persons of 1 to 4 clean photos and 1 to 9 distorted ones, of random colours: right answers and wrong ones."""
    random = np.random.default_rng(7)
    for p in range(6):
        colour = random.integers(60, 200, 3)
        for k in range(random.integers(1, 5)):
            write_plain(tmp_path / "val" / f"p{p}" / "clean" / f"{k}.png", colour + random.integers(-60, 55, 3))
            for kind in ("blurred", "foggy", "sunny")[: random.integers(1, 4)]:
                copy = colour + random.integers(-60, 55, 3)
                write_plain(tmp_path / "val" / f"p{p}" / "distortion" / f"{k}_{kind}.png", copy)
    return tmp_path / "val"


class Rating(MeanColour):
    """Rates a photo by its brightness."""

    rates = True

    def rated(self, images):
        colour = self(images)
        return colour, colour.sum(1)


def test_quality_weights_the_gallery_and_goes_with_the_queries_and_their_answers(four_queries):
    write_plain(four_queries / "ann/clean/2.png", (0, 100, 0))
    gallery, queries = embed_split(Rating(), four_queries, as_float, "cpu", template="best")
    assert gallery.quality.tolist() == [200, 100, 300]
    assert torch.equal(gallery.weighted, gallery.embeddings * torch.tensor([[200.0], [100.0], [300.0]]))
    assert queries.quality.tolist() == [275, 210, 150, 110]
    assert select_queries(gallery, queries, "cross").quality.tolist() == [275, 210]  # bob has one photo
    assert select_queries(gallery, None, "clean").quality.tolist() == [200, 100]
    same = select_queries(gallery, queries, "same")
    scores = score(gallery, same)
    ann = torch.tensor([2.0, 1.0, 0.0]) / math.sqrt(5)  # the mean of her photos by their quality
    torch.testing.assert_close(scores["mean"].matrix[:, 0], queries.embeddings @ ann)
    assert [query["quality"] for query in retrieve(gallery, same, scores)["per_query"]] == [275, 210, 150, 110]
    left = discard_curves(same, measure(gallery, same, scores, seed=0)["best"])
    assert {group: counts.tolist() for group, counts in left.items()} == {
        "foggy": [0, 0, 0],
        "rainy": [1, 0],  # the darkest is the one that is wrong
        "sunny": [0, 0],
        "without sunny": [1, 0, 0, 0],
        "all": [1, 0, 0, 0, 0],
    }


def test_without_a_rating_there_is_no_quality_anywhere(four_queries):
    gallery, queries = embed_split(MeanColour(), four_queries, as_float, "cpu", template="mean")
    assert gallery.quality is None and torch.equal(gallery.weighted, gallery.embeddings)
    for protocol in ("same", "cross", "clean"):
        assert select_queries(gallery, queries, protocol).quality is None
    scores = score(gallery, queries)
    assert {query["quality"] for query in retrieve(gallery, queries, scores)["per_query"]} == {None}
    assert discard_curves(queries, measure(gallery, queries, scores, seed=0)["mean"]) == {}


# --- gallery and queries ----------------------------------------------------------------------------------------------


def test_the_gallery_holds_each_clean_photo_with_its_person(four_queries):
    built = build_gallery(MeanColour(), four_queries, as_float, "cpu", template="best", made_by={"epoch": 3})
    assert built.persons == ["ann", "bob"] and built.labels.tolist() == [0, 0, 1]
    assert (built.template, built.made_by) == ("best", {"epoch": 3})
    names = ["ann/clean/1.png", "ann/clean/2.png", "bob/clean/1.png"]
    assert built.paths == [four_queries / name for name in names]
    five = math.sqrt(5)
    expected = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [2 / five, 0.0, 1 / five]]
    torch.testing.assert_close(built.embeddings, torch.tensor(expected))


def test_one_pass_over_a_split_gives_the_gallery_and_queries_of_two_whatever_batches_and_workers(random_colours):
    gallery, queries = embed_split(
        Rating(), random_colours, as_float, "cpu", template="mean", batch_size=7, num_workers=2
    )
    built = build_gallery(Rating(), random_colours, as_float, "cpu", batch_size=1)
    separate = embed_queries(Rating(), built, random_colours, as_float, "cpu")
    for one, other in ((gallery, built), (queries, separate)):
        assert vars(one).keys() == vars(other).keys()
        for name, value in vars(one).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, getattr(other, name))
            else:
                assert value == getattr(other, name), name


def test_a_list_of_persons_takes_the_place_of_a_folder(random_colours):
    chosen = [person for person in scan_persons(random_colours) if person.name in ("p1", "p4")]
    gallery, queries, details = retrieved(chosen)
    assert gallery.persons == ["p1", "p4"] and set(queries.persons) == {"p1", "p4"}
    assert {path.parts[-3] for path in gallery.paths} == {"p1", "p4"}
    assert details["queries"] == sum(len(person.distorted) for person in chosen) and details["not_enrolled"] == 0


def test_a_query_whose_person_is_not_in_the_gallery_counts_as_wrong_and_is_reported(four_queries, caplog):
    write_plain(four_queries / "cy" / "distortion" / "1_foggy.png", (0, 0, 200))  # no clean photo
    gallery, _, details = retrieved(four_queries)
    assert gallery.persons == ["ann", "bob"]
    assert details["top1"] == {"mean": 2 / 5, "best": 3 / 5}
    assert (details["not_enrolled"], details["queries"], details["persons"]) == (1, 5, 2)
    assert details["per_kind"]["foggy"] == {"queries": 3, "top1": {"mean": 1 / 3, "best": 2 / 3}}
    assert f"{four_queries}: 1 of 5 queries show persons outside the gallery: they count as wrong" in caplog.messages


def test_files_that_cannot_be_read_are_left_out_by_the_scan_or_stop_the_embedding(four_queries):
    (four_queries / "ann" / "clean" / "3.png").write_bytes(b"no picture")
    (four_queries / "ann" / "distortion" / "3_foggy.png").write_bytes(b"no picture")
    gallery, queries, _ = retrieved(four_queries)
    assert (len(gallery.paths), len(queries.paths)) == (3, 4)
    with pytest.raises(UserError, match=r"ann/clean/3\.png: cannot be read as an image"):
        retrieved(scan_persons(four_queries, check_images=False))


@pytest.mark.parametrize(
    "photo, message",
    [
        ("ann/clean/1.png", "{root}: no distorted photo to query with; expected {root}/<person>/distortion/*.jpg"),
        ("ann/distortion/1_foggy.png", "{root}: no clean photo for a gallery; expected {root}/<person>/clean/*.jpg"),
    ],
)
def test_a_split_without_clean_or_without_distorted_photos_is_an_error(tmp_path, photo, message):
    write_plain(tmp_path / photo, (9, 9, 9))
    with pytest.raises(UserError) as error:
        retrieved(tmp_path)
    assert str(error.value).startswith(message.format(root=tmp_path))


def test_an_unknown_template_is_refused_before_any_photo_is_embedded():
    for call in (build_gallery, embed_split):
        with pytest.raises(UserError, match="TEMPLATE = 'median': expected one of 'mean', 'best'"):
            call(None, "", None, "cpu", template="median")


def test_means_of_persons_are_those_of_their_unit_embeddings_with_their_places_in_the_list(tmp_path):
    write_plain(tmp_path / "ann/clean/1.png", (200, 0, 0))
    write_plain(tmp_path / "ann/clean/2.png", (0, 100, 0))
    write_plain(tmp_path / "bob/clean/1.png", (0, 0, 50))
    write_plain(tmp_path / "dee/distortion/1_foggy.png", (9, 9, 9))  # no clean photo
    ann, bob, dee = scan_persons(tmp_path)
    means, places = person_means(MeanColour(), [bob, dee, ann], as_float, "cpu")
    found = dict(zip(places.tolist(), means, strict=True))
    assert found.keys() == {0, 2}
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(found[2], torch.tensor([0.5, 0.5, 0.0]).sqrt())


# --- answers ----------------------------------------------------------------------------------------------------------


def test_four_queries_worked_out_by_hand(four_queries):
    _, _, details = retrieved(four_queries)
    assert details["top1"] == {"mean": 0.5, "best": 0.75}
    assert details["per_kind"] == {
        "foggy": {"queries": 2, "top1": {"mean": 0.5, "best": 1.0}},
        "rainy": {"queries": 1, "top1": {"mean": 0.0, "best": 0.0}},
        "sunny": {"queries": 1, "top1": {"mean": 1.0, "best": 1.0}},
    }
    assert details["per_person"] == {
        "ann": {"queries": 2, "top1": {"mean": 0.5, "best": 1.0}},
        "bob": {"queries": 2, "top1": {"mean": 0.5, "best": 0.5}},
    }
    sizes = {key: details[key] for key in ("template", "persons", "photos", "queries", "not_enrolled")}
    assert sizes == {"template": "mean", "persons": 2, "photos": 3, "queries": 4, "not_enrolled": 0}
    assert details["persons_without_query"] == 0
    torch.testing.assert_close(details["embeddings"][2], torch.tensor([2.0, 0.0, 1.0]) / math.sqrt(5))
    foggy, norm = details["per_query"][0], math.hypot(255, 20)
    assert foggy["path"] == str(four_queries / "ann/distortion/1_foggy.png")
    assert (foggy["kind"], foggy["person"]) == ("foggy", "ann")
    bob = 255 * 2 / math.sqrt(5) / norm  # 0.892; ann's mean: 275 / sqrt(2) / norm = 0.760
    assert foggy["mean"] == {"predicted": "bob", "score": pytest.approx(bob, abs=1e-6), "rank": 2}
    assert foggy["best"] == {"predicted": "ann", "score": pytest.approx(255 / norm, abs=1e-6), "rank": 1}


@pytest.mark.parametrize("template, accuracy", [("mean", 0.5), ("best", 0.75)])
def test_evaluate_gives_the_accuracy_under_the_gallerys_template_and_the_details_of_same(
    four_queries, template, accuracy
):
    gallery, _, details = retrieved(four_queries, "same", template)
    found = evaluate(MeanColour(), gallery, four_queries, as_float, "cpu")
    assert found[0] == accuracy == found[1]["top1"][template] and found[1]["template"] == template
    assert found[1]["per_query"] == details["per_query"]


# --- protocols --------------------------------------------------------------------------------------------------------


def unit(vector) -> list[float]:
    norm = math.sqrt(sum(value * value for value in vector))
    return [value / norm for value in vector]


def brute_force(root: Path, protocol: str, template: str) -> list[tuple[str, str, str, str, float]]:
    """(path, kind, person, predicted, score) of each query, with lists and loops over the files."""
    clean = {folder.name: sorted((folder / "clean").iterdir()) for folder in sorted(root.iterdir())}
    answers = []
    for path in sorted(root.glob("*/clean/*.png" if protocol == "clean" else "*/distortion/*.png")):
        own, source = path.parts[-3], path.stem.split("_")[0]
        if protocol != "same" and len(clean[own]) == 1:
            continue
        query, scores = unit(Image.open(path).getpixel((0, 0))), []
        for person, photos in clean.items():
            left = [photo for photo in photos if protocol == "same" or person != own or photo.stem != source]
            rows = [unit(Image.open(photo).getpixel((0, 0))) for photo in left]
            if template == "mean":
                rows = [unit([sum(column) for column in zip(*rows, strict=True)])]
            scores.append((max(sum(a * b for a, b in zip(query, row, strict=True)) for row in rows), person))
        kind = "clean" if protocol == "clean" else path.stem.split("_")[1]
        answers.append((str(path), kind, own, max(scores)[1], max(scores)[0]))
    return answers


@pytest.mark.parametrize("template", ["mean", "best"])
@pytest.mark.parametrize("protocol", ["same", "cross", "clean"])
def test_every_protocol_equals_a_brute_force_over_the_files(random_colours, protocol, template):
    _, queries, details = retrieved(random_colours, protocol, template)
    answers = brute_force(random_colours, protocol, template)
    right = [person == predicted for _, _, person, predicted, _ in answers]
    assert 0 < sum(right) < len(right)  # the tree decides something
    assert details["top1"][template] == pytest.approx(sum(right) / len(right))
    for query, (path, kind, person, predicted, cosine) in zip(details["per_query"], answers, strict=True):
        assert (query["path"], query["kind"], query["person"]) == (path, kind, person)
        answer = query[template]
        assert (answer["predicted"], answer["score"]) == (predicted, pytest.approx(cosine, abs=1e-5))
        assert (answer["rank"] == 1) == (predicted == person)
    for kind, figures in details["per_kind"].items():
        of_kind = [hit for hit, answer in zip(right, answers, strict=True) if answer[1] == kind]
        assert figures["queries"] == len(of_kind)
        assert figures["top1"][template] == pytest.approx(sum(of_kind) / len(of_kind))
    left_out = 6 - len({person for _, _, person, _, _ in answers})
    assert (left_out > 0) == (protocol != "same")  # persons of one photo, who stay in the gallery
    assert (details["persons"], details["persons_without_query"]) == (6, left_out)
    assert (queries.sources >= 0).all() == (protocol != "same")


def test_under_cross_a_query_of_unknown_source_is_matched_against_all_photos(tmp_path):
    write_plain(tmp_path / "ann" / "clean" / "1.png", (200, 0, 0))
    write_plain(tmp_path / "bob" / "clean" / "1.png", (0, 200, 0))
    write_plain(tmp_path / "ann" / "distortion" / "7_foggy.png", (90, 5, 0))
    _, queries, details = retrieved(tmp_path, "cross")
    assert queries.sources.tolist() == [-1] and details["top1"]["mean"] == 1.0


@pytest.mark.parametrize(
    "protocol, who", [("cross", "no person with a distorted photo"), ("clean", "no person")], ids=["cross", "clean"]
)
def test_a_protocol_in_which_no_person_has_a_second_photo_has_no_queries(tmp_path, protocol, who):
    write_plain(tmp_path / "ann" / "clean" / "1.png", (200, 0, 0))
    write_plain(tmp_path / "ann" / "distortion" / "1_foggy.png", (90, 0, 0))
    with pytest.raises(NoQueries, match=f"protocol '{protocol}': no query, as {who} has a second clean photo"):
        retrieved(tmp_path, protocol)


def test_an_unknown_protocol_is_an_error_that_lists_the_known_ones(four_queries):
    with pytest.raises(UserError, match="protocol 'all': expected one of 'same', 'cross', 'clean'"):
        retrieved(four_queries, "all")


# --- figures by kind --------------------------------------------------------------------------------------------------


def test_groups_are_the_kinds_and_all_and_what_is_left_without_sunny(four_queries):
    _, queries, _ = retrieved(four_queries)
    assert {name: rows.tolist() for name, rows in queries.groups().items()} == {
        "foggy": [0, 2],
        "rainy": [3],
        "sunny": [1],
        "without sunny": [0, 2, 3],
        "all": [0, 1, 2, 3],
    }
    assert set(queries.subset(torch.tensor([1])).groups()) == {"sunny", "all"}


def test_a_kind_is_what_follows_the_name_of_its_clean_photo(tmp_path):
    kinds = {
        "a_1_motion_blur": "motion_blur",
        "a_1_gaussian_blur": "gaussian_blur",
        "a_1_3": "3",
        "a_1-Blurred": "blurred",
        "a_1 (2)": "(2)",
        "a_10_blurred": "blurred",  # not of a_1
        "a_1": "unknown",
    }
    for name in ("clean/a_1", *(f"distortion/{name}" for name in kinds)):
        write_plain(tmp_path / "ann" / f"{name}.png", (200, 0, 0))
    queries = embed_split(MeanColour(), tmp_path, as_float, "cpu", template="mean")[1]
    stems = [path.stem for path in queries.paths]
    assert dict(zip(stems, queries.kinds, strict=True)) == kinds
    assert [stem for stem, row in zip(stems, queries.sources.tolist(), strict=True) if row < 0] == ["a_10_blurred"]


def test_no_kind_takes_the_name_of_a_figure_or_of_another_group(four_queries):
    for name in ("all", "mean", "best", "same", "cross", "clean", "other", "kind all", "without sunny", "x\x1b[31m"):
        write_plain(four_queries / "bob" / "distortion" / f"1_{name}.png", (9, 0, 9))
    _, queries, details = retrieved(four_queries)
    taken = ("all", "mean", "best", "same", "cross", "clean", "other", "kind all", "without sunny")
    expected = {"foggy", "rainy", "sunny", r"x\x1b[31m", *(f"kind {name}" for name in taken)}
    assert set(details["per_kind"]) == expected
    groups = queries.groups()
    assert set(groups) == expected | {"all", "without sunny"}
    assert len(groups["all"]) == 14 and len(groups["kind all"]) == len(groups["kind without sunny"]) == 1


def test_kinds_without_number_are_reported_with_examples_and_counted_together(tmp_path, caplog):
    write_plain(tmp_path / "ann" / "clean" / "a.png", (200, 0, 0))
    for kind in range(20):
        for copy in ("", "b")[: 1 + (kind < 19)]:
            write_plain(tmp_path / "ann" / "distortion" / f"a{copy}_kind{kind:02}.png", (200, 0, 0))
    assert len(set(retrieved(tmp_path)[1].kinds)) == 20 and not caplog.messages
    for number in range(43):  # a kind for each photo
        write_plain(tmp_path / "ann" / "distortion" / f"IMG_2023_1011{number:02}-blurred.png", (200, 0, 0))
    _, queries, details = retrieved(tmp_path)
    assert sorted(details["per_kind"]) == [*(f"kind{kind:02}" for kind in range(19)), "other"]
    assert details["per_kind"]["other"]["queries"] == 44 and len(queries.groups()) == 21
    [message] = caplog.messages
    assert message.startswith(f"{tmp_path}: 63 kinds by the names of the distorted photos")
    assert "such as 101100-blurred, 101101-blurred, " in message and "and 39 more; the 19 most frequent" in message


def test_figures_of_a_group_are_those_of_its_queries(random_colours):
    gallery, queries, details = retrieved(random_colours)
    measured = measure(gallery, queries, score(gallery, queries), seed=0)
    for template, groups in measured.items():
        assert groups["all"].figures["rank-1"]["value"] == pytest.approx(details["top1"][template])
        for kind, figures in details["per_kind"].items():
            assert groups[kind].figures["rank-1"]["value"] == pytest.approx(figures["top1"][template])
            rows = queries.groups()[kind]
            assert torch.equal(groups[kind].values["mAP"], groups["all"].values["mAP"][rows])
    assert torch.equal(measured["mean"]["all"].values["mAP"], measured["best"]["all"].values["mAP"])


def test_a_figure_of_strangers_only_is_none_and_not_nan():
    """400 queries of 20 enrolled persons, so that the open set is measured, and 10 of a stranger, of another kind."""
    generator = torch.Generator().manual_seed(0)
    embeddings = nn.functional.normalize(torch.randn(430, 8, generator=generator))
    truth = torch.cat([torch.arange(20).repeat(20), torch.full((10,), -1)])
    gallery = Gallery(embeddings[:20], torch.arange(20), [f"p{i:02}" for i in range(20)], [Path("x")] * 20, "mean")
    queries = Queries(
        embeddings=embeddings[20:],
        truth=truth,
        sources=torch.full_like(truth, -1),
        paths=[Path("q")] * 410,
        persons=[f"p{i:02}" if i >= 0 else "eve" for i in truth.tolist()],
        kinds=["foggy"] * 400 + ["odd"] * 10,
    )
    measured = measure(gallery, queries, score(gallery, queries), seed=0)["mean"]
    assert measured["all"].figures["DIR@FPIR=0.1"]["value"] is not None
    none = {"value": None, "low": None, "high": None}
    assert measured["odd"].figures["DIR@FPIR=0.1"] == measured["odd"].figures["FPIR of 0.1"] == none
    difference = metrics.compare(measured["odd"], measured["odd"], queries.person_index()[400:], seed=0)
    assert difference["DIR@FPIR=0.1"] == none
    json.dumps([of_group.figures for of_group in measured.values()], allow_nan=False)
