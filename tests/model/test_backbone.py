"""ViTSimpleBackbone, which AutoBackbone opens, and transformers' models of dense tasks that are built on it."""

import json
import subprocess

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.conftest import EVERY_SWITCH, TINY, environment_without_package, tiny
from tests.conversion.parity import random
from tests.fake_hub.hub import Hub
from vit_simple import ViTSimpleBackbone, ViTSimpleConfig, ViTSimpleModel
from vit_simple.conversion.transformers import from_transformers
from vit_simple.files import ROOT

OPEN_AND_TRAIN = """
import torch
from transformers import AutoBackbone, AutoConfig, DPTConfig, DPTForDepthEstimation
from transformers import UperNetConfig, UperNetForSemanticSegmentation

pixels, classes = torch.randn(2, 3, 24, 18), torch.randint(3, (2, 24, 18))
stages = {"out_indices": [0, 1, 2, 3]}
backbone = AutoBackbone.from_pretrained("user/vit", trust_remote_code=True, **stages)
assert type(backbone).__module__.startswith("transformers_modules.")
torch.save([pixels, *backbone(pixels).feature_maps], "maps.pt")

import vit_simple

backbone, info = AutoBackbone.from_pretrained("user/vit", output_loading_info=True, **stages)
assert type(backbone) is vit_simple.ViTSimpleBackbone
assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))

config = AutoConfig.from_pretrained("user/vit", **stages)
upernet = UperNetConfig(backbone_config=config, num_labels=3, hidden_size=16, auxiliary_channels=16)
upernet = UperNetForSemanticSegmentation(upernet)
config = AutoConfig.from_pretrained("user/vit", reshape_hidden_states=False, **stages)
dpt = DPTConfig(backbone_config=config, neck_hidden_sizes=[8] * 4, fusion_hidden_size=16)
dpt = DPTForDepthEstimation(dpt)
torch.nn.init.ones_(dpt.head.head[-2].bias)  # so that the ReLU after it lets gradients through

for model in (upernet, dpt):
    model.train().backbone.load_state_dict(backbone.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-15)  # the first gradients are tiny
    loss = model(pixels, labels=classes).loss if model is upernet else model(pixels).predicted_depth.mean()
    loss.backward()
    optimizer.step()
    for name, parameter in model.backbone.named_parameters():
        assert not torch.equal(parameter, backbone.state_dict()[name]), name
    model.eval().save_pretrained("saved")
    torch.testing.assert_close(type(model).from_pretrained("saved")(pixels)[0], model(pixels)[0])
"""


@pytest.mark.slow
def test_auto_backbone_opens_a_hub_repository_and_dense_models_train_on_it(tmp_path, version):
    tiny(num_register_tokens=2, layerscale_value=0.1).save_pretrained(tmp_path / "vit")
    files = {file.name: file.read_bytes() for file in (tmp_path / "vit").iterdir()}
    python = environment_without_package(tmp_path / "environment", version)
    for folder in ("packages", "work"):
        (tmp_path / folder).mkdir()
    (tmp_path / "packages/vit_simple").symlink_to(ROOT)
    with Hub({}) as hub:
        hub.create("models/user/vit", files)
        environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(tmp_path / "packages")}
        command = [python, "-c", OPEN_AND_TRAIN]
        result = subprocess.run(command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pixels, *maps = torch.load(tmp_path / "work/maps.pt")
    backbone = ViTSimpleBackbone.from_pretrained(tmp_path / "vit", out_indices=[0, 1, 2, 3])
    torch.testing.assert_close(maps, list(backbone(pixels).feature_maps))


@pytest.mark.parametrize("reshape", [True, False])
def test_feature_maps_are_those_of_dinov2_backbone(tmp_path, reshape):
    fields = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    fields |= {"out_features": ["stem", "stage1", "stage3"], "reshape_hidden_states": reshape}
    theirs = random(transformers.Dinov2Backbone(transformers.Dinov2Config(**fields)))
    theirs.save_pretrained(tmp_path)
    config, tensors = from_transformers(theirs.config, load_file(tmp_path / "model.safetensors"), [])
    config.update({name: fields[name] for name in ("out_features", "reshape_hidden_states")})
    ours = ViTSimpleBackbone(config).eval()
    ours.load_state_dict(tensors)
    pixels = torch.randn(2, 3, 18, 19)  # the last pixels are cut off
    with torch.no_grad():
        maps, expected = ours(pixels).feature_maps, theirs(pixels).feature_maps
    assert len(maps) == 3 and maps[0].shape == ((2, 32, 4, 4) if reshape else (2, 17, 32))
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def test_feature_maps_are_the_tokens_of_the_model_without_prefix_and_partial_patches():
    model = tiny(**EVERY_SWITCH)
    backbone = ViTSimpleBackbone(model.config).eval()
    backbone.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "head" not in name})
    pixels = torch.randn(2, 3, 27, 18)  # patches of 4
    with torch.no_grad():
        (maps,) = backbone(pixels).feature_maps
        tokens = ViTSimpleModel.forward(model, pixels[:, :, :24, :16], True).last_hidden_state
    assert backbone.out_features == ["stage3"] and backbone.channels == [32]
    assert maps.shape == (2, 32, 6, 4)
    assert torch.equal(maps.flatten(2).transpose(1, 2), tokens[:, 3:])


@pytest.mark.parametrize("use_class_token", [True, False])
def test_tokens_for_dpt_are_the_class_token_or_the_mean_and_the_patches_without_registers(pixels, use_class_token):
    fields = {**EVERY_SWITCH, "use_class_token": use_class_token}
    maps, tokens = (
        ViTSimpleBackbone(ViTSimpleConfig(**TINY, **fields, reshape_hidden_states=reshape)).eval()
        for reshape in (True, False)
    )
    tokens.load_state_dict(maps.state_dict())
    with torch.no_grad():
        (patches,), (tokens,) = maps(pixels).feature_maps, tokens(pixels).feature_maps
        last = maps(pixels, output_hidden_states=True).hidden_states[-1]
    patches = patches.flatten(2).transpose(1, 2)
    assert torch.equal(tokens[:, 1:], patches)
    expected = maps.norm(last)[:, 0] if use_class_token else patches.mean(dim=1)
    torch.testing.assert_close(tokens[:, 0], expected)


def test_backbone_returns_hidden_states_only_when_asked(pixels):
    backbone = ViTSimpleBackbone(ViTSimpleConfig(**TINY))
    assert backbone(pixels).keys() == {"feature_maps"}
    assert len(backbone(pixels, output_hidden_states=True).hidden_states) == 4
    outputs = backbone.forward_with_filtered_kwargs(pixels, output_hidden_states=True, num_items_in_batch=6)
    assert len(outputs.hidden_states) == 4


def test_saved_backbone_keeps_its_stages_and_a_classifier_names_none(tmp_path):
    ViTSimpleBackbone(ViTSimpleConfig(**TINY, out_features=["stage2"])).save_pretrained(tmp_path)
    assert ViTSimpleBackbone.from_pretrained(tmp_path).out_indices == [2]
    other = ViTSimpleBackbone.from_pretrained(tmp_path, out_features=None, out_indices=[0, -1])
    assert (other.out_features, other.out_indices, other.channels) == (["stem", "stage3"], [0, 3], [32, 32])
    tiny().save_pretrained(tmp_path)
    assert not any(name.startswith("out_") for name in json.loads((tmp_path / "config.json").read_text()))


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"out_features": ["stage4"]},
            r"out_features: expected .* from 'stem' and 'stage1' to 'stage3', got \['stage4'",
        ),
        ({"out_features": "stage1"}, "out_features: expected None or a list"),
        ({"out_indices": [4]}, r"out_indices: expected .* got \[4\]"),
        ({"out_indices": []}, "out_indices: expected None or a list"),
        ({"out_features": ["stage1"], "out_indices": [1]}, "out_indices: expected None when out_features is given"),
        ({"reshape_hidden_states": 0}, "reshape_hidden_states: expected True or False, got 0"),
    ],
)
def test_stages_that_do_not_exist_are_one_error(fields, message):
    with pytest.raises(ValueError, match=message):
        ViTSimpleConfig(**TINY, **fields)
    config = ViTSimpleConfig(**TINY)
    config.update(fields)  # as from_pretrained does with its keywords
    with pytest.raises(ValueError, match=message):
        ViTSimpleBackbone(config)
