"""The ONNX graph computes what PyTorch computes, or is not written at all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import command
from support.exports import Exported, logits, make_inputs

from fedgraft.common.errors import BackboneError, InputError
from fedgraft.server.export import onnx as export_onnx
from fedgraft.server.export.onnx import example_inputs


def needs_onnx() -> Any:
    for name in export_onnx.PACKAGES:
        pytest.importorskip(name, reason="the extra `onnx` is not installed")
    return pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("kind", ["vit", "vit-head", "bert", "resnet"])
def test_the_graph_has_the_logits_of_the_merged_model(kind: str, tmp_path: Path) -> None:
    runtime = needs_onnx()
    exported = Exported(kind, tmp_path)
    folder = exported.onnx(tmp_path / "out")
    session = runtime.InferenceSession(str(folder / "model.onnx"))
    # Other sizes than those that were traced, and texts of different lengths.
    feed = {name: value.numpy() for name, value in make_inputs(kind).items()}
    feed = {one.name: feed[one.name] for one in session.get_inputs() if one.name in feed}
    if kind == "bert" and "token_type_ids" in {one.name for one in session.get_inputs()}:
        feed["token_type_ids"] = np.zeros_like(feed["input_ids"])
    (found,) = session.run(["logits"], feed)
    np.testing.assert_allclose(found, exported.wanted.numpy(), atol=1e-4)
    assert np.abs(found - exported.untrained.numpy()).max() > 0.01
    card = (folder / "README.md").read_text("utf-8")
    assert "onnxruntime.InferenceSession" in card and "library_name: onnx" in card
    assert (folder / "fedgraft.json").exists() and (folder / "config.json").exists()
    assert (kind != "bert") or (folder / "tokenizer.json").exists()
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_a_graph_that_computes_something_else_is_not_given_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_onnx()
    exported = Exported("vit", tmp_path)
    trace = export_onnx._trace

    def of_another_model(model: Any, inputs: Any, path: Path, **axes: Any) -> None:
        import copy

        other = copy.deepcopy(model)
        with torch.no_grad():
            for weight in other.parameters():
                weight.mul_(1.05)
        trace(other, inputs, path, **axes)

    monkeypatch.setattr(export_onnx, "_trace", of_another_model)
    with pytest.raises(BackboneError, match="computes other logits") as refused:
        exported.onnx(tmp_path / "out")
    assert "--merge" in refused.value.hint
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_onnx, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs onnx, onnxscript, onnxruntime") as refused:
        Exported("vit", tmp_path).onnx(tmp_path / "out")
    assert refused.value.hint == "pip install 'fedgraft[onnx]'" and refused.value.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["vit", "bert", "resnet"])
def test_example_inputs_are_what_the_model_reads(kind: str, tmp_path: Path) -> None:
    exported = Exported(kind, tmp_path)
    for examples, tokens in export_onnx.TRIED:
        inputs = example_inputs(exported.bench, exported.run.job, examples, tokens)
        with torch.inference_mode():
            assert exported.bench.model(**inputs).logits.shape[0] == examples
    assert logits(exported.bench.model, kind).shape[0] == 4


@pytest.mark.parametrize(("kind", "axes"), [("vit", {0}), ("bert", {0, 1}), ("resnet", {0})])
def test_axes_that_differ_between_inputs_may_have_any_size(
    kind: str, axes: set[int], tmp_path: Path
) -> None:
    exported = Exported(kind, tmp_path)
    shapes = (export_onnx.TRACED, export_onnx.SMALLEST)
    first, second = (example_inputs(exported.bench, exported.run.job, *shape) for shape in shapes)
    found = export_onnx.open_axes(first, second)
    assert [set(one) for one in found] == [axes] * len(first)


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runtime = needs_onnx()
    exported = Exported("vit", tmp_path)
    run = str(exported.run.folder)
    code, out, _ = command(capsys, "export", run, "--format", "onnx", "--json")
    assert code == 0 and '"format": "onnx"' in out
    folder = exported.run.folder / "export-onnx"
    session = runtime.InferenceSession(str(folder / "model.onnx"))
    (found,) = session.run(["logits"], {"pixel_values": make_inputs("vit")["pixel_values"].numpy()})
    np.testing.assert_allclose(found, exported.wanted.numpy(), atol=1e-4)


def test_a_format_that_is_none_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, told = command(capsys, "export", "runs/none", "--format", "tflite")
    assert code == 2 and "no format tflite" in told
