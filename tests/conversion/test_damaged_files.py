"""Weight files that are damaged, hostile or not weights are refused in one line, and nothing is written."""

import json
import os
import random
import signal
import struct
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import tiny
from vit_simple.conversion.state_dict import load_tensors
from vit_simple.convert_checkpoint import convert, main
from vit_simple.files import RunError, UserError
from vit_simple.sharing.verify import check
from vit_simple.training.base import load_base_model, open_base
from vit_simple.training.config import TrainConfig

OPTIONS = {"family": "augreg", "num_attention_heads": 4}
NO_WEIGHTS = [torch.int8, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn]


@pytest.fixture(autouse=True)
def time_limit():
    """A read that never ends fails the test."""

    def stop(*_):
        raise AssertionError("it does not end")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def weights(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(tiny(num_hidden_layers=1).state_dict()) | {name.replace("__", "."): t for name, t in changes.items()}


def refusal(tmp_path, source, error=UserError, **options) -> str:
    before = set(tmp_path.rglob("*"))
    with pytest.raises(error) as caught:
        convert(source, tmp_path / "new/out", **OPTIONS | options)
    assert set(tmp_path.rglob("*")) == before
    return str(caught.value)


def load_for_training(config: TrainConfig):
    return load_base_model(open_base(config), config, channels=3)


@pytest.fixture
def checkpoint(tmp_path):
    """A converted checkpoint, and a function that changes its tensors."""
    torch.save(weights(), tmp_path / "whole.pth")
    convert(tmp_path / "whole.pth", tmp_path / "checkpoint", **OPTIONS)
    file = tmp_path / "checkpoint/model.safetensors"
    config = json.loads((tmp_path / "checkpoint/config.json").read_text())
    names = {"id2label": {str(number): f"name {number}" for number in range(5)}}
    (tmp_path / "checkpoint/config.json").write_text(json.dumps(config | names))
    return file, lambda change: save_file(change(load_file(file)), file, {"format": "pt"})


# Values


@pytest.mark.parametrize("dtype", NO_WEIGHTS)
def test_dtype_that_is_no_weight_is_refused_by_name(tmp_path, dtype):
    torch.save({name: tensor.to(dtype) for name, tensor in weights().items()}, tmp_path / "all.pth")
    torch.save(weights(head__bias=torch.ones(5).to(dtype)), tmp_path / "one.pth")
    problem = f"has the dtype {str(dtype).removeprefix('torch.')} instead of"
    assert f"cls_token {problem}" in refusal(tmp_path, tmp_path / "all.pth")
    assert f"but head.bias {problem}" in refusal(tmp_path, tmp_path / "one.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_weights_is_converted(tmp_path, dtype):
    torch.save({name: tensor.to(dtype) for name, tensor in weights().items()}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "out", **OPTIONS)
    assert load_file(tmp_path / "out/model.safetensors")["head.bias"].dtype == dtype


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weight_that_is_not_finite_is_refused_by_name(tmp_path, dtype, value):
    bias = torch.tensor([0, 0, value, 0, 0], dtype=dtype)
    torch.save(weights(head__bias=bias), tmp_path / "a.pth")
    assert "but head.bias has values that are not finite" in refusal(tmp_path, tmp_path / "a.pth")


@pytest.mark.parametrize("bad", [torch.tensor([0.0, 0, torch.nan, 0, 0]), torch.ones(5, dtype=torch.int8)])
def test_bad_weight_is_refused_by_push_and_training_too(checkpoint, bad):
    file, rewrite = checkpoint
    check(file.parent)
    config = TrainConfig(model_name_or_path=str(file.parent))
    assert load_for_training(config).num_parameters() > 0
    rewrite(lambda tensors: tensors | {"head.bias": bad})
    for use in (lambda: check(file.parent), lambda: load_for_training(config)):
        with pytest.raises(UserError, match=r"head\.bias has (the dtype int8|values that are not finite)"):
            use()


def test_truncated_weights_are_refused_by_training(checkpoint):
    file, _ = checkpoint
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"--model_name_or_path: .* cannot be read"):
        load_for_training(TrainConfig(model_name_or_path=str(file.parent)))


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"num_hidden_layers": 10**9}, "expected num_hidden_layers of 1, as in the weights"),
        ({"hidden_size": 10**12}, "expected the sizes of a model that can be built"),
        ({"image_size": 10**30}, "expected the sizes of a model that can be built"),
    ],
)
def test_config_of_an_impossible_size_is_refused_at_once(checkpoint, fields, reason):
    file, _ = checkpoint
    config = json.loads((file.parent / "config.json").read_text())
    (file.parent / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(UserError, match=reason):
        check(file.parent)
    with pytest.raises(UserError, match="num_hidden_layers: expected at most 20|" + reason):
        convert(file.parent, file.parent.parent / "out")


@pytest.mark.parametrize(
    "field, value",
    [
        *(("model_type", value) for value in (5, [], {})),
        *(("architecture", value) for value in (5, ["vit_base_patch16_224"])),
        *(("num_classes", value) for value in ("5", 5.5, [])),
        *(("label_names", value) for value in ("a", [1, 2, 3, 4, 5], {"a": 1})),
        *(("model_args", value) for value in ([], "embed_dim", 1)),
        *(("pretrained_cfg", value) for value in ([], "cfg")),
        *(("model_args.num_heads", value) for value in ("4", [4])),
        *(("model_args.img_size", value) for value in ("16", [16, "16"], 16.5)),
        *(("model_args.act_layer", value) for value in (1, {})),
        *(("pretrained_cfg.input_size", value) for value in ("3,16,16", 16, [3, None, 16])),
        *(("pretrained_cfg.crop_pct", value) for value in ("0.9", [])),
        *(("pretrained_cfg.mean", value) for value in (0.5, ["a"])),
        *(("pretrained_cfg.interpolation", value) for value in (3, [])),
        *(("pretrained_cfg.license", value) for value in (3, {})),
    ],
)
def test_timm_config_with_a_wrong_type_names_file_and_field(tmp_path, field, value):
    save_file(weights(), tmp_path / "model.safetensors")
    content = {"architecture": "vit_tiny_patch4", "model_args": {"num_heads": 4, "img_size": 16}, "pretrained_cfg": {}}
    outer, _, inner = field.partition(".")
    content[outer] = {**content[outer], inner: value} if inner else value
    (tmp_path / "config.json").write_text(json.dumps(content))
    options = {"num_attention_heads": None, "family": None}
    assert f"{tmp_path}/config.json: expected {field}" in refusal(tmp_path, tmp_path, **options)


def test_timm_config_with_an_empty_image_size_is_read_without_one(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    content = {"architecture": "vit_tiny_patch4", "model_args": {"num_heads": 4}}
    pretrained = {"input_size": None, "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps(content | {"pretrained_cfg": pretrained}))
    convert(tmp_path, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["image_size"] == 16


@pytest.mark.parametrize("size", [[16], [16, 16, 16]])
def test_timm_config_with_an_impossible_image_size_names_the_field(tmp_path, size):
    save_file(weights(), tmp_path / "model.safetensors")
    content = {"architecture": "vit_tiny_patch4", "model_args": {"num_heads": 4, "img_size": size}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    said = refusal(tmp_path, tmp_path, num_attention_heads=None)
    assert f"img_size or input_size: expected a height and a width, got {size}" in said


@pytest.mark.parametrize("shape", [(), (0,), (0, 0), (0, 0, 0), (2, 2)])
def test_tensor_of_another_shape_is_refused_by_name(tmp_path, shape):
    whole = tiny(num_hidden_layers=1, num_register_tokens=2).state_dict()
    for name in whole:
        torch.save({**whole, name: torch.ones(shape)}, tmp_path / "a.pth")
        assert "expected" in refusal(tmp_path, tmp_path / "a.pth")


def test_tensor_of_a_block_with_an_endless_number_is_refused(tmp_path):
    torch.save(weights() | {f"blocks.{'9' * 5000}.x": torch.ones(1)}, tmp_path / "a.pth")
    assert "is unknown" in refusal(tmp_path, tmp_path / "a.pth")


# Bytes


def test_tensor_that_is_larger_than_its_storage_is_refused(tmp_path):
    torch.save({name: torch.zeros(1).expand(tensor.shape) for name, tensor in weights().items()}, tmp_path / "a.pth")
    assert "a.pth: cls_token has 128 bytes, but the file has 4 for it" in refusal(tmp_path, tmp_path / "a.pth")
    torch.save(weights(head__weight=torch.ones(80).as_strided((5, 32), (16, 0))), tmp_path / "b.pth")
    assert "b.pth: head.weight has 640 bytes, but the file has 320 for it" in refusal(tmp_path, tmp_path / "b.pth")


def test_tensors_that_share_a_storage_are_refused_if_they_are_many(tmp_path):
    shared = torch.ones(10_000)
    for count in (2, 5):
        decoder = {f"decoder.{number}": shared for number in range(count)}
        torch.save(weights() | decoder, tmp_path / f"{count}.pth")
    convert(tmp_path / "2.pth", tmp_path / "out", **OPTIONS)  # tied weights are usual
    assert "5.pth: decoder.4 has 40,000 bytes, but" in refusal(tmp_path, tmp_path / "5.pth")


def test_weights_that_share_a_storage_are_refused(tmp_path):
    shared = torch.ones(32)
    torch.save(weights(norm__weight=shared, norm__bias=shared), tmp_path / "a.pth")
    assert "expected tensors that do not overlap in memory" in refusal(tmp_path, tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(5).to_sparse(),
        lambda: torch.ones(5, device="meta"),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ],
    ids=["sparse", "meta", "nested"],
)
def test_tensor_that_is_not_dense_is_refused(tmp_path, make):
    torch.save(weights(head__bias=make()), tmp_path / "a.pth")
    assert "expected dense tensors, but head.bias" in refusal(tmp_path, tmp_path / "a.pth")


# Files


@pytest.mark.parametrize(
    "error",
    [
        *(KeyError("x"), AssertionError("storage key"), IndexError("x"), TypeError("x"), AttributeError("x")),
        *(struct.error("x"), RecursionError(), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), ValueError("x")),
        *(OverflowError("x"), EOFError(), OSError(22, "Invalid argument"), ModuleNotFoundError("x")),
    ],
    ids=repr,
)
def test_every_error_of_the_unpickler_names_the_file(tmp_path, monkeypatch, error):
    def load(*_, **__):
        raise error

    (tmp_path / "a.pth").write_bytes(b"anything")
    monkeypatch.setattr(torch, "load", load)
    assert "a.pth: expected a file of tensors: it is damaged" in refusal(tmp_path, tmp_path / "a.pth")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError("too large")])
def test_error_of_the_machine_is_not_blamed_on_the_file(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    (tmp_path / "a.pth").write_bytes(b"anything")
    monkeypatch.setattr(torch, "load", fail)
    assert f"a.pth cannot be read: {error}" in refusal(tmp_path, tmp_path / "a.pth", RunError)


def mutated(content: bytes, seed: int) -> bytes:
    """The content with some other bytes in its first 3,000, with some inserted there, or cut."""
    draw, content = random.Random(seed), bytearray(content)
    place = draw.randrange(min(len(content), 3000))
    if seed % 3 == 0:
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(min(len(content), 3000))] = draw.randrange(256)
    elif seed % 3 == 1:
        content[place : place + draw.randint(0, 20)] = draw.randbytes(draw.randint(0, 20))
    else:
        del content[place:]
    return bytes(content)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_mutated_file_is_loaded_or_refused_with_its_name(tmp_path, kind):
    file = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth")
    if kind == "safetensors":
        save_file(weights(), file)
    else:
        torch.save(weights(), file, _use_new_zipfile_serialization=kind == "zip")
    whole, refused = file.read_bytes(), 0
    for seed in range(200):
        file.write_bytes(mutated(whole, seed))
        try:
            with warnings.catch_warnings(action="error"):
                load_tensors([file])
        except UserError as error:
            assert file.name in str(error), seed
            refused += 1
    assert 100 < refused <= 200


def test_convert_command_ends_with_one_line_for_mutated_files(tmp_path, capsys):
    torch.save(weights(), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    for seed in range(20):
        (tmp_path / "a.pth").write_bytes(mutated(whole, 3 * seed))
        arguments = [str(tmp_path / "a.pth"), str(tmp_path / f"out{seed}"), "--family", "augreg"]
        try:
            main([*arguments, "--num_attention_heads", "4"])
        except SystemExit as stop:
            printed = capsys.readouterr().err
            assert stop.code == 2 and printed.count("\n") == 1 and "Traceback" not in printed


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs and devices")
def test_fifo_device_and_folder_are_no_weight_files(tmp_path):
    os.mkfifo(tmp_path / "fifo.pth")
    assert "SOURCE: expected a file or a folder" in refusal(tmp_path, tmp_path / "fifo.pth")
    assert "SOURCE: expected a file or a folder" in refusal(tmp_path, "/dev/zero")
    for name, make in {
        "model.safetensors": os.mkfifo,
        "pytorch_model.bin": os.mkfifo,
        "model.pth": lambda path: path.mkdir(),
        "other.bin": lambda path: path.symlink_to("/dev/zero"),
    }.items():
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        make(folder / name)
        assert f"{name}: expected a regular file" in refusal(tmp_path, folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_fifo_beside_the_weights_is_not_read(checkpoint, tmp_path):
    folder = checkpoint[0].parent
    (folder / "README.md").unlink()
    os.mkfifo(folder / "README.md")
    convert(folder, tmp_path / "out")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "config.json: expected a file" in refusal(tmp_path, folder)


@pytest.mark.parametrize("limit", [1_000, 30_000])
@pytest.mark.parametrize("to", ["vit_simple", "timm", "transformers"])
def test_full_disk_is_one_line_and_leaves_nothing(checkpoint, tmp_path, capsys, limit, to):
    resource = pytest.importorskip("resource")
    folder, before = checkpoint[0].parent, set(tmp_path.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # larger files end as on a full disk
    try:
        with pytest.raises(SystemExit) as stop:
            main([str(folder), str(tmp_path / "new/out"), "--to", to])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    printed = capsys.readouterr().err
    assert stop.value.code == 1 and printed.count("\n") == 1 and "File too large" in printed
    assert set(tmp_path.rglob("*")) == before
