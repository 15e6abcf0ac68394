import pytest
import torch

from tests.conftest import tiny
from vit_simple.training.optim import EMA, Muon, build_optimizers, parameter_groups, schedule

EVERY_KIND = {"num_register_tokens": 2, "layerscale_value": 0.1}


def test_schedule_rises_then_falls_to_zero():
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


def test_schedule_constant_stays_and_stable_falls_at_the_end():
    assert [schedule(step, 100, 10, "constant") for step in (10, 50, 99)] == [1, 1, 1]
    factors = [schedule(step, 100, 10, "warmup_stable_decay", 0.2) for step in range(101)]
    assert factors[10:81] == [1] * 71 and factors[90] == pytest.approx(0.5) and factors[100] == 0
    assert factors == [schedule(step, 100, 0.1, "warmup_stable_decay", 20) for step in range(101)]
    for kind in ("constant", "warmup_stable_decay"):
        assert schedule(4, 100, 10, kind) == pytest.approx(5 / 11)


def test_weight_decay_applies_to_matrices_only():
    model = tiny(**EVERY_KIND)
    others, matrices_group = parameter_groups(model, learning_rate=0.5, weight_decay=0.3)
    assert (matrices_group["weight_decay"], others["weight_decay"]) == (0.3, 0.0) and matrices_group["lr"] == others[
        "lr"
    ] == 0.5
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying = {names[id(parameter)] for parameter in matrices_group["params"]}
    matrices = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = {f"blocks.{block}.{name}.weight" for block in range(3) for name in matrices}
    assert decaying == {"patch_embed.proj.weight", "head.weight"} | blocks
    assert len(matrices_group["params"]) + len(others["params"]) == len(names)


def test_layer_decay_multiplies_the_learning_rate_of_the_next_layer():
    model = tiny(**EVERY_KIND)
    rates = {}
    for group in parameter_groups(model, learning_rate=1.0, weight_decay=0.1, layer_decay=0.5):
        rates |= {id(parameter): group["lr"] for parameter in group["params"]}
    depth = {"head": 0, "norm": 0, "fc_norm": 0, "blocks.2": 1, "blocks.1": 2, "blocks.0": 3}
    for name, parameter in model.named_parameters():
        below = next((depth[start] for start in depth if name.startswith(f"{start}.")), 4)
        assert rates[id(parameter)] == 0.5**below, name


def test_parameter_groups_leave_out_frozen_parameters():
    model = tiny()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.1)
    assert [len(group["params"]) for group in groups] == [1, 1]
    (adamw,) = build_optimizers(model, 1.0, 0.1, muon_learning_rate=0.5)  # which has no matrix to take
    assert isinstance(adamw, torch.optim.AdamW)


def test_optimizers_split_parameters_between_muon_and_adamw():
    model = tiny()
    muon, adamw = build_optimizers(model, 0.25, 0.05, layer_decay=0.5, muon_learning_rate=0.5)
    matrices = [parameter for group in muon.param_groups for parameter in group["params"]]
    assert len(matrices) == 12 and {p.ndim for p in matrices} == {2}
    assert sorted(group["peak_lr"] for group in muon.param_groups) == [0.0625, 0.125, 0.25]  # one for each block
    rest = [parameter for group in adamw.param_groups for parameter in group["params"]]
    assert len(rest) == len(list(model.parameters())) - 12 and max(g["peak_lr"] for g in adamw.param_groups) == 0.25
    (adamw,) = build_optimizers(model, 0.25, 0.05)
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("option", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}, {"ns_steps": 3}])
def test_muon_steps_like_torch_up_to_bfloat16(option):
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


def test_ema_follows_the_weights_and_swaps_with_them():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    averaged, expected = EMA(model, decay=0.5), 1.0
    for step in range(20):
        model.weight.data.fill_(step)
        averaged.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with averaged.weights("ema"):
        assert model.weight.item() == pytest.approx(expected) and 17 < expected < 19
    assert model.weight.item() == 19 and averaged.state_dict()["weight"].item() == pytest.approx(expected)

    other = EMA(model, decay=0.5)
    other.load_state_dict(averaged.state_dict())
    assert torch.equal(other.averages["weight"], averaged.averages["weight"]) and model.weight.item() == 19


def test_ema_without_decay_has_only_raw_weights():
    model = torch.nn.Linear(1, 1)
    ema = EMA(model, None)
    ema.update(0)
    with ema.weights("raw"):
        assert ema.variants == ("raw",) and ema.state_dict() == {}
