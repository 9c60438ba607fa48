"""A kept gallery as a Parquet file."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common import UserError
from enrolment import save_gallery
from gallery import Gallery
from tools import export_gallery


@pytest.mark.parametrize("quality", [None, torch.tensor([10.5, 3.25, 7.0])])
def test_a_gallery_becomes_a_row_per_photo(tmp_path, monkeypatch, quality, capsys):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")
    embeddings = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))
    paths = [Path(f"/photos/{name}.jpg").absolute() for name in ("bob/1", "änn/1", "bob/2")]
    gallery = Gallery(
        embeddings=embeddings,
        labels=torch.tensor([1, 0, 1]),
        persons=["ann", "bob"],
        paths=paths,
        template="mean",
        made_by={"fingerprint": "0" * 16, "image_size": 160, "face_crop": 0.52},
        quality=quality,
    )
    save_gallery(tmp_path / "gallery.pt", gallery)
    monkeypatch.setattr(export_gallery, "GALLERY", tmp_path / "gallery.pt")
    monkeypatch.setattr(export_gallery, "OUT", tmp_path / "out" / "gallery.parquet")
    export_gallery.main()
    assert "3 photos of 2 persons" in capsys.readouterr().out
    table = parquet.read_table(export_gallery.OUT)
    assert [str(field.type) for field in table.schema] == [
        *("string", "string", "float"),
        "fixed_size_list<element: float>[8]",
    ]
    found = table.to_pydict()
    assert sorted(zip(found["photo"], found["person"], strict=True)) == sorted(
        zip(map(str, paths), ["bob", "ann", "bob"], strict=True)
    )
    order = [[str(path) for path in paths].index(photo) for photo in found["photo"]]
    assert torch.equal(torch.tensor(found["embedding"]), embeddings[order])
    assert found["quality"] == ([None] * 3 if quality is None else quality[order].tolist())
    facts = json.loads(table.schema.metadata[b"gallery"])
    assert facts == {"made_by": gallery.made_by, "template": "mean"}


def test_without_pyarrow_the_script_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"^the package pyarrow is not installed \(.*\): pip install pyarrow$"):
        export_gallery.main()
