"""embedding.py: photos in, unit rows out."""

import math

import pytest
import torch
from conftest import MeanColour, as_float, write_plain
from tiny_net import TinyNet

from common import UserError
from embedding import embed


def test_embeddings_are_unit_rows_in_the_order_of_the_paths(tmp_path):
    paths = [write_plain(tmp_path / "b.png", (30, 40, 0)), write_plain(tmp_path / "a.png", (0, 0, 7))]
    rows = embed(MeanColour(), paths, as_float, "cpu", batch_size=1).embeddings
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]))


def test_embedding_a_photo_twice_gives_the_same_and_leaves_the_networks_state(tmp_path):
    torch.manual_seed(0)
    model = TinyNet().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    paths = [write_plain(tmp_path / f"{number}.png", (9 * number, 90, 200 - 9 * number)) for number in range(9)]
    first, second = (embed(model, paths, as_float, "cpu").embeddings for _ in range(2))
    assert torch.equal(first, second)  # no dropout
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # BatchNorm's statistics among them


@pytest.mark.parametrize("training", [True, False])
def test_the_network_embeds_in_eval_mode_and_returns_to_its_modes_also_after_a_failure(tmp_path, training):
    model, modes = TinyNet().train(training), []
    model.backbone[1].eval()  # frozen, as FREEZE_BATCHNORM does
    model.backbone.register_forward_hook(lambda module, *_: modes.append(module.training))
    embed(model, [write_plain(tmp_path / "whole.png", (9, 8, 7))], as_float, "cpu")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.jpg: cannot be read as an image"):
        embed(model, [tmp_path / "broken.jpg"], as_float, "cpu")
    assert modes == [False]
    assert model.training == model.backbone[5].training == training and not model.backbone[1].training


class DivergesOnWhite(MeanColour):
    """NaN for a white photo."""

    def forward(self, images):
        colours = super().forward(images)
        return torch.where(colours.sum(1, keepdim=True) > 764, math.nan, colours)


def test_an_embedding_that_is_not_finite_is_an_error_with_its_photo(tmp_path):
    paths = [write_plain(tmp_path / f"{number}.png", (9 * number, 9, 9)) for number in range(5)]
    write_plain(paths[2], (255, 255, 255))
    write_plain(paths[4], (255, 255, 255))
    with pytest.raises(UserError, match="its embedding is not finite") as error:
        embed(DivergesOnWhite(), paths, as_float, "cpu", batch_size=2)
    assert str(error.value).startswith(f"{paths[2]}: ")
