"""A backbone that cannot work is refused by its true cause, before anybody trains."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers as hf
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from support.language_models import CHARACTERS, job_settings, save_language_model, save_tokenizer
from support.trainings import make_job

from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.backbones import load, stored
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import BackboneError
from fedgraft.common.modalities.text import check_length, load_text

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "vocab_size": len(CHARACTERS),
}  # fmt: skip
LENGTHS: list[tuple[Any, int | None]] = [
    (hf.RobertaConfig(**SMALL, max_position_embeddings=34, pad_token_id=1), 32),
    (hf.XLMRobertaConfig(**SMALL, max_position_embeddings=34, pad_token_id=1), 32),
    (hf.CamembertConfig(**SMALL, max_position_embeddings=34, pad_token_id=1), 32),
    (hf.MPNetConfig(**SMALL, max_position_embeddings=34, pad_token_id=1), 32),
    (hf.RobertaConfig(**SMALL, max_position_embeddings=34, pad_token_id=0), 33),
    (
        hf.LiltConfig(**{**SMALL, "hidden_size": 24}, max_position_embeddings=34, pad_token_id=1),
        32,
    ),
    (hf.MarkupLMConfig(**SMALL, max_position_embeddings=34, pad_token_id=1), 32),
    (hf.EsmConfig(**SMALL, max_position_embeddings=34, pad_token_id=1), 32),
    (
        hf.EsmConfig(
            **SMALL, max_position_embeddings=34, pad_token_id=1, position_embedding_type="rotary"
        ),
        None,
    ),
    (hf.BertConfig(**SMALL, max_position_embeddings=34), 34),
    (hf.T5Config(vocab_size=len(CHARACTERS), d_model=16, num_layers=1, num_heads=2, d_ff=8), None),
]


@pytest.mark.parametrize(
    ("config", "most"), LENGTHS, ids=lambda one: getattr(one, "model_type", "")
)
def test_the_limit_is_what_the_model_can_read(
    config: Any, most: int | None, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path)
    processor = load_text(tmp_path, config)
    assert processor.limit == most
    model = hf.AutoModel.from_config(config).eval()
    if most is None:
        if config.model_type == "esm":
            model(input_ids=torch.full((1, 99), 5))
        return
    with torch.inference_mode():
        model(input_ids=torch.full((1, most), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 5))
    with pytest.raises(BackboneError, match=f"the backbone reads {most} tokens"):
        check_length(processor, most + 1)


@pytest.mark.parametrize("rows", [len(CHARACTERS) - 1, 3])
def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(
    rows: int, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path)
    config = hf.BertConfig(**{**SMALL, "vocab_size": rows})
    with pytest.raises(BackboneError, match=f"embedding has {rows} rows") as caught:
        load_text(tmp_path, config)
    assert "resize_token_embeddings" in caught.value.hint
    load_text(tmp_path, hf.BertConfig(**{**SMALL, "vocab_size": len(CHARACTERS) + 64}))


def test_a_padding_token_that_was_added_is_refused_whatever_the_texts(tmp_path: Path) -> None:
    folder = save_language_model("gpt2", tmp_path / "gpt2")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(BackboneError, match="the model's embedding has"):
        open_workbench(parse_job(job_settings("gpt2", folder, "-"), where="test"))


@pytest.mark.parametrize("name", ["spm.model", "spiece.model", "sentencepiece.bpe.model"])
def test_a_sentencepiece_model_alone_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x0a\x05pieces")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"vocab_type": "spm"}))
    with pytest.raises(BackboneError, match=rf"SentencePiece model alone \({name}\)") as caught:
        load_text(tmp_path, hf.DebertaV2Config(vocab_size=200))
    assert "tokenizer.json" in caught.value.hint and "tiktoken" not in caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    folder = save_language_model("gpt2", tmp_path / "gpt2")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("mlp.c_fc.weight"))
    tensors[name][0, 0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"mlp\.c_fc\.weight hold NaN or infinity"):
        open_workbench(parse_job(job_settings("gpt2", folder, "-"), where="test"))


def changed(folder: Path, change: Any) -> None:
    """Write the weights of ``folder`` again, each as ``change(name, value)`` gives it."""
    path = folder / "model.safetensors"
    tensors = {name: change(name, value) for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder: Path, match: str) -> None:
    with pytest.raises(BackboneError, match=match) as caught:
        open_workbench(parse_job(job_settings("gpt2", folder, "-"), where="test"))
    assert caught.value.hint


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_weights_without_their_scale_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_language_model("gpt2", tmp_path / "gpt2")
    changed(folder, lambda name, x: (x * 50).to(dtype) if name.endswith("c_fc.weight") else x)
    refused(folder, r"c_fc\.weight is stored as \w+, without the scale")


def test_layers_that_the_config_does_not_count_are_named(tmp_path: Path) -> None:
    folder = save_language_model("gpt2", tmp_path / "gpt2")
    config = json.loads((folder / "config.json").read_text())
    assert config["n_layer"] > 1
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 1}))
    refused(folder, r"the weights have \S*h\.1\.\S+, a layer that config\.json does not count")


@pytest.mark.parametrize("share", [0.6, 1.0])
def test_weights_that_never_came_are_refused(share: float, tmp_path: Path) -> None:
    folder = save_language_model("gpt2", tmp_path / "gpt2")
    names = sorted(
        name for name, x in load_file(folder / "model.safetensors").items() if x.ndim > 1
    )
    lost = set(names[: int(share * len(names) + 0.999)])
    changed(folder, lambda name, x: torch.zeros_like(x) if name in lost else x)
    refused(folder, "matrices of weights are zero")


@pytest.mark.parametrize(
    ("error", "told"),
    [(hub.GatedRepoError, "is gated"), (hub.RepositoryNotFoundError, "or it is private")],
)
def test_a_closed_repository_is_told_so(
    error: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: Any, **__: Any) -> None:
        request = httpx.Request("GET", "https://huggingface.co/x?token=hf_secret")
        raise error("401 hf_secret", response=httpx.Response(401, request=request))  # type: ignore[call-arg]

    monkeypatch.setattr("huggingface_hub.snapshot_download", closed)
    with pytest.raises(BackboneError, match=told) as caught:
        load.locate("hf:someone/model")
    assert "hf_secret" not in str(caught.value) + caught.value.hint
    assert "hf auth login" in caught.value.hint


@pytest.mark.parametrize("status", [401, 403, 429, 500])
def test_what_the_hub_answered_is_told(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: Any, **__: Any) -> None:
        request = httpx.Request("GET", "https://huggingface.co/x?token=hf_secret")
        response = httpx.Response(status, request=request)
        raise hub.HfHubHTTPError("hf_secret", response=response)  # type: ignore[arg-type]

    monkeypatch.setattr("huggingface_hub.snapshot_download", refusing)
    with pytest.raises(BackboneError, match=rf"hf:someone/model \(status {status}\)") as caught:
        load.locate("hf:someone/model")
    assert ("hf auth login" in caught.value.hint) == (status < 404)
    assert "hf_secret" not in str(caught.value) + caught.value.hint


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_told_from_the_file(name: str, tmp_path: Path) -> None:
    folder = save_language_model("gpt2", tmp_path / "gpt2")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (folder / name).write_text(pointer)
    with pytest.raises(BackboneError, match=f"{name} is a pointer of Git LFS") as caught:
        open_workbench(parse_job(job_settings("gpt2", folder, "-"), where="test"))
    assert "git lfs pull" in caught.value.hint


@pytest.mark.parametrize("left", [-1, 3000, 300, 8, 5, 0])
def test_weights_that_are_cut_short_are_told_so(left: int, tmp_path: Path) -> None:
    folder = save_language_model("gpt2", tmp_path / "gpt2")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(BackboneError, match=r"model\.safetensors is .*cut short"):
        open_workbench(parse_job(job_settings("gpt2", folder, "-"), where="test"))


def test_an_exported_adapter_names_no_stranger(tmp_path: Path) -> None:
    from huggingface_hub.utils._validators import validate_repo_id

    from fedgraft.common.adapters.peft_folder import _base

    for kind in ("bert", "vit"):
        name = _base(open_workbench(make_job(kind)))
        with pytest.raises(hub.HFValidationError):
            validate_repo_id(name)
        assert "sha256:" in name and str(Path.home()) not in name


def test_what_has_no_rule_of_its_own_fails_in_one_pass_and_in_words(tmp_path: Path) -> None:
    """An architecture whose limit nobody knows: check tries one example of full length."""
    from fedgraft.server.plan import make_plan
    from fedgraft.server.runs.costs import estimate_costs

    folder = save_language_model("gpt2", tmp_path / "gpt2")
    job = parse_job(job_settings("gpt2", folder, "-"), where="test")
    bench = open_workbench(job)
    plan = make_plan(job, bench, "")
    estimate_costs(plan, bench)
    head = bench.model.get_base_model().lm_head

    def broken(*_: Any) -> None:
        raise IndexError("index out of range in self")

    handle = head.register_forward_hook(broken)
    with pytest.raises(BackboneError, match=r"cannot compute one example of this job \(IndexError"):
        estimate_costs(plan, bench)
    handle.remove()
    handle = head.register_forward_hook(lambda *given: given[2] * float("nan"))
    with pytest.raises(BackboneError, match="answers with NaN or infinity"):
        estimate_costs(plan, bench)
    handle.remove()


def test_statistics_that_are_no_numbers_are_refused() -> None:
    model = hf.ResNetForImageClassification(hf.ResNetConfig(num_channels=3))
    for name, value in model.named_buffers():
        if name.endswith("running_var"):
            value.fill_(float("nan"))
            break
    with pytest.raises(BackboneError, match="running_var hold NaN"):
        stored.check_values(model, "path:x")
