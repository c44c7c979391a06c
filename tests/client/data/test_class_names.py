"""Integers of a Hugging Face file have the names of that file, also in lists of tags."""

import json
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from fedgraft.client.data.files import read_tables


def test_tags_of_hugging_face_have_the_names_of_their_file(tmp_path: Path) -> None:
    for feature in (
        {"feature": {"names": ["B-per", "O"], "_type": "ClassLabel"}, "_type": "List"},
        [{"names": ["B-per", "O"], "_type": "ClassLabel"}],
    ):
        features = {"tags": feature}
        meta = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        fields = [("tokens", pa.list_(pa.string())), ("tags", pa.list_(pa.int64()))]
        table = pa.table({"tokens": [["Ada", "sat"]], "tags": [[0, 1]]},
                         schema=pa.schema(fields, metadata=meta))  # fmt: skip
        parquet.write_table(table, tmp_path / "rows.parquet")
        (read,) = read_tables(str(tmp_path / "rows.parquet"), content="tokens", label="tags",
                              images=False)  # fmt: skip
        assert read.labels == [["B-per", "O"]]
