"""Data as people have them: litter, links, other spellings, classes of other files, odd images.

Nothing is read as something else, nothing is left out without being counted, and no message
repeats a cell.
"""

import base64
import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from support.trainings import make_job

from fedgraft.client.data.rows import SplitRows, read_split
from fedgraft.common.config.job import Job
from fedgraft.common.errors import DataError
from fedgraft.common.modalities import image as images


def job_for(labels: tuple[str, ...] = ("no", "yes"), *, kind: str = "bert", **data: Any) -> Job:
    job = make_job(kind)
    return job.model_copy(
        update={
            "job": job.job.model_copy(update={"labels": labels}),
            "data": job.data.model_copy(update=data),
        }
    )


def text_file(folder: Path, labels: list[Any], suffix: str = ".jsonl", **more: Any) -> str:
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        lines = [json.dumps({"text": f"w {n}", "label": one}) for n, one in enumerate(labels)]
        path.write_text("\n".join(lines))
    elif suffix == ".csv":
        path.write_text("text,label\n" + "".join(f"w {n},{v}\n" for n, v in enumerate(labels)))
    else:
        table = pa.table({"text": [f"w {n}" for n in range(len(labels))], "label": labels, **more})
        parquet.write_table(table, path)
    return str(path)


def labels_of(rows: SplitRows) -> list[int]:
    found: list[int] = rows.dataset[:]["label"]
    return found


# Labels


STARS = ("1", "2", "3", "4", "5")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("values", [[0, 1, 2, 3, 4], [0, 0, 0], [1, 0, 5]])
def test_where_labels_are_numbers_a_number_is_a_name(
    values: list[int], suffix: str, tmp_path: Path
) -> None:
    """A stray 0 ("not rated") is not the first label."""
    with pytest.raises(DataError, match=r"label '?0'? is not in the job's list") as caught:
        read_split(text_file(tmp_path, values, suffix), job_for(STARS))
    assert "a number is a name" in str(caught.value)
    rows = read_split(text_file(tmp_path, [5, 1, 3], suffix), job_for(STARS))
    assert (labels_of(rows), rows.labels_read) == ([4, 0, 2], "names")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_indices_are_said_and_never_mixed_with_names(suffix: str, tmp_path: Path) -> None:
    rows = read_split(text_file(tmp_path, [0, 1, 1], suffix), job_for())
    assert (labels_of(rows), rows.labels_read) == ([0, 1, 1], "indices")
    if suffix != ".parquet":  # a column of one type cannot mix them
        with pytest.raises(DataError, match=r"(row|line) \d: a label here is one of the job's"):
            read_split(text_file(tmp_path, ["no", 1], suffix), job_for())


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_labels_of_pandas_can_be_mapped_as_the_hint_says(suffix: str, tmp_path: Path) -> None:
    for values, mapping in (
        ([0.0, 1.0], {"0.0": "no", "1.0": "yes"}),
        ([False, True], {"False": "no", "True": "yes"}),
    ):
        path = text_file(tmp_path, values, suffix)
        with pytest.raises(DataError, match="not in the job's list") as caught:
            read_split(path, job_for())
        assert any(f"'{key}' = " in caught.value.hint for key in mapping)
        assert labels_of(read_split(path, job_for(), labels=mapping)) == [0, 1]
    assert labels_of(
        read_split(
            text_file(tmp_path, [True, False], ".jsonl"),
            job_for(),
            labels={"true": "yes", "false": "no"},
        )
    ) == [1, 0]


def test_a_missing_number_is_no_label(tmp_path: Path) -> None:
    path = text_file(tmp_path, [1.0, float("nan")], ".parquet")
    with pytest.raises(DataError, match="row 2: no label"):
        read_split(path, job_for(), labels={"1.0": "yes"})


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_equal_however_they_are_composed(form: str, tmp_path: Path) -> None:
    def spelt(text: str, other: str = form) -> str:
        return unicodedata.normalize("NFC" if other == "NFC" else "NFD", text)

    opposite = "NFD" if form == "NFC" else "NFC"
    job = job_for((spelt("café", opposite), "thé"))
    assert labels_of(read_split(text_file(tmp_path, [spelt("café"), "thé"]), job)) == [0, 1]
    mapped = {spelt("brûlé", opposite): spelt("café")}
    path = text_file(tmp_path, [spelt("brûlé")])
    assert labels_of(read_split(path, job, labels=mapped)) == [0]
    for suffix in (".csv", ".jsonl", ".parquet"):
        path = text_file(tmp_path, ["thé"], suffix)
        text = Path(path).read_bytes()
        if suffix != ".parquet":
            Path(path).write_bytes(text.replace(b"text", spelt("éte").encode()))
        else:
            table = parquet.read_table(path).rename_columns([spelt("éte"), "label"])
            parquet.write_table(table, path)
        rows = read_split(path, job, columns={"text": spelt("éte", opposite)})
        assert rows.dataset[:]["text"] == ["w 0"]


@pytest.mark.parametrize("name", ["Yes", "yes ", "y\u200bes", "\uff59es"])
def test_a_name_that_only_looks_the_same_is_told_in_escapes(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_split(text_file(tmp_path, [name]), job_for())
    assert f"hard to see: {name!a}" in caught.value.hint


# Classes of Hugging Face


def with_classes(folder: Path, labels: list[Any], feature: Any, **others: Any) -> str:
    path = folder / "rows.parquet"
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": feature, **others}
    meta = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    columns = {"text": [f"w {n}" for n in range(len(labels))], "label": labels}
    schema = pa.schema([("text", pa.string()), ("label", pa.int64())], metadata=meta)
    parquet.write_table(pa.table(columns, schema=schema), path)
    return str(path)


CLASSES = {"names": ["yes", "no"], "_type": "ClassLabel"}


def test_classes_have_the_names_of_their_file(tmp_path: Path) -> None:
    unknown = {"kind": "later", "_type": "FeatureOfALaterVersion"}
    for others in ({}, {"score": unknown}):
        rows = read_split(with_classes(tmp_path, [0, 1], CLASSES, **others), job_for())
        assert (labels_of(rows), rows.labels_read) == ([1, 0], "names")


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([0, -1], "row 2: no label"),
        ([0, None], "row 2: no label"),
        ([0, 2], "row 2: its label is 2, and the file names 2 classes"),
        ([0, -7], "row 2: its label is -7"),
    ],
)
def test_a_class_that_has_no_name_is_refused(labels: list[Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=told):
        read_split(with_classes(tmp_path, labels, CLASSES), job_for())


def test_damaged_metadata_is_named_where_it_may_matter(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    meta = {b"huggingface": b"{damaged"}
    for kind, values in ((pa.int64(), [0, 1]), (pa.string(), ["no", "yes"])):
        schema = pa.schema([("text", pa.string()), ("label", kind)], metadata=meta)
        parquet.write_table(pa.table({"text": ["a", "b"], "label": values}, schema=schema), path)
        if kind == pa.string():
            assert labels_of(read_split(str(path), job_for())) == [0, 1]
        else:
            with pytest.raises(DataError, match="damaged metadata of Hugging Face"):
                read_split(str(path), job_for())


# Folders


def picture(path: Path, value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(path, "PNG")
    return path


def clean_folder(folder: Path, labels: tuple[str, ...] = ("no", "yes")) -> Path:
    for label in labels:
        for number in range(3):
            picture(folder / label / f"{number}.png", 40 * number)
    return folder


@pytest.mark.parametrize(
    "litter",
    [
        "no/.ipynb_checkpoints/0-checkpoint.png", "no/@eaDir/0.png/SYNO.png", "no/__MACOSX/0.png",
        "__MACOSX/no/0.png", ".cache/0.png", "no/deep/@eaDir/0.png", "no/._0.png", "no/Thumbs.db",
        "no/.DS_Store", "lost+found/0.png", "yes/#recycle/0.png", "no/desktop.ini",
    ],
)  # fmt: skip
def test_what_systems_leave_is_left_out_at_every_depth_and_counted(
    litter: str, tmp_path: Path
) -> None:
    picture(clean_folder(tmp_path) / litter)
    rows = read_split(str(tmp_path), job_for(kind="vit"))
    assert (len(rows.dataset), rows.left_out) == (6, {"files of the system": 1})


@pytest.mark.parametrize("label", [".hidden", "@eaDir", "__rare__", "lost+found"])
def test_a_folder_that_the_job_lists_is_data(label: str, tmp_path: Path) -> None:
    rows = read_split(
        str(clean_folder(tmp_path, ("no", label))), job_for(("no", label), kind="vit")
    )
    assert labels_of(rows).count(1) == 3 and not rows.left_out
    mapped = read_split(str(tmp_path), job_for(kind="vit"), labels={label: "yes"})
    assert labels_of(mapped).count(1) == 3


def test_links_are_followed_and_loops_are_counted(tmp_path: Path) -> None:
    inside = clean_folder(tmp_path / "data")
    outside = clean_folder(tmp_path / "outside", ("more",)) / "more"
    (inside / "no" / "linked").symlink_to(outside)
    (inside / "yes" / "0-link.png").symlink_to(outside / "0.png")
    rows = read_split(str(inside), job_for(kind="vit"))
    assert (len(rows.dataset), rows.left_out) == (10, {})
    (inside / "no" / "up").symlink_to(inside)
    rows = read_split(str(inside), job_for(kind="vit"))
    assert rows.left_out == {"links to folders above them": 1} and len(rows.dataset) == 10


def test_a_link_to_nothing_is_named_or_counted(tmp_path: Path) -> None:
    (clean_folder(tmp_path) / "no" / "gone.png").symlink_to(tmp_path / "nowhere" / "x.png")
    with pytest.raises(DataError, match=r"no/gone\.png is a link that points to nothing"):
        read_split(str(tmp_path), job_for(kind="vit"))
    rows = read_split(str(tmp_path), job_for(kind="vit", on_bad_image="skip"))
    assert (len(rows.dataset), rows.left_out) == (6, {"files that cannot be used": 1})


# Cells


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("how", ["short", "long", "uri", "text", "zero"])
def test_a_cell_that_names_no_file_is_never_repeated(how: str, suffix: str, tmp_path: Path) -> None:
    secret = base64.b64encode(b"a patient's picture").decode()
    cell = {
        "short": secret, "long": secret * 400, "uri": f"data:image/png;base64,{secret}",
        "text": f"seen by dr.{secret}", "zero": f"{secret}\0.png",
    }[how]  # fmt: skip
    if suffix == ".csv" and how in ("uri", "zero"):
        pytest.skip("a comma or a zero byte is no part of a cell")
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text(json.dumps({"image": cell, "label": "no"}))
    elif suffix == ".csv":
        path.write_text(f"image,label\n{cell},no\n")
    else:
        parquet.write_table(pa.table({"image": [cell], "label": ["no"]}), path)
    with pytest.raises(DataError, match=r"(line|row) \d: its cell names no file") as caught:
        read_split(str(path), job_for(kind="vit"))
    assert secret[:8] not in str(caught.value) + caught.value.hint
    assert "base64" in caught.value.hint


def test_a_long_letter_fits_a_csv_cell(tmp_path: Path) -> None:
    letter = "word " * 60_000
    (tmp_path / "rows.csv").write_text(f"text,label\n{letter},yes\nb,no\n")
    rows = read_split(str(tmp_path / "rows.csv"), job_for())
    assert rows.dataset[:]["text"] == [letter, "b"]


# Images


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("most", [255, 4095, 1])
def test_faint_16_bit_pixels_are_refused_with_their_range(
    most: int, suffix: str, tmp_path: Path
) -> None:
    values = np.linspace(0, most, 64).astype(np.uint16).reshape(8, 8)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(values).save(path)
    with pytest.raises(DataError, match=f"values are 0 to {most}: scaled to 8 bits"):
        images.to_channels(images.open_image({"bytes": None, "path": str(path)}), 1)
    for whole in (np.zeros_like(values), values.astype(np.uint32) * 65535 // most):
        Image.fromarray(whole.astype(np.uint16)).save(path)
        read = np.asarray(
            images.to_channels(images.open_image({"bytes": None, "path": str(path)}), 1)
        )
        assert np.array_equal(read, whole >> 8)


def test_a_hot_pixel_does_not_make_an_image_bright() -> None:
    values = np.full((64, 64), 900, np.uint16)
    values[0, :4] = 0xFFFF
    with pytest.raises(DataError, match="900 to 65535: scaled to 8 bits, 2 of its 2 levels"):
        images.to_channels(Image.fromarray(values), 1)


def test_an_image_that_is_too_large_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = picture(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(DataError, match=r"large\.png has more than 0 megapixels") as caught:
        images.open_image({"bytes": None, "path": str(path)})
    assert "smaller" in caught.value.hint


def test_a_large_image_that_is_read_shows_no_line_of_source(tmp_path: Path) -> None:
    """PIL warns below its limit; the warning's filter is the process's, so it is tried in one."""
    path = picture(tmp_path / "large.png")
    script = (
        "from PIL import Image; from fedgraft.common.modalities import image; "
        f"Image.MAX_IMAGE_PIXELS = 40; image.open_image({{'bytes': None, 'path': {str(path)!r}}})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# What a stranger found


@pytest.mark.parametrize(
    ("labels", "cell"), [(("1.0", "2.0", "3.0"), 1), (("+1", "-1"), 0), (("-1", "0", "1"), 2)]
)
def test_any_number_among_the_labels_makes_numbers_names(
    labels: tuple[str, ...], cell: int, tmp_path: Path
) -> None:
    for suffix in (".jsonl", ".csv", ".parquet"):
        with pytest.raises(DataError, match="a number is a name"):
            read_split(text_file(tmp_path, [cell], suffix), job_for(labels))


@pytest.mark.parametrize("cell", ["Jane Doe", "Schmidt, Anna", "ID 19480312", "one two three"])
def test_a_label_that_is_like_none_is_not_repeated(cell: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_split(text_file(tmp_path, [cell]), job_for())
    assert cell not in str(caught.value) + caught.value.hint


@pytest.mark.parametrize(
    ("suffix", "first"),
    [
        (".csv", "Anna Schmidt has cancer,pos"),
        (".csv", "Anna,Schmidt"),
        (".csv", "Anna Schmidt has cancer,test"),  # which is nearly "text"
        (".jsonl", '{"Anna Schmidt has cancer": 1, "pos": 2}'),
    ],
)
def test_a_table_without_a_header_repeats_no_row(suffix: str, first: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text(first + ("\nb,neg\n" if suffix == ".csv" else "\n"))
    with pytest.raises(DataError, match="has 2 fields, and none has a name") as caught:
        read_split(str(path), job_for())
    assert "Anna" not in str(caught.value) + caught.value.hint


def test_a_label_folder_that_is_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (clean_folder(tmp_path) / "maybe").symlink_to(tmp_path / "unmounted")
    with pytest.raises(DataError, match="maybe is a link that points to nothing"):
        read_split(str(tmp_path), job_for(kind="vit"))


def test_files_beside_the_label_folders_are_counted_and_globs_hold_no_litter(
    tmp_path: Path,
) -> None:
    picture(clean_folder(tmp_path) / "loose.png")
    (tmp_path / "no" / "Thumbs.db").write_bytes(b"x")
    rows = read_split(str(tmp_path), job_for(kind="vit"))
    wanted = {"files outside of the label folders": 1, "files of the system": 1}
    assert (len(rows.dataset), rows.left_out) == (6, wanted)
    assert len(read_split(str(tmp_path / "*" / "*"), job_for(kind="vit")).dataset) == 6


def test_a_refusal_names_its_file_and_its_hint_can_be_followed(tmp_path: Path) -> None:
    path = clean_folder(tmp_path) / "no" / "faint.png"
    Image.fromarray(np.full((8, 8), 900, np.uint16)).save(path)
    with pytest.raises(DataError, match=r"no/faint\.png: an image has 16-bit pixels") as caught:
        read_split(str(tmp_path), job_for(kind="vit"))
    assert str(caught.value).count("faint.png") == 1
    with pytest.raises(DataError) as caught:
        read_split(text_file(tmp_path, [0]), job_for(STARS))
    assert "or 0 to" not in caught.value.hint and "labels are 1, 2, 3, 4, 5" in caught.value.hint
    with pytest.raises(DataError) as caught:
        read_split(text_file(tmp_path, ["a long label"]), job_for())
    assert "[data.labels] 'VALUE' = " in caught.value.hint and "or 0 to 1" in caught.value.hint
