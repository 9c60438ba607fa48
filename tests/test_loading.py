"""loading.py: workers only where they pay and where /dev/shm has room; their errors arrive as one sentence."""

import gc
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, write_plain
from torch.utils.data import BatchSampler, Dataset, SequentialSampler, _utils

import evaluate
import loading
from common import UserError
from datasets import PhotoList
from folders import equal_files
from loading import PhotoLoader, worth_workers
from transforms import eval_transform

MIB = 2**20
BATCH_BYTES = 16 * MIB


class Items(Dataset):
    """32 pairs of a tensor of 4 MiB and a number."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        return torch.zeros(MIB), index


def in_batches(dataset, batch_size: int) -> BatchSampler:
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last=False)


@pytest.mark.parametrize(
    "method, batches, workers",
    [("fork", 0, 0), ("fork", 3, 0), ("fork", 4, 2), ("spawn", 4, 0), ("spawn", 23, 0), ("spawn", 24, 2)],
)
def test_workers_start_only_for_so_many_batches_that_they_save_time(monkeypatch, method, batches, workers):
    monkeypatch.setattr(loading.multiprocessing, "get_start_method", lambda: method)
    assert worth_workers(2, batches) == workers and worth_workers(0, batches) == 0


@pytest.mark.parametrize("passes, workers, stay", [(1, 0, False), (2, 2, True)])
def test_workers_count_all_passes_and_live_on_between_them(monkeypatch, passes, workers, stay):
    monkeypatch.setattr(loading, "FEW_BATCHES", {loading.multiprocessing.get_start_method(): 16})
    loader = PhotoLoader(Items(), in_batches(Items(), 4), 2, CPU, passes=passes)
    assert (loader.num_workers, loader.persistent_workers) == (workers, stay)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize(
    "free, processes, workers, prefetch, said",
    [
        (14 * BATCH_BYTES + 4096, 1, 3, 4, None),  # 3 x 4 in the queue, 2 that have left it
        (14 * BATCH_BYTES - MIB, 1, 3, 3, "fewer batches are loaded ahead"),
        (5 * BATCH_BYTES + 4096, 1, 3, 1, "fewer batches are loaded ahead"),
        (4 * BATCH_BYTES + 4096, 1, 2, 1, "fewer batches are loaded ahead"),
        (2 * BATCH_BYTES + 4096, 1, 0, None, "the photos are loaded without workers"),
        (0, 1, 0, None, "the photos are loaded without workers"),
        (14 * BATCH_BYTES + 4096, 2, 3, 1, "fewer batches are loaded ahead"),  # torchrun's processes share it
    ],
)
def test_workers_queue_what_dev_shm_has_room_for_and_a_warning_says_so_once(
    monkeypatch, tmp_path, caplog, free, processes, workers, prefetch, said
):
    monkeypatch.setattr(loading, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: SimpleNamespace(free=free, total=64 * MIB))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    for _ in range(2):
        loader = PhotoLoader(Items(), in_batches(Items(), 4), 3, CPU, passes=99, prefetch=4)
        assert (loader.num_workers, loader.prefetch_factor) == (workers, prefetch)
    assert len(caplog.messages) == (said is not None)
    if said:
        assert f"64 MiB are too small for what 3 workers queue, so {said}" in caplog.text


def test_where_there_is_no_dev_shm_workers_queue_as_usual(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "SHARED_MEMORY", tmp_path / "none")
    loader = PhotoLoader(Items(), in_batches(Items(), 4), 2, CPU, passes=99)
    assert (loader.num_workers, loader.prefetch_factor) == (2, loading.PREFETCH)


FAULTS = {
    "vanished": (None, "{path}: no such file; if it was there when the folder was read, put it back"),
    "torn": (300, "{path}: cannot be read as an image (image file is truncated"),
}


@pytest.fixture
def at_once(monkeypatch) -> Iterator[None]:
    """Workers start for any number of batches, and torch waits for their end in steps of 0.2 s, not of 5."""
    monkeypatch.setattr(loading, "FEW_BATCHES", {loading.multiprocessing.get_start_method(): 0})
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    yield
    gc.collect()  # the workers end here, not within a later test


def harm(path, keep: int | None) -> None:
    path.unlink() if keep is None else path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_photo_that_cannot_be_read_any_more_is_one_sentence_also_from_a_worker(tmp_path, at_once, fault, workers):
    keep, sentence = FAULTS[fault]
    paths = [write_plain(tmp_path / f"{number}.bmp", size=(40, 40)) for number in range(5)]
    loader = PhotoLoader(PhotoList(paths, eval_transform(76, 1.0)), in_batches(paths, 1), workers, CPU)
    harm(paths[3], keep)
    with pytest.raises(UserError) as raised:
        list(loader)
    assert str(raised.value).startswith(sentence.format(path=paths[3])) and "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("script", ["train_stage1", "train_stage2", "evaluate"])
def test_a_photo_harmed_after_the_scan_ends_each_script_in_its_sentence(
    stages, stage1_best, monkeypatch, at_once, tmp_path, script, fault, workers
):
    keep, sentence = FAULTS[fault]
    module = {"train_stage1": stages[0], "train_stage2": stages[1], "evaluate": evaluate}[script]
    constants = {"NUM_WORKERS": workers, "CHECK_IMAGES": False, "DATA_DIR": stages[0].DATA_DIR}
    if script == "evaluate":
        constants |= {"CHECKPOINT": stage1_best, "BATCH_SIZE": 1, "RESULTS_DIR": tmp_path / "results"}
    for name, value in constants.items():
        monkeypatch.setattr(module, name, value)
    photo = {"evaluate": "val/eve/clean/eve_0002.png"}.get(script, "train/cy/clean/cy_0002.png")
    photo, scan = module.DATA_DIR / photo, module.scan_persons

    def scanned(*args, **settings):
        found = scan(*args, **settings)
        if photo.exists() and photo.stat().st_size > 300:
            harm(photo, keep)
        return found

    monkeypatch.setattr(module, "scan_persons", scanned)
    with pytest.raises(UserError) as raised:
        module.main()
    assert str(raised.value).startswith(sentence.format(path=photo)) and "\n" not in str(raised.value)


def test_files_that_are_gone_are_equal_to_none(tmp_path):
    first, second, gone = (write_plain(tmp_path / f"{name}.png") for name in "abc")
    gone.unlink()
    assert equal_files([first, gone, second]) == [[first, second]]
