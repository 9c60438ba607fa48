import pytest

from loading import worth_workers


@pytest.mark.parametrize(("batches", "workers"), [(0, 0), (1, 0), (3, 0), (4, 2), (100, 2)])
def test_a_few_batches_start_no_workers(batches, workers):
    assert worth_workers(2, batches) == workers
