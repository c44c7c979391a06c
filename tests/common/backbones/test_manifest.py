"""Manifests: what they are made of, what has which digest, and what is no manifest."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support.models import write_model

from fedgraft.common.backbones.manifest import CHUNK, LIMIT, Manifest, ManifestFile, make_manifest
from fedgraft.common.errors import BackboneError

EMPTY = hashlib.sha256(b"").hexdigest()
CONFIG = ManifestFile(name="config.json", size=2, chunks=(hashlib.sha256(b"{}").hexdigest(),))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(scope="module")
def manifest(model: Path) -> Manifest:
    return make_manifest(model, source="path:m")


def encoded(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def changed(manifest: Manifest, **changes: Any) -> bytes:
    return encoded({**json.loads(manifest.to_json()), **changes})


def named(manifest: Manifest, name: str) -> bytes:
    """With another name in the place of its last file's; sorted."""
    raw = json.loads(manifest.to_json())
    raw["files"][-1]["name"] = name
    raw["files"].sort(key=lambda file: file["name"])
    return encoded(raw)


def test_chunks_are_the_hashes_of_4_mib_each(model: Path, manifest: Manifest) -> None:
    weights = (model / "model.safetensors").read_bytes()
    assert [file.name for file in manifest.files] == [
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ]
    expected = [weights[at : at + 4_194_304] for at in range(0, len(weights), 4_194_304)]
    file = manifest.files[1]
    assert file.chunks == tuple(hashlib.sha256(part).hexdigest() for part in expected)
    assert [(c.offset, c.length) for c in file.split()] == [
        (0, CHUNK),
        (CHUNK, CHUNK),
        (2 * CHUNK, CHUNK // 2),
    ]
    assert len(manifest.chunks) == 5
    assert manifest.size == sum(path.stat().st_size for path in model.iterdir())


def test_the_digest_is_known() -> None:
    manifest = Manifest(files=(CONFIG,), licence="mit", source="here")
    canonical = (
        '{"chunk_bytes":4194304,"files":[{"chunks":["'
        "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
        '"],"name":"config.json","size":2}],"format":"fedgraft-backbone/1"}'
    )
    assert manifest.digest == hashlib.sha256(canonical.encode()).hexdigest()
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_where_a_copy_came_from_is_not_in_its_digest(manifest: Manifest) -> None:
    other = manifest.model_copy(update={"source": "usb stick", "licence": "mit"})
    assert Manifest.from_json(other.to_json()).digest == manifest.digest


def test_readme_and_folders_are_not_in_it_but_the_licence_is(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", chunks=0.1)
    before = make_manifest(model, source="m")
    (model / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\ntags: x\n---\nhi")
    (model / "1_Pooling").mkdir()
    after = make_manifest(model, source="m")
    assert (before.licence, after.licence) == ("", "apache-2.0")
    assert before.digest == after.digest
    (model / "README.md").unlink()
    (model / "LICENSE").write_text("\n# MIT\x1b License\n\nPermission")
    assert make_manifest(model, source="m").licence == "MIT License"


def test_progress_ends_at_the_size(model: Path) -> None:
    told: list[tuple[int, int]] = []
    manifest = make_manifest(model, source="m", progress=lambda *at: told.append(at))
    assert told[-1] == (manifest.size, manifest.size)
    assert told == sorted(told)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pkl", "a.pt", "a.ckpt"])
def test_a_folder_with_a_pickle_has_no_manifest(tmp_path: Path, name: str) -> None:
    model = write_model(tmp_path / "m", chunks=0.1)
    (model / name).write_bytes(b"\x80")
    with pytest.raises(BackboneError, match="can run code"):
        make_manifest(model, source="m")


@pytest.mark.parametrize("name", [".hidden.json", "a b.json", "ü.txt"])
def test_a_folder_with_a_name_that_others_refuse_has_no_manifest(tmp_path: Path, name: str) -> None:
    model = write_model(tmp_path / "m", chunks=0.1)
    (model / name).write_text("{}")
    with pytest.raises(BackboneError, match="no plain file name"):
        make_manifest(model, source="m")


@pytest.mark.parametrize(
    "name",
    [
        "../vocab.txt",
        "/etc/vocab.txt",
        "a/b.txt",
        "a\\b.txt",
        "..",
        ".hidden.json",
        "a\nb.txt",
        "a\0.txt",
        "~.txt ",
        "",
        "x" * 300 + ".txt",
        "C:x.txt",
    ],
)
def test_names_that_leave_the_folder_are_refused(manifest: Manifest, name: str) -> None:
    with pytest.raises(BackboneError, match="no plain file name"):
        Manifest.from_json(named(manifest, name))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle", ".h5"])
def test_pickles_are_refused(manifest: Manifest, suffix: str) -> None:
    with pytest.raises(BackboneError, match="can run code"):
        Manifest.from_json(named(manifest, f"weights{suffix}"))


@pytest.mark.parametrize("name", ["a.npy", "a.py", "a.so", "a", "a.sh", "a.TXT", "a.onnx"])
def test_only_what_a_model_needs_is_taken(manifest: Manifest, name: str) -> None:
    with pytest.raises(BackboneError, match="none of"):
        Manifest.from_json(named(manifest, name))


@pytest.mark.parametrize(
    ("what", "broken"),
    [
        ("format", "fedgraft-backbone/2"),
        ("chunk_bytes", 1),
        ("chunk_bytes", "4194304"),
        ("files", []),
        ("files", {}),
        ("licence", "a\x1b[31m"),
        ("source", "\u202e"),
        ("source", "x" * 201),
        ("surplus", 1),
    ],
)
def test_fields_are_checked(manifest: Manifest, what: str, broken: object) -> None:
    with pytest.raises(BackboneError, match="no manifest"):
        Manifest.from_json(changed(manifest, **{what: broken}))


@pytest.mark.parametrize("size", [-1, 0, 2 * CHUNK, 10**30, True, 2.0, "2", None])
def test_sizes_fit_the_chunks(manifest: Manifest, size: object) -> None:
    raw = json.loads(manifest.to_json())
    raw["files"][0]["size"] = size
    with pytest.raises(BackboneError, match="no manifest"):
        Manifest.from_json(encoded(raw))


@pytest.mark.parametrize(
    "names",
    [
        ("vocab.txt", "config.json"),
        ("config.json", "config.json"),
        ("Config.json", "config.json"),
        ("vocab.txt",),
        ("adapter_config.json", "config.json"),
    ],
)
def test_files_are_a_model_s(names: tuple[str, ...]) -> None:
    files = tuple(CONFIG.model_copy(update={"name": name}) for name in names)
    with pytest.raises(ValidationError):
        Manifest(files=files)


def test_there_is_one_spelling(manifest: Manifest) -> None:
    data = manifest.to_json()
    for other in (
        data + b" ",
        json.dumps(json.loads(data)).encode(),
        b'{"licence":"x",' + data[1:],
    ):
        with pytest.raises(BackboneError, match="canonical"):
            Manifest.from_json(other)


def test_size_and_depth_of_json_are_bounded() -> None:
    with pytest.raises(BackboneError, match="more than"):
        Manifest.from_json(b"x" * (LIMIT + 1))
    with pytest.raises(BackboneError):
        Manifest.from_json(b"[" * 100_000)
    with pytest.raises(BackboneError):
        Manifest.from_json(b"9" * 100_000)


digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
names = st.from_regex(r"[a-z][a-z_]{0,8}\.(json|txt|safetensors|model)", fullmatch=True)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    others = draw(st.sets(names, max_size=4)) - {"adapter_config.json"}
    files = []
    for name in sorted({*others, "config.json"}):
        chunks = draw(st.lists(digests, max_size=4))
        size = max(0, len(chunks) * CHUNK - draw(st.integers(0, CHUNK - 1))) if chunks else 0
        files.append(ManifestFile(name=name, size=size, chunks=tuple(chunks)))
    text = st.text(max_size=20).filter(str.isprintable)
    return Manifest(files=tuple(files), licence=draw(text), source=draw(text))


@given(manifests())
def test_every_manifest_comes_back(manifest: Manifest) -> None:
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.digest == manifest.digest
    assert sum(chunk.length for chunk in again.chunks) == manifest.size


@given(manifests(), st.data())
def test_a_changed_byte_is_refused_or_another_manifest(
    manifest: Manifest, data: st.DataObject
) -> None:
    raw = bytearray(manifest.to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for damaged in (bytes(raw), bytes(raw[:cut])):
        try:
            read = Manifest.from_json(damaged)
        except BackboneError as error:
            assert error.hint
        else:
            assert read.to_json() == damaged
            labels = {"licence": manifest.licence, "source": manifest.source}
            assert read.digest != manifest.digest or read.model_copy(update=labels) == manifest


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_arbitrary_bytes_are_no_manifest(data: bytes) -> None:
    with pytest.raises(BackboneError):
        Manifest.from_json(data)


def test_memory_does_not_depend_on_the_file(tmp_path: Path) -> None:
    import tracemalloc

    model = write_model(tmp_path / "m", chunks=0.1)
    os.truncate(model / "model.safetensors", 64 * CHUNK)  # mostly a hole
    tracemalloc.start()
    manifest = make_manifest(model, source="m")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(manifest.chunks) == 66
    assert peak < 12 * CHUNK
