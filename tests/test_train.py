import json
import os
import subprocess
import sys

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForImageClassification, pipeline

from conftest import tiny
from vit_simple.train import (
    ROOT,
    Muon,
    TrainConfig,
    build_model_config,
    build_optimizers,
    main,
    parameter_groups,
    parse_config,
    schedule,
)

SHORT = ["--num_train_epochs", "1", "--per_device_train_batch_size", "256"]


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


# A run


def test_a_run_leaves_a_complete_folder(run_folder):
    assert files(run_folder) == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "modeling_vit_simple.py",
        "configuration_vit_simple.py",
        "metrics.jsonl",
        "train_config.yaml",
    }
    model = AutoModelForImageClassification.from_pretrained(run_folder)
    assert model.config.id2label == {digit: str(digit) for digit in range(10)}
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows if row["split"] != "train"] == ["validation", "test"]
    train = [row for row in rows if row["split"] == "train"]
    assert train[-1]["step"] == 40 and train[-1]["epoch"] == 1 and train[0]["images_per_second"] > 0
    assert train[-1]["loss"] < train[0]["loss"] and train[-1]["lr"] < train[0]["lr"]


def test_the_pipeline_gets_as_many_test_images_right_as_the_run_said(run_folder):
    said = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    test = load_dataset(str(ROOT / "data/digits"), split="test")
    answers = pipeline("image-classification", model=str(run_folder), top_k=1)(list(test["image"]))
    right = sum(answer[0]["label"] == str(label) for answer, label in zip(answers, test["label"]))
    assert (said["split"], said["correct"], said["count"]) == ("test", right, 360)
    assert said["top1"] == right / 360 and said["top1"] <= said["top5"] <= 1


def test_its_recipe_repeats_a_run_bit_for_bit(run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([str(run_folder / "train_config.yaml")])
    main([str(run_folder / "train_config.yaml"), "--output_dir", str(tmp_path / "other"), "--seed", "1"])
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run_folder, tmp_path / "outputs/digits")]
    assert weights[0] == weights[1] != (tmp_path / "other/model.safetensors").read_bytes()


def test_folders_are_numbered_and_never_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        main(SHORT)
    assert files(tmp_path / "outputs") == {"digits", "digits-2"}
    line = f'pipeline("image-classification", "{tmp_path}/outputs/digits-2", trust_remote_code=True)'
    assert line in capsys.readouterr().out
    before = (tmp_path / "outputs/digits/model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="expected a new or an empty folder, got outputs/digits with files in it"):
        main([*SHORT, "--output_dir", "outputs/digits"])
    assert (tmp_path / "outputs/digits/model.safetensors").read_bytes() == before


def test_a_folder_of_other_pictures_trains_with_a_variant(tmp_path):
    from PIL import Image

    for name, shade in (("dark", 40), ("light", 210)):
        for number in range(6):
            path = tmp_path / "pictures/train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (20 + number, 30), shade + number).save(path)
    main(
        [
            *["--dataset_name", str(tmp_path / "pictures"), "--output_dir", str(tmp_path / "run")],
            *["--variant", "notebook/8", "--image_size", "16", "--num_train_epochs", "8", "--train_val_split", "0.34"],
            *["--per_device_train_batch_size", "3", "--learning_rate", "1e-3", "--lr_scheduler_type", "linear"],
        ]
    )
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["split"] == "validation" and rows[-1]["top1"] == 1.0
    answer = pipeline("image-classification", model=str(tmp_path / "run"))(Image.new("RGB", (9, 9), (200, 200, 200)))
    assert answer[0]["label"] == "light"


def test_two_processes_share_each_step(tmp_path):
    plain = [f"--affine_{name}=0" for name in ("degrees", "translate", "scale", "shear")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    cpu = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    losses = []
    for processes, batch in ((1, 64), (2, 32)):
        folder = tmp_path / str(processes)
        script = [ROOT / "train.py", "--num_train_epochs", "1", "--per_device_train_batch_size", str(batch)]
        command = [*launch, str(processes), *script, *plain, "--logging_steps", "1", "--output_dir", folder]
        result = subprocess.run(command, cwd=tmp_path, env=cpu, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("saved in") == result.stdout.count("step 20: validation") == 1
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


# Options


def test_the_command_line_wins_over_the_recipe_over_the_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1e-3\nseed: 3\nnum_train_epochs: 7\nmodel: {image_size: 8, patch_size: 2}\n")
    config = parse_config([str(recipe), "--seed", "4", "--output_dir", "x"])
    assert (config.learning_rate, config.seed, config.num_train_epochs) == (1e-3, 4, 7)
    assert config.model == {"image_size": 8, "patch_size": 2} and config.output_dir == "x"
    assert config.weight_decay == TrainConfig().weight_decay


def test_the_digits_recipe_runs_only_when_nothing_else_is_named():
    assert parse_config(["--seed", "1"]).optim == "muon"
    assert parse_config(["--dataset_name", "cifar10"]) == TrainConfig(dataset_name="cifar10")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning_rat", "1"], "command line: '--learning_rat' is not known, did you mean 'learning_rate'?"),
        (["--lr=1"], "command line: '--lr' is not known"),
        (["--zzz", "1"], "command line: '--zzz' is not known"),
        (["--seed", "x"], "--seed: expected int, got 'x'"),
        (["--seed"], "command line: argument --seed: expected one argument"),
        (["--seed", "1.5"], "--seed: expected int, got '1.5'"),
        (["--optim", "sgd"], "--optim: expected adamw or muon, got 'sgd'"),
        (["--num_train_epochs", "0"], "--num_train_epochs: expected at least 1, got 0"),
        (["--per_device_train_batch_size", "-1"], "--per_device_train_batch_size: expected at least 1, got -1"),
        (["--eval_steps", "0"], "--eval_steps: expected at least 1, got 0"),
        (["--learning_rate", "nan"], "--learning_rate: expected a number that is not negative, got nan"),
        (["--train_val_split", "1"], "--train_val_split: expected a number between 0 and 1, got 1.0"),
        (["--affine_scale", "1"], "--affine_scale: expected a number in [0, 1), got 1.0"),
        (["--label_smoothing_factor", "1"], "--label_smoothing_factor: expected a number in [0, 1), got 1.0"),
        (["--model", "[1]"], "--model: expected dict, got '[1]'"),
        (["--variant", "S/16", "--model", "{}"], "expected neither beside a model mapping"),
        (["--variant", ""], "variant: expected NAME/PATCH"),
        (["--image_size", "0"], "--image_size: expected at least 1, got 0"),
        (["--seed", "-1"], "--seed: expected a number that is not negative, got -1"),
        (["nowhere.yaml"], "recipe: nowhere.yaml cannot be read: "),
    ],
)
def test_a_wrong_option_is_one_readable_line(arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert str(stop.value).startswith("train.py: error: ") and message in str(stop.value)
    assert "\n" not in str(stop.value)


def test_a_variant_from_the_command_line_replaces_the_network_of_the_recipe():
    config = parse_config(["--variant", "Ti/4", "--image_size", "8"])
    assert (config.model, config.variant, config.optim) == (None, "Ti/4", "muon")


def test_numbers_and_words_that_yaml_misreads_are_understood(tmp_path):
    (tmp_path / "recipe.yaml").write_text("mixed_precision: no\nmodel: {layerscale_value: 1e-5, pooling: mean}\n")
    config = parse_config([str(tmp_path / "recipe.yaml")])
    network = build_model_config(config, ["a", "b"])
    assert (config.mixed_precision, network.layerscale_value, network.pooling) == ("no", 1e-5, "mean")


@pytest.mark.parametrize(
    "text, message",
    [
        ("1: 2", "1 is not known"),
        ("sed: 1", "'sed' is not known, did you mean 'seed'?"),
        ("seed: true", "--seed: expected int, got True"),
        ("seed: null", "--seed: expected int, got None"),
        ("learning_rate: [1]", "--learning_rate: expected float, got [1]"),
        ("- 1", "expected a mapping of options in"),
        ("a: b: c", "cannot be read"),
        ("model: {hiden_size: 3}", "--model: 'hiden_size' is not known, did you mean 'hidden_size'?"),
        ("model: {image_size: 8, patch_size: 3}", "image_size: expected a multiple of patch_size=3, got 8"),
        ("model: {num_channels: 1}", "expected num_channels 3, since every image becomes RGB, got 1"),
    ],
)
def test_a_wrong_recipe_is_one_readable_line(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run")])
    assert message in str(stop.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset_name", "no/such/folder"], "--dataset_name: 'no/such/folder' cannot be loaded"),
        (["--image_column_name", "picture"], "--image_column_name: expected the Image column 'picture'"),
        (["--per_device_train_batch_size", "2000"], "expected at most 1293, a step's share of the training images"),
        (["--output_dir", "file/run"], "--output_dir: file/run cannot be written: Not a directory"),
        (["--output_dir", "file"], "--output_dir: file cannot be written: File exists"),
    ],
)
def test_what_cannot_start_leaves_nothing_behind(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert message in str(stop.value)
    assert files(tmp_path) == {"file"} and (tmp_path / "file").read_text() == "kept"


def test_an_error_exits_with_a_code_and_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--sed", "1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == "train.py: error: command line: '--sed' is not known, did you mean 'seed'?\n"


def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name, default in vars(TrainConfig()).items():
        assert f"--{name} " in printed and (default is None or f"({default})" in printed)


def test_a_variant_has_the_defaults_of_the_paper():
    config = build_model_config(TrainConfig(), ["cat", "dog"])
    assert (config.hidden_size, config.patch_size, config.image_size, config.num_labels) == (384, 16, 224, 2)
    assert config.id2label == {0: "cat", 1: "dog"} and config.label2id == {"cat": 0, "dog": 1}


# Optimisation


def test_the_rate_rises_then_falls_to_zero():
    for kind, middle in (("cosine", 0.5), ("linear", 0.5)):
        factors = [schedule(step, 110, 10, kind) for step in range(111)]
        assert factors[:10] == sorted(factors[:10]) and 0 < factors[0] < 0.1
        assert factors[10] == 1 and factors[60] == pytest.approx(middle) and factors[110] == pytest.approx(0)
        assert factors[10:] == sorted(factors[10:], reverse=True)
    assert schedule(20, 110, 10, "cosine") > schedule(20, 110, 10, "linear")
    assert [schedule(step, 100, 0.1, "linear") for step in range(100)] == [
        schedule(step, 100, 10, "linear") for step in range(100)
    ]
    assert schedule(0, 100, 0, "linear") == 1


def test_only_kernels_decay():
    model = tiny(num_register_tokens=2, layerscale_value=0.1)
    kernels, others = parameter_groups(model, weight_decay=0.3)
    assert (kernels["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying = {names[id(parameter)] for parameter in kernels["params"]}
    matrices = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = {f"blocks.{block}.{name}.weight" for block in range(3) for name in matrices}
    assert decaying == {"patch_embed.proj.weight", "head.weight"} | blocks
    assert len(kernels["params"]) + len(others["params"]) == len(names)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = tiny()
    muon, adamw = build_optimizers(model, TrainConfig(optim="muon", muon_learning_rate=0.5, learning_rate=0.25))
    assert len(muon.param_groups[0]["params"]) == 12 and muon.param_groups[0]["peak_lr"] == 0.5
    rest = [parameter for group in adamw.param_groups for parameter in group["params"]]
    assert len(rest) == len(list(model.parameters())) - 12 and adamw.param_groups[1]["peak_lr"] == 0.25
    (adamw,) = build_optimizers(model, TrainConfig(optim="adamw"))
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("option", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}, {"ns_steps": 3}])
def test_muon_steps_as_torchs_does_up_to_its_bfloat16(option):
    torch.manual_seed(0)
    shapes = [(48, 16), (48, 16), (16, 48), (16, 16)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.2, **option}
    optimizers = [Muon(ours, **options), torch.optim.Muon(theirs, **options)]
    for _ in range(3):
        for our, their in zip(ours, theirs):
            our.grad = torch.randn_like(our)
            their.grad = our.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for our, their in zip(ours, theirs):
        assert (our - their).norm() < 0.03 * (their - 1).norm()
    assert [set(optimizer.state[optimizer.param_groups[0]["params"][0]]) for optimizer in optimizers] == [
        {"momentum_buffer"}
    ] * 2
