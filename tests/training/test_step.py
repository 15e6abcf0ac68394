"""The fast path of a training step. Tests that need a GPU run there by benchmarks/gpu.sh."""

import json

import pytest
import torch
from safetensors.torch import load_file

from vit_simple import ViTSimpleForImageClassification
from vit_simple.data.augment import Augment
from vit_simple.data.processors import open_processor
from vit_simple.data.randaugment import DRAWS_VERSION
from vit_simple.train import main
from vit_simple.training.config import TrainConfig
from vit_simple.training.setup import processor_content

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EVERYTHING = {"crop_padding": 2, "horizontal_flip": 0.5, "affine_degrees": 10.0, "randaugment_num_ops": 2}
EVERYTHING |= {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing_factor": 0.1}
RUN = ["--mixed_precision", "bf16", "--torch_compile", "true", "--initialization", "mimetic", "--logging_steps", "5"]
RUN += ["--randaugment_num_ops", "2", "--mixup_alpha", "0.5", "--cutmix_alpha", "1", "--drop_path_rate", "0"]
RUN += ["--random_erasing", "0.3", "--eval_steps", "20"]


@pytest.fixture
def augment():
    processor = open_processor(processor_content(TrainConfig(), (32, 32), cropped=False))
    return Augment(processor, 10, **EVERYTHING)


@gpu
def test_augmentation_on_a_gpu_equals_that_on_the_cpu_and_never_waits(augment):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (256,), generator=generator)
    torch.manual_seed(0)
    expected, expected_targets = augment(pixels, labels)
    pixels, labels, augment = pixels.cuda(), labels.cuda(), augment.cuda()
    for compiled in (False, True):
        if compiled:
            augment.compile()
            augment(pixels, labels)
        torch.cuda.synchronize()
        torch.manual_seed(0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            x, targets = augment(pixels, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        different = ((x.cpu() - expected).abs() > 0.02).float().mean()  # a level may round the other way
        assert different < 0.01, f"compiled {compiled}: {different:.2%} of the pixels differ"
        torch.testing.assert_close(targets.cpu(), expected_targets)


@gpu
def test_resumed_run_on_a_gpu_equals_one_that_never_stopped(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = [*RUN, "--max_steps", "40", "--save_steps", "20"]
    main([*run, "--output_dir", str(whole)])
    main([*run, "--output_dir", str(parts)])
    same = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert all(torch.equal(tensor, same[1][name]) for name, tensor in same[0].items()), "two equal runs differ"
    main(
        [
            *RUN,
            "--max_steps",
            "40",
            "--save_steps",
            "20",
            "--resume_from_checkpoint",
            str(parts / "checkpoints/step_000020"),
        ]
    )
    resumed = load_file(parts / "model.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in same[0].items()), "the resumed run differs"


@gpu
def test_evaluation_in_bfloat16_agrees_with_float32(tmp_path):
    run = tmp_path / "run"
    main([*RUN, "--num_train_epochs", "10", "--output_dir", str(run)])
    scored = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    network = ViTSimpleForImageClassification.from_pretrained(run).cuda().eval()
    pixels = torch.randn(512, 3, 8, 8, device="cuda")
    with torch.no_grad():
        exact = network(pixels).logits
        with torch.autocast("cuda", torch.bfloat16):
            rounded = network(pixels).logits.float()
    assert scored["count"] == 360 and (exact.argmax(1) == rounded.argmax(1)).float().mean() > 0.97


def resumed_from_older_draws(folder, *options):
    """Resumes a run whose checkpoint is from before draws had a version."""
    run = ["--max_steps", "6", "--save_steps", "3", "--output_dir", str(folder), *options]
    main(run)
    state = folder / "checkpoints/step_000003/state.json"
    older = json.loads(state.read_text())
    assert older.pop("draws") == DRAWS_VERSION and older.pop("data")  # older checkpoints have neither these nor hashes
    state.write_text(json.dumps(older))
    (state.parent / "SHA256SUMS").unlink()
    main([*run, "--resume_from_checkpoint", str(folder / "checkpoints/step_000003")])


def test_run_without_randaugment_resumes_from_a_checkpoint_with_older_draws(tmp_path):
    resumed_from_older_draws(tmp_path / "run", "--crop_padding", "1", "--random_erasing", "0.2", "--mixup_alpha", "0.5")


def test_run_with_randaugment_is_not_resumed_with_other_draws(tmp_path):
    with pytest.raises(SystemExit, match="version 1 of RandAugment's random numbers, and this is version"):
        resumed_from_older_draws(tmp_path / "run", "--randaugment_num_ops", "1")


def test_compiling_without_a_compiler_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"--torch_compile needs a C\+\+ compiler"):
        main(["--torch_compile", "true", "--output_dir", str(tmp_path / "run")])
