"""Write a kept gallery as a Parquet file, for pandas, Spark, DuckDB or a vector database: a row per photo.

    python -m tools.export_gallery

Needs the package pyarrow. Columns: person, photo (its path), quality (empty where the network does not rate photos) and
embedding (a fixed-size list of float32, of norm 1). The model that made the embeddings is in the file's metadata.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import common
from checkpoints import atomic_file, check_writable
from enrolment import load_gallery, names_of
from gallery import Gallery

if TYPE_CHECKING:
    import pyarrow

GALLERY = Path("gallery.pt")  # of identify.py
OUT = Path("gallery.parquet")  # 2 KiB a photo at 512 numbers


def main() -> None:
    """Read, convert, write."""
    common.resolve_constants(globals())
    common.optional_package("pyarrow", ("pyarrow",))
    check_writable("OUT", OUT, folder=False)
    import pyarrow.parquet

    table = gallery_table(load_gallery(GALLERY))
    with atomic_file(OUT) as file:
        pyarrow.parquet.write_table(table, file)
    print(f"{OUT}: {table.num_rows} photos of {len(table['person'].unique())} persons")


def gallery_table(gallery: Gallery) -> "pyarrow.Table":
    """A row per photo, in the gallery's order; made_by and template, as JSON, under "gallery" in the metadata."""
    import pyarrow as pa

    rows, dims = gallery.embeddings.shape
    numbers = pa.array(gallery.embeddings.contiguous().numpy().reshape(-1), pa.float32())
    quality = [None] * rows if gallery.quality is None else gallery.quality.numpy()
    columns = {
        "person": pa.array(names_of(gallery), pa.string()),
        "photo": pa.array([str(path) for path in gallery.paths], pa.string()),
        "quality": pa.array(quality, pa.float32()),
        "embedding": pa.FixedSizeListArray.from_arrays(numbers, dims),
    }
    made_by = json.dumps({"made_by": gallery.made_by, "template": gallery.template})
    return pa.table(columns).replace_schema_metadata({"gallery": made_by})


if __name__ == "__main__":
    common.run_script(main)
