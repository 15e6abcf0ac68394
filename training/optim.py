"""Learning rates, parameter groups, Muon and averaged weights; all of it also serves other training loops.

optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-3, weight_decay=0.05, layer_decay=0.65))
Trainer(model, arguments, optimizers=(optimizer, None), ...)
"""

import contextlib
import math
import re
from collections import defaultdict

import torch

SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")


def schedule(step: int, total_steps: int, warmup_steps: float, kind: str, decay_steps: float = 0.2) -> float:
    """The factor of the learning rate at a step, in [0, 1]: a linear rise, then the kind's way.

    Args:
        step, total_steps: from 0, and the number of them.
        warmup_steps: steps of the rise; below 1 a part of all steps.
        kind: "cosine" and "linear" fall to zero, "constant" stays, "warmup_stable_decay" stays and then falls linearly.
        decay_steps: steps of that fall; below 1 a part of all steps.
    """
    warmup = warmup_steps if warmup_steps >= 1 else warmup_steps * total_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    if kind == "warmup_stable_decay":
        decay = decay_steps if decay_steps >= 1 else decay_steps * total_steps
        return min(1.0, (total_steps - step) / max(decay, 1))
    rest = (step - warmup) / max(total_steps - warmup, 1)
    return 1 - rest if kind == "linear" else 0.5 * (1 + math.cos(math.pi * rest))


def layer_of(name: str, num_layers: int) -> int:
    """0 for patches, tokens and positions, 1 to `num_layers` for the blocks, one more for what follows them."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return num_layers + 1 if name.startswith(("norm.", "fc_norm.", "head.")) else 0


def parameter_groups(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict]:
    """Groups for an optimizer: kernels decay; biases, norms, LayerScale, tokens and positions do not.

    Args:
        model: a ViTSimple network; parameters that need no gradient are left out.
        learning_rate: of the last layer, the head.
        weight_decay: of kernels.
        layer_decay: each layer has the rate of the next one times this, in (0, 1]; 1: all have the same (used to
            fine-tune in He et al., 2021, arXiv:2111.06377, appendix A.1).
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        below = model.config.num_hidden_layers + 1 - layer_of(name, model.config.num_hidden_layers)
        decays = parameter.ndim >= 2 and name not in ("cls_token", "reg_token", "pos_embed")
        rate, decay = learning_rate * layer_decay**below, weight_decay if decays else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` (Jordan et al., 2024), one product for all matrices of a shape instead of one for each.

    The Newton-Schulz iteration runs in bfloat16 on an accelerator, as there, and in float32 on a CPU: most CPUs
    emulate bfloat16.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for parameters in shapes.values():
                self.update(parameters, group)
        return loss

    def update(self, parameters: list[torch.Tensor], group: dict):
        """One step for matrices of one shape."""
        rows, columns = parameters[0].shape
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        if group["nesterov"]:
            momenta = torch._foreach_lerp(gradients, momenta, group["momentum"])

        x = torch.stack(momenta)  # (matrices, rows, columns)
        x = x if x.device.type == "cpu" else x.bfloat16()
        x = x.mT if rows > columns else x
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
        a, b, c = group["ns_coefficients"]
        for _ in range(group["ns_steps"]):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        x = x.mT if rows > columns else x

        adamw_like = group["adjust_lr_fn"] == "match_rms_adamw"
        lr = group["lr"] * (0.2 * max(rows, columns) ** 0.5 if adamw_like else max(1, rows / columns) ** 0.5)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(x.to(parameters[0].dtype)), alpha=-lr)


def build_optimizers(
    model: torch.nn.Module,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    muon_learning_rate: float | None = None,
) -> list[torch.optim.Optimizer]:
    """AdamW on everything or, given its rate, Muon on the matrices of the blocks and AdamW on the rest."""
    matrices = {id(p) for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    optimizers = []
    for kind, rate in ((Muon, muon_learning_rate), (torch.optim.AdamW, learning_rate)):
        if rate is None:
            continue
        groups = parameter_groups(model, rate, weight_decay, layer_decay)
        if muon_learning_rate is not None:
            for group in groups:
                group["params"] = [p for p in group["params"] if (id(p) in matrices) == (kind is Muon)]
        groups = [group for group in groups if group["params"]]
        if groups:
            optimizers.append(kind(groups) if kind is Muon else kind(groups, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


class EMA:
    """The exponential moving average of a network's parameters, which can trade places with them.

    Args:
        model: its parameters are averaged; they need not be on one device.
        decay: the part of the average that stays at each step, in (0, 1), once (1 + step) / (10 + step) has reached it:
            the first steps weigh more, so that a short run is not left with its random start.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.names, self.parameters = zip(*model.named_parameters())
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int):
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, list(self.parameters), 1 - decay)

    @torch.no_grad()
    def swap(self):
        for parameter, average in zip(self.parameters, self.averages):
            held = parameter.clone()
            parameter.copy_(average)
            average.copy_(held)

    @contextlib.contextmanager
    def applied(self):
        """Within it, the network has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.averages))

    def load_state_dict(self, state: dict[str, torch.Tensor]):
        for name, average in zip(self.names, self.averages):
            average.copy_(state[name])
