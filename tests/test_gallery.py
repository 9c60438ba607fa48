"""Retrieval, on trees whose answers can be worked out by hand or by a loop over the files."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyNet
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import gallery
from common import UserError
from gallery import (
    Gallery,
    Queries,
    build_gallery,
    embed,
    embed_queries,
    evaluate,
    measure,
    person_means,
    retrieve,
    select_queries,
    summary,
    validate,
)
from transforms import eval_transform


class MeanColour(nn.Module):
    """(B, 3, H, W) -> (B, 3), an image's mean colour: its embedding is that vector over its norm."""

    def forward(self, images):
        return images.mean((2, 3))


def as_float(image: Image.Image) -> torch.Tensor:
    return pil_to_tensor(image).float()


def write(path: Path, colour) -> Path:
    """A photo of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), tuple(int(value) for value in colour)).save(path)
    return path


def built_and_evaluated(root: Path, model=None, template="mean", gallery_options=None, **options):
    """build_gallery and evaluate, both on `root`."""
    model = model or MeanColour()
    built = build_gallery(model, root, as_float, "cpu", template=template, **(gallery_options or options))
    return built, *evaluate(model, built, root, as_float, "cpu", **options)


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
        write(tmp_path / "val" / name, colour)
    return tmp_path / "val"


@pytest.fixture
def random_colours(tmp_path) -> Path:
    """6 persons of 1 to 4 clean photos and 1 to 9 distorted ones, of random colours: right answers and wrong ones."""
    random = np.random.default_rng(7)
    for p in range(6):
        colour = random.integers(60, 200, 3)
        for k in range(random.integers(1, 5)):
            write(tmp_path / "val" / f"p{p}" / "clean" / f"{k}.png", colour + random.integers(-60, 55, 3))
            for kind in ("blurred", "foggy", "sunny")[: random.integers(1, 4)]:
                copy = colour + random.integers(-60, 55, 3)
                write(tmp_path / "val" / f"p{p}" / "distortion" / f"{k}_{kind}.png", copy)
    return tmp_path / "val"


# --- templates --------------------------------------------------------------------------------------------------------


def by_hand(template: str = "mean") -> Gallery:
    """Ann at 0 and 90 degrees, bob at 180, cy at the angle whose cosine is 0.6 and at 0."""
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8], [1.0, 0.0]])
    paths = [Path(f"{number}.png") for number in range(5)]
    return Gallery(rows, torch.tensor([0, 0, 1, 2, 2]), ["ann", "bob", "cy"], paths, template)


def test_the_mean_template_is_one_renormalised_row_per_person():
    rows, labels = by_hand().templates("mean")
    assert labels.tolist() == [0, 1, 2]
    half, cy = math.sqrt(0.5), math.sqrt(1.6**2 + 0.8**2)
    torch.testing.assert_close(rows, torch.tensor([[half, half], [-1.0, 0.0], [1.6 / cy, 0.8 / cy]]))


def test_the_best_template_is_every_photo():
    rows, labels = by_hand().templates("best")
    assert rows.tolist() == by_hand().embeddings.tolist() and labels.tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    "call", [by_hand().templates, lambda template: build_gallery(None, "", None, "cpu", template=template)]
)
def test_an_unknown_template_is_refused_with_the_known_ones(call):
    with pytest.raises(ValueError, match="TEMPLATE = 'median': expected one of 'mean', 'best'"):
        call("median")


# --- embed ------------------------------------------------------------------------------------------------------------


def test_embeddings_are_unit_rows_in_the_order_of_the_paths(tmp_path):
    paths = [write(tmp_path / "b.png", (30, 40, 0)), write(tmp_path / "a.png", (0, 0, 7))]
    rows = embed(MeanColour(), paths, as_float, "cpu", batch_size=1).embeddings
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]))


def test_embedding_a_photo_twice_gives_the_same_and_leaves_the_networks_state(random_colours):
    torch.manual_seed(0)
    model = TinyNet().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    paths = sorted(random_colours.glob("*/clean/*.png"))
    first, second = (embed(model, paths, as_float, "cpu").embeddings for _ in range(2))
    assert torch.equal(first, second)  # no dropout
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # BatchNorm's statistics among them


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_network_is_put_back(random_colours, training):
    modes = []

    class Watched(MeanColour):
        def forward(self, images):
            modes.append(self.training)
            return super().forward(images)

    model = Watched().train(training)
    built_and_evaluated(random_colours, model)
    assert set(modes) == {False} and model.training == training


def test_a_layer_frozen_in_eval_mode_stays_frozen(random_colours):
    model = TinyNet().train()
    model.backbone[1].eval()  # as FREEZE_BATCHNORM does
    embed(model, sorted(random_colours.glob("p0/clean/*.png")), as_float, "cpu")
    assert model.training and model.backbone[5].training and not model.backbone[1].training


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_network_is_put_back_after_a_failure_too(tmp_path, training):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    model = TinyNet().train(training)
    with pytest.raises(UserError, match=r"broken\.jpg: cannot be read as an image"):
        embed(model, [tmp_path / "broken.jpg"], as_float, "cpu")
    assert model.training == training


class DivergesOnWhite(MeanColour):
    """NaN for a white photo."""

    def forward(self, images):
        colours = super().forward(images)
        return torch.where(colours.sum(1, keepdim=True) > 764, math.nan, colours)


class Rating(MeanColour):
    """Rates a photo by its brightness."""

    rates = True

    def forward(self, images, part="both"):
        colour = super().forward(images)
        return (colour, colour.sum(1)) if part == "rated" else colour


def test_photos_are_rated_where_the_model_does_it_through_gallery_queries_and_answers(four_queries):
    built = build_gallery(Rating(), four_queries, as_float, "cpu")
    assert built.quality.tolist() == [200, 200, 300]
    assert torch.equal(built.weighted, built.embeddings * torch.tensor([[200.0], [200.0], [300.0]]))
    queries = embed_queries(Rating(), built, four_queries, as_float, "cpu", batch_size=3)
    assert queries.quality.tolist() == [275, 210, 150, 110]
    assert select_queries(built, queries, "cross").quality.tolist() == [275, 210]  # bob has one photo
    assert select_queries(built, None, "clean").quality.tolist() == [200, 200]
    details = retrieve(built, queries)
    assert [query["quality"] for query in details["per_query"]] == [275, 210, 150, 110]
    same = select_queries(built, queries, "same")
    left = gallery.discard_curves(same, gallery.measure(built, same, 0)["best"])
    assert {group: counts.tolist() for group, counts in left.items()} == {
        **{"foggy": [0, 0, 0], "rainy": [1, 0], "sunny": [0, 0]},  # the darkest is the one that is wrong
        **{"without sunny": [1, 0, 0, 0], "all": [1, 0, 0, 0, 0]},
    }
    unrated = build_gallery(MeanColour(), four_queries, as_float, "cpu")
    asking = embed_queries(MeanColour(), unrated, four_queries, as_float, "cpu")
    assert unrated.quality is None and asking.quality is None and torch.equal(unrated.weighted, unrated.embeddings)
    assert gallery.discard_curves(asking, gallery.measure(unrated, asking, 0)["best"]) == {}
    assert (
        select_queries(unrated, None, "clean").quality is None
        and select_queries(unrated, asking, "cross").quality is None
    )
    assert [query["quality"] for query in retrieve(unrated, asking)["per_query"]] == [None] * 4


def test_an_embedding_that_is_not_finite_is_an_error_naming_its_photo(tmp_path):
    paths = [write(tmp_path / f"{number}.png", (9 * number, 9, 9)) for number in range(5)]
    write(paths[2], (255, 255, 255))
    write(paths[4], (255, 255, 255))
    with pytest.raises(ValueError, match="its embedding is not finite") as e:
        embed(DivergesOnWhite(), paths, as_float, "cpu", batch_size=2)
    assert str(e.value).startswith(f"{paths[2]}: ")


# --- build_gallery and evaluate ---------------------------------------------------------------------------------------


def test_the_gallery_holds_each_clean_photo_with_its_person(four_queries):
    built, _, _ = built_and_evaluated(four_queries)
    assert built.persons == ["ann", "bob"] and built.labels.tolist() == [0, 0, 1]
    assert [str(path.relative_to(four_queries)) for path in built.paths] == [
        "ann/clean/1.png",
        "ann/clean/2.png",
        "bob/clean/1.png",
    ]
    five = math.sqrt(5)
    expected = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [2 / five, 0.0, 1 / five]]
    torch.testing.assert_close(built.embeddings, torch.tensor(expected))


def test_four_queries_worked_out_by_hand(four_queries):
    _, top1, details = built_and_evaluated(four_queries)
    assert top1 == 0.5 and details["top1"] == {"mean": 0.5, "best": 0.75}
    assert details["per_kind"] == {
        "foggy": {"queries": 2, "top1": {"mean": 0.5, "best": 1.0}},
        "rainy": {"queries": 1, "top1": {"mean": 0.0, "best": 0.0}},
        "sunny": {"queries": 1, "top1": {"mean": 1.0, "best": 1.0}},
    }
    sizes = {key: details[key] for key in ("template", "persons", "photos", "queries", "not_enrolled")}
    assert sizes == {"template": "mean", "persons": 2, "photos": 3, "queries": 4, "not_enrolled": 0}
    torch.testing.assert_close(details["embeddings"][2], torch.tensor([2.0, 0.0, 1.0]) / math.sqrt(5))


def test_mean_and_best_may_name_different_persons(four_queries):
    foggy = built_and_evaluated(four_queries)[2]["per_query"][0]
    assert foggy["path"] == str(four_queries / "ann/distortion/1_foggy.png")
    assert (foggy["kind"], foggy["person"]) == ("foggy", "ann")
    norm = math.hypot(255, 20)
    to_bob = 255 * 2 / math.sqrt(5) / norm  # 0.892; ann's mean: 275 / sqrt(2) / norm = 0.760
    assert foggy["mean"] == {"predicted": "bob", "score": pytest.approx(to_bob, abs=1e-6), "rank": 2}
    assert foggy["best"] == {"predicted": "ann", "score": pytest.approx(255 / norm, abs=1e-6), "rank": 1}


@pytest.mark.parametrize("template, expected", [("mean", 0.5), ("best", 0.75)])
def test_the_first_result_is_the_share_under_the_gallerys_template(four_queries, template, expected):
    model = MeanColour()
    built = build_gallery(model, four_queries, as_float, "cpu", template=template)
    acc, _ = evaluate(model, built, four_queries, as_float, "cpu")
    details = evaluate(model, built, four_queries, as_float, "cpu")[1]
    assert acc == expected == details["top1"][template] and details["template"] == template


def unit(vector) -> list[float]:
    norm = math.sqrt(sum(value * value for value in vector))
    return [value / norm for value in vector]


def colour_direction(path: Path) -> list[float]:
    return unit(Image.open(path).getpixel((0, 0)))


def brute_force(root: Path, template: str) -> list[tuple[str, str, str, str, float]]:
    """(path, kind, person, predicted, score) of every distorted photo, with lists and loops."""
    rows = []  # (person, direction)
    for folder in sorted(root.iterdir()):
        photos = [colour_direction(path) for path in sorted((folder / "clean").iterdir())]
        if template == "mean":
            photos = [unit([sum(column) for column in zip(*photos, strict=True)])]
        rows += [(folder.name, photo) for photo in photos]
    answers = []
    for path in sorted(root.glob("*/distortion/*.png")):
        query = colour_direction(path)
        scores = [(sum(a * b for a, b in zip(query, row, strict=True)), person) for person, row in rows]
        score, predicted = max(scores)
        answers.append((str(path), path.stem.split("_")[1], path.parts[-3], predicted, score))
    return answers


@pytest.mark.parametrize("template", ["mean", "best"])
def test_evaluate_equals_a_brute_force_over_the_files(random_colours, template):
    _, top1, details = built_and_evaluated(random_colours, template=template)
    answers = brute_force(random_colours, template)
    right = [person == predicted for _, _, person, predicted, _ in answers]
    assert 0 < sum(right) < len(right)  # the tree decides something
    assert top1 == pytest.approx(sum(right) / len(right))
    assert details["queries"] == len(answers)
    for query, (path, kind, person, predicted, score) in zip(details["per_query"], answers, strict=True):
        assert (query["path"], query["kind"], query["person"]) == (path, kind, person)
        answer = query[template]
        assert (answer["predicted"], answer["score"]) == (predicted, pytest.approx(score, abs=1e-5))
        assert (answer["rank"] == 1) == (predicted == person)
    assert set(details["per_kind"]) == {"blurred", "foggy", "sunny"}
    for kind, figures in details["per_kind"].items():
        of_kind = [hit for hit, answer in zip(right, answers, strict=True) if answer[1] == kind]
        assert figures["queries"] == len(of_kind)
        assert figures["top1"][template] == pytest.approx(sum(of_kind) / len(of_kind))


# --- protocols --------------------------------------------------------------------------------------------------------


def asked(root: Path, protocol: str, template: str = "mean", model=None) -> tuple[Queries, dict]:
    model = model or MeanColour()
    built = build_gallery(model, root, as_float, "cpu", template=template)
    queries = select_queries(built, embed_queries(model, built, root, as_float, "cpu"), protocol)
    return queries, retrieve(built, queries)


def cross_by_hand(root: Path, template: str) -> dict[str, str]:
    """Query -> predicted person, of every distorted photo whose person has another clean photo than its source."""
    clean = {folder.name: sorted((folder / "clean").iterdir()) for folder in sorted(root.iterdir())}
    answers = {}
    for path in sorted(root.glob("*/distortion/*.png")):
        own, source = path.parts[-3], path.stem.split("_")[0]
        if len(clean[own]) == 1:
            continue
        scores = []
        for person, photos in clean.items():
            left = [photo for photo in photos if person != own or photo.stem != source]
            rows = [colour_direction(photo) for photo in left]
            if template == "mean":
                rows = [unit([sum(column) for column in zip(*rows, strict=True)])]
            query = colour_direction(path)
            scores.append((max(sum(a * b for a, b in zip(query, row, strict=True)) for row in rows), person))
        answers[str(path)] = max(scores)[1]
    return answers


@pytest.mark.parametrize("template", ["mean", "best"])
def test_cross_equals_a_brute_force_that_leaves_out_each_querys_source(random_colours, template):
    queries, details = asked(random_colours, "cross", template)
    expected = cross_by_hand(random_colours, template)
    assert {query["path"]: query[template]["predicted"] for query in details["per_query"]} == expected
    assert 0 < details["queries"] < len(list(random_colours.glob("*/distortion/*.png")))  # some persons have one photo
    assert details["persons"] == 6  # and stay in the gallery
    asking = {query["person"] for query in details["per_query"]}
    assert details["persons_without_query"] == 6 - len(asking) > 0
    same = {q["path"]: q[template]["predicted"] for q in asked(random_colours, "same", template)[1]["per_query"]}
    assert any(same[path] != person for path, person in expected.items())  # the protocol decides something
    assert (queries.sources >= 0).all()


@pytest.mark.parametrize("template", ["mean", "best"])
def test_clean_asks_each_photo_of_persons_with_several_against_the_others(random_colours, template):
    queries, details = asked(random_colours, "clean", template)
    several = [f for f in sorted(random_colours.iterdir()) if len(list((f / "clean").iterdir())) > 1]
    photos = [photo for folder in several for photo in sorted((folder / "clean").iterdir())]
    assert queries.paths == photos and set(queries.kinds) == {"clean"}
    for query, photo in zip(details["per_query"], photos, strict=True):
        scores = []
        for folder in sorted(random_colours.iterdir()):
            rows = [colour_direction(other) for other in sorted((folder / "clean").iterdir()) if other != photo]
            if template == "mean":
                rows = [unit([sum(column) for column in zip(*rows, strict=True)])]
            own = colour_direction(photo)
            scores.append((max(sum(a * b for a, b in zip(own, row, strict=True)) for row in rows), folder.name))
        assert query[template]["predicted"] == max(scores)[1]
        assert query[template]["score"] == pytest.approx(max(scores)[0], abs=1e-5)


def test_a_network_that_knows_photos_only_shines_under_same_and_fails_under_cross(tmp_path):
    random = np.random.default_rng(3)  # every photo has a colour of its own, whoever is on it
    for person in range(8):
        for number in range(2):
            colour = random.integers(40, 250, 3)
            write(tmp_path / f"p{person}" / "clean" / f"{number}.png", colour)
            write(tmp_path / f"p{person}" / "distortion" / f"{number}_foggy.png", colour * 0.5)
    assert asked(tmp_path, "same", "best")[1]["top1"]["best"] >= 0.9
    assert asked(tmp_path, "cross", "best")[1]["top1"]["best"] <= 0.4


def test_a_query_of_unknown_source_asks_against_all_photos_under_cross(tmp_path):
    write(tmp_path / "ann" / "clean" / "1.png", (200, 0, 0))
    write(tmp_path / "bob" / "clean" / "1.png", (0, 200, 0))
    write(tmp_path / "ann" / "distortion" / "7_foggy.png", (90, 5, 0))
    queries, details = asked(tmp_path, "cross")
    assert queries.sources.tolist() == [-1] and details["top1"]["mean"] == 1.0


@pytest.mark.parametrize("protocol", ["cross", "clean"])
def test_a_protocol_in_which_nobody_has_a_second_photo_says_so(tmp_path, protocol):
    write(tmp_path / "ann" / "clean" / "1.png", (200, 0, 0))
    write(tmp_path / "ann" / "distortion" / "1_foggy.png", (90, 0, 0))
    with pytest.raises(ValueError, match=f"PROTOCOL '{protocol}': no query, for nobody who has a second"):
        asked(tmp_path, protocol)


def test_an_unknown_protocol_is_named(four_queries):
    with pytest.raises(ValueError, match="PROTOCOL 'all': expected one of 'same', 'cross', 'clean'"):
        asked(four_queries, "all")


def test_groups_are_the_kinds_and_all_and_what_is_left_without_sunny(four_queries):
    queries, _ = asked(four_queries, "same")
    assert {name: rows.tolist() for name, rows in queries.groups().items()} == {
        "foggy": [0, 2],
        "rainy": [3],
        "sunny": [1],
        "without sunny": [0, 2, 3],
        "all": [0, 1, 2, 3],
    }
    assert set(queries.subset(torch.tensor([1])).groups()) == {"sunny", "all"}


def test_figures_of_a_group_are_those_of_its_queries_alone(random_colours):
    model = MeanColour()
    built = build_gallery(model, random_colours, as_float, "cpu")
    queries = select_queries(built, embed_queries(model, built, random_colours, as_float, "cpu"), "same")
    measured, details = measure(built, queries, seed=0), retrieve(built, queries)
    for template in ("mean", "best"):
        for kind, figures in details["per_kind"].items():
            assert measured[template][kind].figures["rank-1"]["value"] == pytest.approx(figures["top1"][template])
        assert measured[template]["all"].figures["rank-1"]["value"] == pytest.approx(details["top1"][template])


def test_results_do_not_depend_on_batches_or_workers(random_colours):
    _, top1, details = built_and_evaluated(random_colours)
    for options in ({"batch_size": 1}, {"batch_size": 7, "num_workers": 2}):
        _, other_top1, other = built_and_evaluated(random_colours, **options)
        assert other_top1 == top1 and other["per_kind"] == details["per_kind"]
        torch.testing.assert_close(other["embeddings"], details["embeddings"])


class Constant(nn.Module):
    """The same embedding for whatever photo."""

    def forward(self, images):
        return torch.nn.functional.normalize(torch.arange(1.0, 129.0), dim=0).expand(len(images), -1)


@pytest.mark.parametrize("template", ["mean", "best"])
def test_a_network_that_sees_nothing_gets_the_share_of_the_first_person(random_colours, template):
    persons = [path.parts[-3] for path in random_colours.glob("*/distortion/*.png")]
    _, top1, details = built_and_evaluated(random_colours, Constant(), template)
    assert {query[template]["predicted"] for query in details["per_query"]} == {"p0"}
    assert top1 == pytest.approx(persons.count("p0") / len(persons))


def test_a_person_without_a_clean_photo_counts_as_wrong_and_is_told(four_queries, caplog):
    write(four_queries / "cy" / "distortion" / "1_foggy.png", (0, 0, 200))
    built, top1, details = built_and_evaluated(four_queries)
    assert built.persons == ["ann", "bob"]
    assert top1 == 2 / 5 and details["top1"]["best"] == 3 / 5
    assert (details["not_enrolled"], details["queries"], details["persons"]) == (1, 5, 2)
    assert details["per_kind"]["foggy"] == {"queries": 3, "top1": {"mean": 1 / 3, "best": 2 / 3}}
    assert f"{four_queries}: 1 of 5 queries are of persons outside the gallery: counted as wrong" in caplog.messages


def test_a_person_left_out_of_the_gallery_alone_counts_as_wrong(four_queries):
    built, top1, details = built_and_evaluated(four_queries, gallery_options={"persons": ["bob"]})
    assert built.persons == ["bob"]
    assert {query["mean"]["predicted"] for query in details["per_query"]} == {"bob"}
    assert details["not_enrolled"] == 2 and top1 == 0.5


def test_persons_restrict_gallery_and_queries(random_colours):
    chosen = ["p4", "p1"]
    built, _, details = built_and_evaluated(random_colours, persons=chosen)
    assert built.persons == ["p1", "p4"]
    assert {path.parts[-3] for path in built.paths} == {"p1", "p4"}
    assert {query["person"] for query in details["per_query"]} == {"p1", "p4"}
    assert details["queries"] == sum(len(list(random_colours.glob(f"{name}/distortion/*"))) for name in chosen)
    assert details["not_enrolled"] == 0


def test_without_a_distorted_photo_there_is_nothing_to_evaluate(tmp_path):
    write(tmp_path / "ann" / "clean" / "1.png", (9, 9, 9))
    with pytest.raises(ValueError, match="no distorted photo to ask the gallery; expected") as e:
        built_and_evaluated(tmp_path)
    assert str(e.value).startswith(f"{tmp_path}: ") and f"{tmp_path}/<person>/distortion/*.jpg" in str(e.value)


def test_without_a_clean_photo_there_is_no_gallery(tmp_path):
    write(tmp_path / "ann" / "distortion" / "1_foggy.png", (9, 9, 9))
    with pytest.raises(ValueError, match="no clean photo to build a gallery from; expected") as e:
        built_and_evaluated(tmp_path)
    assert str(e.value).startswith(f"{tmp_path}: ") and f"{tmp_path}/<person>/clean/*.jpg" in str(e.value)


def test_broken_files_are_left_out_of_gallery_and_queries(four_queries):
    (four_queries / "ann" / "clean" / "3.png").write_bytes(b"no picture")
    (four_queries / "ann" / "distortion" / "3_foggy.png").write_bytes(b"no picture")
    built, top1, details = built_and_evaluated(four_queries)
    assert (len(built.paths), details["queries"], top1) == (3, 4, 0.5)
    with pytest.raises(UserError, match=r"ann/clean/3\.png: cannot be read as an image"):
        built_and_evaluated(four_queries, check_images=False)


@pytest.mark.parametrize("template, foggy", [("mean", 0.5), ("best", 1.0)])
def test_the_summary_is_a_flat_row_with_the_kinds_under_the_chosen_template(four_queries, template, foggy):
    row = summary(built_and_evaluated(four_queries, template=template)[2])
    assert row == {
        "top1_mean": 0.5,
        "top1_best": 0.75,
        "top1_foggy": foggy,
        "top1_rainy": 0.0,
        "top1_sunny": 1.0,
    }


def test_a_person_asked_for_but_not_there_is_an_error_with_the_name(task_b):
    with pytest.raises(ValueError, match=r"1 of the persons asked for .* 'nobody'"):
        gallery.build_gallery(TinyNet(), task_b / "val", eval_transform(76, 1.0), "cpu", persons=["eve", "nobody"])


# --- class centres, and the choice of an epoch ------------------------------------------------------------------------


def test_means_of_persons_are_those_of_their_unit_embeddings_in_the_order_asked_for(tmp_path):
    write(tmp_path / "ann/clean/1.png", (200, 0, 0))
    write(tmp_path / "ann/clean/2.png", (0, 100, 0))
    write(tmp_path / "bob/clean/1.png", (0, 0, 50))
    write(tmp_path / "cy/clean/1.png", (9, 9, 9))  # not asked for
    write(tmp_path / "dee/distortion/1_foggy.png", (9, 9, 9))  # no clean photo
    means, places = person_means(MeanColour(), tmp_path, as_float, "cpu", persons=["bob", "dee", "ann"])
    found = dict(zip(places.tolist(), means, strict=True))
    assert found.keys() == {0, 2}
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(found[2], torch.tensor([0.5, 0.5, 0.0]).sqrt())


@pytest.fixture
def two_worlds(tmp_path) -> Path:
    """Ann's photos are red and green, bob's only one is yellowish. Of ann's two copies one looks like its own photo,
    and so like bob without it; the other like her other photo. Bob's looks like his."""
    write(tmp_path / "ann/clean/ann_1.png", (200, 0, 0))
    write(tmp_path / "ann/clean/ann_2.png", (0, 200, 0))
    write(tmp_path / "bob/clean/bob_1.png", (200, 40, 0))
    write(tmp_path / "ann/distortion/ann_1_foggy.png", (200, 0, 0))
    write(tmp_path / "ann/distortion/ann_1_rainy.png", (20, 200, 0))
    write(tmp_path / "bob/distortion/bob_1_foggy.png", (200, 40, 0))
    return tmp_path


def test_an_epoch_is_chosen_by_the_mean_of_same_and_cross(two_worlds):
    top1, row = validate(MeanColour(), two_worlds, as_float, "cpu", template="best")
    assert row["top1_best"] == 1  # every copy is next to a photo of its person
    # Of those of ann, who alone has a second photo, the foggy one goes to bob where its own does not count.
    assert row["top1_cross"] == 1 / 2
    assert row["top1_clean"] == 0  # her two photos are at a right angle, bob's is nearer to both
    assert top1 == (1 + 1 / 2) / 2
    assert (row["top1_foggy"], row["top1_rainy"]) == (1, 1)


def test_the_row_tells_how_near_each_kind_of_copy_is_to_its_photo(two_worlds):
    write(two_worlds / "bob/distortion/other_9_rainy.png", (0, 0, 200))  # of no photo that is known
    _, row = validate(MeanColour(), two_worlds, as_float, "cpu", template="best")
    assert row["cosine_foggy"] == pytest.approx(1)  # ann_1's and bob_1's, each of its photo's colour
    assert row["cosine_rainy"] == pytest.approx(20 / math.hypot(20, 200))  # ann_1's alone
    assert sum(name.startswith("cosine_") for name in row) == 2


def test_only_the_persons_asked_for_choose_the_epoch(two_worlds, caplog):
    top1, row = validate(MeanColour(), two_worlds, as_float, "cpu", template="best", persons=["bob"])
    assert top1 == row["top1_best"] == 1 and not {"top1_cross", "top1_clean"} & row.keys()
    assert "nobody that epochs are chosen on has a second clean photo" in caplog.text


def test_those_with_a_second_photo_need_not_ask(two_worlds, caplog):
    """Ann has two clean photos and no distorted one: nobody asks under "cross", and under "clean" she does."""
    for path in (two_worlds / "ann/distortion").iterdir():
        path.unlink()
    top1, row = validate(MeanColour(), two_worlds, as_float, "cpu", template="best")
    assert top1 == row["top1_best"] == 1 and "top1_cross" not in row and row["top1_clean"] == 0
    assert "nobody that epochs are chosen on has a second clean photo" in caplog.text


def test_a_kind_called_like_a_figure_does_not_take_its_place(two_worlds):
    for name in ("mean", "best", "cross", "clean"):
        write(two_worlds / f"bob/distortion/bob_1_{name}.png", (0, 200, 0))  # ann's
    top1, row = validate(MeanColour(), two_worlds, as_float, "cpu", template="best")
    assert row["top1_best"] == 3 / 7 and (row["top1_cross"], row["top1_clean"]) == (1 / 2, 0)
    assert top1 == (3 / 7 + 1 / 2) / 2
