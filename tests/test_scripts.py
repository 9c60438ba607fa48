"""The scripts as a user runs them: stage 1, stage 2 and evaluate in sequence."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import set_tiny_runs, write_person, write_photo, write_task_b
from PIL import Image
from tiny_net import TinyNet

import checkpoints
import demo
import evaluate
import fast
import metrics
import report
import train_stage1
import train_stage2
from common import UserError
from framing import HIDDEN


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Holds the runs of both stages on photos as in `task_b`."""
    root = tmp_path_factory.mktemp("scripts")
    with pytest.MonkeyPatch.context() as patch:
        for script in set_tiny_runs(patch, write_task_b(root / "Task_B"), root / "runs"):
            script.main()
    return root / "runs"


@pytest.fixture
def trained(runs, monkeypatch, tmp_path, task_b) -> Path:
    """evaluate set to what stage 2 left, without pictures; yields the folder that evaluate.main() writes."""
    monkeypatch.setattr(checkpoints, "FaceNet", TinyNet)
    settings = {"DATA_DIR": task_b, "RESULTS_DIR": tmp_path / "results", "NUM_WORKERS": 0, "PICTURES": False}
    for constant, value in (settings | {"CHECKPOINT": runs / "stage2" / "best.pt"}).items():
        monkeypatch.setattr(evaluate, constant, value)
    return tmp_path / "results" / "val_stage2"


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_three_scripts_in_sequence_with_the_real_network(task_b, tmp_path, monkeypatch):
    common = {"DATA_DIR": task_b, "NUM_WORKERS": 0}
    stage1, stage2 = tmp_path / "s1", tmp_path / "s2"
    training_constants = common | {"EPOCHS": 1, "QUICK_VALIDATION": False}
    monkeypatch.setattr(train_stage1, "BATCH_SIZE", 7)
    monkeypatch.setattr(train_stage2, "PERSONS_PER_BATCH", 4)
    for script, constants in (
        (train_stage1, training_constants | {"RUN_DIR": stage1, "PRETRAINED": None, "IMAGE_SIZE": 76}),
        (train_stage2, training_constants | {"RUN_DIR": stage2, "STAGE1_CHECKPOINT": stage1 / "best.pt"}),
        (train_stage2, {"TEACHER": None, "WIDE_SIZE": 76}),
        (evaluate, common | {"CHECKPOINT": stage2 / "best.pt", "RESULTS_DIR": tmp_path, "PICTURES": False}),
    ):
        for constant, value in constants.items():
            monkeypatch.setattr(script, constant, value)
    train_stage1.main()
    train_stage2.main()
    details = evaluate.main()
    best = torch.load(stage2 / "best.pt", weights_only=True)
    assert (best["stage"], best["selected_on"]) == (2, "val")
    assert (best["image_size"], best["face_crop"]) == (146, 1.0)  # the frame whose 0.52 are 76 pixels
    weight = train_stage2.WIDE_WEIGHT
    assert best["crops"] == {"face": 0.52, "wide_size": 76, "wide_weight": weight, "hidden": HIDDEN}
    assert best["persons"] == ["ann", "bob", "cy", "di"]
    # Training and evaluate.py mean the same by top-1, of the kinds on disk.
    saved = json.loads((tmp_path / "val_stage2" / "figures.json").read_text())["protocols"]["same"]
    assert details["top1"]["mean"] == saved["top1"]["mean"]
    row = torch.load(stage2 / "last.pt", weights_only=True)["history"][best["epoch"]]
    assert saved["per_kind"] and all(
        row[f"top1_{kind}"] == of["top1"]["mean"] for kind, of in saved["per_kind"].items()
    )
    assert details["queries"] == 6


def test_evaluate_writes_what_it_returns(trained):
    details = evaluate.main()
    saved = json.loads((trained / "figures.json").read_text())
    same = saved["protocols"]["same"]
    assert same["top1"] == details["top1"] and same["per_kind"] == details["per_kind"]
    assert saved["model"]["stage"] == 2 and saved["model"]["selected_on"] == "val"
    queries = [row for row in read_csv(trained / "queries.csv") if row["protocol"] == "same"]
    assert len(queries) == details["queries"] == 6
    right = sum(row["person"] == row["predicted_best"] for row in queries)
    assert right / 6 == pytest.approx(details["top1"]["best"])
    rows = [row for row in read_csv(trained / "figures.csv") if row["protocol"] == "same" and row["template"] == "mean"]
    per_kind = {row["kind"]: row for row in rows}
    assert set(per_kind) == {"blurred", "lowlight", "all"}
    assert int(per_kind["blurred"]["queries"]) == 3
    assert float(per_kind["all"]["rank-1"]) == pytest.approx(details["top1"]["mean"])
    persons = [row for row in read_csv(trained / "persons.csv") if row["protocol"] == "same"]
    assert {row["person"]: int(row["queries"]) for row in persons} == {"eve": 4, "fay": 2}
    for column, figure in (("top1_mean", "rank-1"), ("mAP", "mAP")):  # means over queries, of whichever person
        overall = sum(int(row["queries"]) * float(row[column]) for row in persons) / 6
        assert overall == pytest.approx(float(per_kind["all"][figure]))


def test_evaluate_prints_the_table_how_the_checkpoint_was_chosen_and_what_too_few_samples_forbid(trained, capsys):
    evaluate.main()
    printed = capsys.readouterr().out
    assert "chosen on val" in printed and "HOLDOUT_PERSONS" in printed
    gallery = "3 clean photos of 2 persons in the gallery"
    assert f"same: {gallery}, 6 queries of 2 persons; mean template" in printed
    assert f"cross: {gallery}, 4 queries of 1 persons; 1 persons of the gallery have no query; mean" in printed
    assert "blurred" in printed and "lowlight" in printed
    assert printed.count("rank-1 of all by template: mean ") == 3
    assert "same: TAR@FAR=0.001 is not reported: 6 impostor pairs, 10000 needed" in printed
    assert "same: DIR@FPIR=0.1 is not reported: 6 queries, 200 needed" in printed


def strict_json(path):
    def no(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=no)


def test_evaluate_reports_every_protocol_on_one_page_with_pictures_that_open(trained, monkeypatch):
    monkeypatch.setattr(evaluate, "PICTURES", True)
    evaluate.main()
    protocols = strict_json(trained / "figures.json")["protocols"]
    # eve has two photos, so her four distorted ones are queries of cross and her two clean ones of clean; fay has one.
    assert {name: found["queries"] for name, found in protocols.items()} == {"same": 6, "cross": 4, "clean": 2}
    assert set(protocols["same"]["figures"]["best"]["all"]) == set(metrics.FIGURES)
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert all(f"<h2>Protocol “{name}”: " in page for name in protocols)
    assert "http:" not in page and "https:" not in page
    pictures = {path.stem: path for path in trained.iterdir() if path.suffix in (".png", ".jpg")}
    drawn = {f"{kind}_{name}" for kind in ("kinds", "cmc", "roc", "scores") for name in protocols}
    assert pictures.keys() == drawn | {"tsne", "similarity", "mistakes"}
    assert page.count("data:image/") == len(pictures)
    for name in ("tsne", "similarity", "mistakes"):
        with Image.open(pictures[name]) as picture:
            picture.load()
            assert min(picture.size) > 100


def test_evaluate_compares_two_checkpoints_on_the_same_queries(trained, runs, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "COMPARE_WITH", runs / "stage1" / "best.pt")
    evaluate.main()
    assert "difference to stage1" in capsys.readouterr().out
    saved = strict_json(trained / "figures.json")
    assert saved["compared_with"]["stage"] == 1
    rows = {(r["protocol"], r["kind"], r["figure"]): float(r["value"]) for r in read_csv(trained / "comparison.csv")}
    now = saved["protocols"]["cross"]["figures"]["mean"]["all"]["rank-1"]["value"]
    monkeypatch.setattr(evaluate, "CHECKPOINT", evaluate.COMPARE_WITH)
    monkeypatch.setattr(evaluate, "COMPARE_WITH", None)
    evaluate.main()
    before = strict_json(trained.parent / "val_stage1" / "figures.json")["protocols"]["cross"]["figures"]["mean"]["all"]
    assert rows["cross", "all", "rank-1"] == pytest.approx(now - before["rank-1"]["value"])


def test_evaluate_replaces_the_files_of_an_earlier_evaluation_and_prints_after_it_has_written(trained, monkeypatch):
    def fail(*results):
        raise OSError("a console that is gone")

    trained.mkdir(parents=True)
    for name in ("comparison.csv", "report.html", "mistakes.jpg", "figures.json", "notes.txt"):
        (trained / name).touch()
    monkeypatch.setattr(report, "print_results", fail)
    with pytest.raises(OSError, match="a console that is gone"):
        evaluate.main()
    tables = {"figures.json", "figures.csv", "queries.csv", "persons.csv"}
    assert {path.name for path in trained.iterdir()} == tables | {"notes.txt"}
    assert strict_json(trained / "figures.json")["split"] == "val"


@pytest.mark.parametrize(
    "constant, value, message",
    [
        ("RESULTS_DIR", "file", r"RESULTS_DIR = .*val_stage2 cannot be written to \(Not a directory\)"),
        ("COMPARE_WITH", "none.pt", r"none\.pt: no checkpoint"),
        ("DATA_DIR", "none", r"none: no such folder; set DATA_DIR to"),
    ],
)
def test_evaluate_finds_before_it_embeds_what_would_fail_afterwards(
    trained, monkeypatch, tmp_path, constant, value, message
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate, constant, tmp_path / value)
    monkeypatch.setattr(evaluate, "evaluated", None)
    with pytest.raises(UserError, match=message):
        evaluate.main()


def test_evaluate_compares_a_checkpoint_with_one_of_its_own_stage(trained, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "COMPARE_WITH", evaluate.CHECKPOINT)
    evaluate.main()
    assert "difference to stage2, before" in capsys.readouterr().out
    differences = [float(row["value"]) for row in read_csv(trained / "comparison.csv")]
    assert differences and not any(differences)


def test_evaluate_leaves_out_a_protocol_without_queries(trained, monkeypatch, tmp_path, caplog):
    root = tmp_path / "lone"
    for name, colour in (("gil", (120, 20, 120)), ("hal", (20, 120, 20))):
        write_person(root / "val" / name, colour, 1)
    monkeypatch.setattr(evaluate, "DATA_DIR", root)
    assert evaluate.main()["queries"] == 4
    assert set(strict_json(trained / "figures.json")["protocols"]) == {"same"}
    assert "protocol 'cross': no query" in caplog.text and "protocol 'clean': no query" in caplog.text
    monkeypatch.setattr(evaluate, "evaluated", None)  # nothing is embedded
    for protocols in (("cross",), ("cross", "clean")):
        monkeypatch.setattr(evaluate, "PROTOCOLS", protocols)
        with pytest.raises(UserError, match="no person with a distorted photo has a second clean photo"):
            evaluate.main()
    for person in ("gil", "hal"):
        shutil.rmtree(root / "val" / person / "distortion")
    with pytest.raises(UserError, match="no distorted photo to query with"):
        evaluate.main()


def test_evaluate_warns_of_twins_of_one_photo_under_two_names_and_of_queries_without_a_source(trained, task_b, caplog):
    eve, fay = task_b / "val" / "eve", task_b / "val" / "fay"
    shutil.copy(eve / "clean" / "eve_0001.png", eve / "clean" / "eve_0009.png")
    shutil.copy(eve / "clean" / "eve_0002.png", fay / "clean" / "fay_0009.png")
    (eve / "distortion" / "eve_0001_blurred.png").rename(eve / "distortion" / "other_blurred.png")
    evaluate.main()
    assert "1 clean photos of one person are one file" in caplog.text and "eve_0009.png" in caplog.text
    assert "1 images lie under more than one person" in caplog.text and "fay_0009.png" in caplog.text
    assert "1 of 6 queries have no source photo in the gallery by their name" in caplog.text


@pytest.mark.parametrize(
    "constant, value, message",
    [
        ("TEMPLATE", "median", "TEMPLATE = 'median'"),
        ("PROTOCOLS", ("same", "all"), "protocol 'all'"),
        ("PROTOCOLS", ("cross"), r"PROTOCOLS = 'cross': expected a tuple .*, such as \('cross',\), with its comma"),
        ("SPLIT", "tset", "tset: no such folder; DATA_DIR holds train, val; correct SPLIT = 'tset'"),
        ("BACKEND", "tpu", "BACKEND = 'tpu'"),
    ],
)
def test_evaluate_refuses_a_constant_that_it_does_not_know(trained, monkeypatch, constant, value, message):
    monkeypatch.setattr(evaluate, constant, value)
    with pytest.raises(UserError, match=message):
        evaluate.main()


def test_evaluate_embeds_alike_by_a_faster_backend(trained, monkeypatch):
    embeddings = evaluate.main()["embeddings"]
    monkeypatch.setattr(evaluate, "BACKEND", "fused")
    torch.testing.assert_close(evaluate.main()["embeddings"], embeddings, rtol=0, atol=1e-5)


def test_evaluate_in_eight_bits_is_fitted_to_train_photos_and_nearly_the_same(trained, monkeypatch, task_b):
    for package in fast.PACKAGES["openvino-int8"]:
        pytest.importorskip(package)
    embeddings = evaluate.main()["embeddings"]
    monkeypatch.setattr(evaluate, "BACKEND", "openvino-int8")
    found = evaluate.main()["embeddings"]
    cosine = torch.nn.functional.cosine_similarity(found, embeddings)
    assert cosine.min() > 0.8 and not torch.allclose(found, embeddings, atol=1e-5)
    facts = {"image_size": 76, "face_crop": 1.0, "framing": "centre"}
    photos = evaluate.int8_photos(facts, torch.device("cpu"))
    assert len(photos) == 21 and all("train" in path.parts for path in photos.paths)  # 7 clean, 14 distorted
    monkeypatch.setattr(evaluate, "INT8_PHOTOS", 5)
    assert evaluate.int8_photos(facts, torch.device("cpu")).paths == photos.paths[:5]


def test_evaluate_reports_the_wrong_answers_left_when_bad_photos_are_refused(trained, monkeypatch, task_b, capsys):
    monkeypatch.setattr(evaluate, "PICTURES", True)
    write_photo(task_b / "val" / "eve" / "distortion" / "eve_0001_swapped.png", (40, 200, 200), seed=1)
    details = evaluate.main()
    [wrong] = [query for query in details["per_query"] if query["mean"]["predicted"] != query["person"]]
    assert wrong["kind"] == "swapped"
    qualities = [query["quality"] for query in details["per_query"]]
    expected = 0 if wrong["quality"] == min(qualities) else 1  # one of 7 is refused
    line = f"refusing the 20 % of the queries of lowest quality: swapped 100, all {100 * expected} (of 1; ideal: 0)"
    assert line in capsys.readouterr().out
    same = strict_json(trained / "figures.json")["protocols"]["same"]
    assert same["wrong_left"] == {"blurred": None, "lowlight": None, "swapped": 1.0, "all": expected}
    assert (trained / "discard_same.png").is_file() and not (trained / "discard_clean.png").exists()
    rows = [row for row in read_csv(trained / "queries.csv") if row["protocol"] == "same"]
    assert [float(row["quality"]) for row in rows] == pytest.approx(qualities)


def test_evaluate_takes_image_size_and_crop_from_the_checkpoint(trained, monkeypatch):
    before = evaluate.main()
    monkeypatch.setattr(evaluate, "IMAGE_SIZE", 160)
    monkeypatch.setattr(evaluate, "FACE_CROP", 0.1)
    assert torch.equal(evaluate.main()["embeddings"], before["embeddings"])


def test_evaluate_says_when_persons_were_trained_on(trained, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "SPLIT", "train")
    evaluate.main()
    assert "4 of 4 persons" in capsys.readouterr().out


def test_evaluate_of_the_plain_network_needs_no_checkpoint(trained, monkeypatch):
    monkeypatch.setattr(evaluate, "CHECKPOINT", None)
    monkeypatch.setattr(evaluate, "PRETRAINED", None)
    monkeypatch.setattr(evaluate, "IMAGE_SIZE", 76)
    evaluate.main()
    saved = json.loads((trained.parent / "val_random" / "figures.json").read_text())
    made_by = saved["model"].pop("made_by")
    assert saved["model"] == {"stage": 0, "pretrained": "None", "image_size": 76, "face_crop": 0.52}
    assert (made_by["image_size"], made_by["face_crop"], len(made_by["fingerprint"])) == (76, 0.52, 16)


def test_evaluate_of_one_person_with_one_photo_draws_what_it_can_and_says_what_that_is_worth(
    trained, monkeypatch, tmp_path, caplog
):
    monkeypatch.setattr(evaluate, "PICTURES", True)
    root = tmp_path / "one"
    write_person(root / "val" / "gil", (120, 120, 120), 1)
    monkeypatch.setattr(evaluate, "DATA_DIR", root)
    details = evaluate.main()
    assert details["top1"] == {"mean": 1.0, "best": 1.0}
    assert (trained / "similarity.png").exists() and "the gallery holds one person" in caplog.text


def test_evaluate_without_any_enrolled_query_still_draws(trained, monkeypatch, task_b):
    monkeypatch.setattr(evaluate, "PICTURES", True)
    shutil.rmtree(task_b / "val" / "eve" / "distortion")
    shutil.rmtree(task_b / "val" / "fay" / "clean")  # the queries are fay's, the gallery is eve's
    details = evaluate.main()
    assert details["not_enrolled"] == 2 and details["top1"]["mean"] == 0
    assert (trained / "mistakes.jpg").exists()


def test_a_broken_file_and_a_person_without_clean_photos_stop_nothing(trained, task_b, caplog):
    (task_b / "val" / "eve" / "distortion" / "eve_0001_blurred.png").write_bytes(b"not a picture")
    shutil.rmtree(task_b / "val" / "fay" / "clean")
    details = evaluate.main()
    assert (details["queries"], details["not_enrolled"]) == (5, 2)
    assert "eve_0001_blurred.png" in caplog.text
    assert "1 persons without a clean photo" in caplog.text and "fay" in caplog.text


@pytest.mark.parametrize("low, interval", [(None, ""), (0.612, " (95 % interval 61 to 90)")])
def test_demo_ends_with_what_was_reached_under_cross(tmp_path, low, interval):
    rank1 = {"value": 0.754, "low": low, "high": None if low is None else 0.9}
    cross = {"template": "best", "queries": 56, "persons": 20, "figures": {"best": {"all": {"rank-1": rank1}}}}
    (tmp_path / "figures.json").write_text(json.dumps({"protocols": {"cross": cross}}))
    said = demo.reached(tmp_path / "figures.json")
    assert said.startswith("Of 56 distorted photos, ") and said.endswith(
        f"75 %{interval} got the right one of 20 names"
    )


def test_demo_goes_on_from_scratch_where_weights_cannot_be_had(monkeypatch, capsys):
    def offline(name):
        raise UserError("the weights could not be downloaded")

    monkeypatch.setattr(demo, "load_pretrained", offline)
    assert demo.available("vggface2") is None
    assert "training from scratch" in capsys.readouterr().out
    monkeypatch.setattr(demo, "load_pretrained", lambda name: {})
    assert demo.available("vggface2") == "vggface2"
