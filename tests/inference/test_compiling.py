"""Models that are compiled ahead of time give the same logits, in bfloat16 and int8 approximately.

The tests of int8 need torchao: `pip install -e ".[int8]" -c constraints.txt`. The `test` extra does not install it,
since transformers imports it if it is there, which takes a second in every process.
"""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import run_python, tiny
from vit_simple import ViTSimpleForImageClassification
from vit_simple.export import export
from vit_simple.inference.compiling import compile_inference

RUN_IN_ANOTHER_PROCESS = """
import sys, torch
import transformers.modeling_outputs
compiled = torch._inductor.aoti_load_package(sys.argv[1])
torch.save(compiled(torch.load(sys.argv[2])).logits, sys.argv[2])
"""


def test_compiled_file_gives_the_same_logits_for_any_batch_without_the_package(tmp_path):
    model = tiny(num_hidden_layers=2, drop_path_rate=0.5).train()
    compiled = compile_inference(model, tmp_path / "vit.pt2")
    assert model.training
    model.eval()
    for batch in (1, 2, 5):
        pixels = torch.randn(batch, 3, *[model.config.image_size] * 2)
        with torch.no_grad():
            expected = model(pixels).logits
        bound = {"rtol": 0, "atol": 1e-5 * expected.abs().max().item()}
        torch.testing.assert_close(compiled(pixels).logits, expected, **bound)
    torch.save(pixels, tmp_path / "pixels")
    run_python(sys.executable, tmp_path / "work", RUN_IN_ANOTHER_PROCESS, tmp_path / "vit.pt2", tmp_path / "pixels")
    torch.testing.assert_close(torch.load(tmp_path / "pixels"), expected, **bound)


def test_export_to_aot_compiles_and_measures_float32_and_bfloat16(run_folder, tmp_path):
    folder = Path(shutil.copytree(run_folder, tmp_path / "digits"))
    models = export(folder, to="aot", max_eval_samples=100)["models"]
    assert models["aot/model.pt2"]["difference"] < 1e-4 and models["aot/model.pt2"]["agreement"] == 1
    assert 0 < models["aot/model_bf16.pt2"]["difference"] < 0.5
    assert (folder / "aot/model.pt2").stat().st_size == models["aot/model.pt2"]["bytes"]
    assert "| aot/model.pt2 |" in (folder / "README.md").read_text()


def test_compiled_int8_is_close_to_float32(run_folder, tmp_path):
    pytest.importorskip("torchao")
    model = ViTSimpleForImageClassification.from_pretrained(run_folder)
    compiled = compile_inference(model, tmp_path / "digits.pt2", int8=True)
    pixels = torch.rand(500, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = model(pixels).logits
    logits = compiled(pixels).logits
    assert not torch.equal(logits, expected)
    assert (logits - expected).norm() < 0.05 * expected.norm()
    assert type(model.blocks[0].attn.qkv.weight) is torch.nn.Parameter  # a copy was quantized


def test_compile_in_int8_needs_torchao(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    model = tiny().train()
    with pytest.raises(ImportError, match="pip install torchao"):
        compile_inference(model, tmp_path / "vit.pt2", int8=True)
    assert model.training


def test_compile_checks_its_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"expected a file name that ends in \.pt2, got .*vit\.so"):
        compile_inference(tiny(), tmp_path / "vit.so")
    with pytest.raises(ValueError, match="expected a model on the CPU, got one on meta"):
        compile_inference(tiny().to("meta"), tmp_path / "vit.pt2", int8=True)
