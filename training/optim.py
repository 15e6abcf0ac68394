"""Learning rate schedule, parameter groups, Muon and averaged weights, also for other training loops:

optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-3, weight_decay=0.05, layer_decay=0.65))
Trainer(model, arguments, optimizers=(optimizer, None), ...)
"""

import contextlib
import math
import re
from collections import defaultdict

import torch
from transformers import PreTrainedModel

SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")


def schedule(step: int, total_steps: int, warmup_steps: float, kind: str, decay_steps: float = 0.2) -> float:
    """The factor of the learning rate at a step, in [0, 1]: linear warmup, then the schedule.

    Args:
        step: from 0 to total_steps - 1.
        warmup_steps: a number of steps or, below 1, a fraction of all steps.
        kind: "cosine" and "linear" fall to zero, "constant" stays at 1, "warmup_stable_decay" stays at 1 and then falls
            linearly to zero.
        decay_steps: length of that fall, a number of steps or, below 1, a fraction of all steps.
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
    """The depth of a parameter: 0 for the embeddings, 1 to `num_layers` for the blocks, `num_layers` + 1 after them."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return num_layers + 1 if name.startswith(("norm.", "fc_norm.", "head.")) else 0


def parameter_groups(
    model: PreTrainedModel, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict]:
    """Parameter groups for an optimizer. Weight matrices decay; biases, norms, LayerScale, tokens and positions do not.

    Args:
        model: a ViTSimple model; frozen parameters are left out.
        learning_rate: of the last layer, the head.
        weight_decay: of the weight matrices.
        layer_decay: in (0, 1]; the learning rate of each layer is that of the next layer times this factor (He et al.,
            2021, arXiv:2111.06377, appendix A.1). 1: the same learning rate everywhere.
    """
    groups = {}
    num_layers = model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = learning_rate * layer_decay ** (num_layers + 1 - layer_of(name, num_layers))
        is_matrix = parameter.ndim >= 2 and name not in ("cls_token", "reg_token", "pos_embed")
        decay = weight_decay if is_matrix else 0.0
        group = groups.setdefault((lr, decay), {"params": [], "lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` (Jordan et al., 2024) with one batched product for all matrices of the same shape.

    The Newton-Schulz iteration runs in bfloat16 on an accelerator, as in torch, but in float32 on a CPU, because most
    CPUs emulate bfloat16.
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
        """One step for matrices of the same shape."""
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
    model: PreTrainedModel,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    muon_learning_rate: float | None = None,
) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters or, given its learning rate, Muon for the matrices of the blocks and AdamW for the rest.

    Each parameter group keeps its highest learning rate as "peak_lr".
    """
    matrices = {id(p) for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    optimizers: list[torch.optim.Optimizer] = []
    for optimizer_class, peak_lr in ((Muon, muon_learning_rate), (torch.optim.AdamW, learning_rate)):
        if peak_lr is None:
            continue
        groups = parameter_groups(model, peak_lr, weight_decay, layer_decay)
        if muon_learning_rate is not None:
            for group in groups:
                group["params"] = [p for p in group["params"] if (id(p) in matrices) == (optimizer_class is Muon)]
        groups = [group for group in groups if group["params"]]
        if groups:
            options: dict = {} if optimizer_class is Muon else {"fused": True}
            optimizers.append(optimizer_class(groups, **options))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]  # checkpoints contain this name
    return optimizers


class EMA:
    """An exponential moving average of a model's parameters, which can be swapped into the model.

    The decay is at most (1 + step) / (10 + step), so that the average soon forgets the initial weights.

    Args:
        model: any module; its parameters may be on several devices.
        decay: in [0, 1), the fraction of the average that a step keeps. None: nothing is averaged, and the raw weights
            are the only variant.
    """

    def __init__(self, model: torch.nn.Module, decay: float | None):
        self.decay = decay
        self.variants = ("raw",) if decay is None else ("raw", "ema")
        self.parameters = {} if decay is None else dict(model.named_parameters())
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int):
        """Moves the averages toward the parameters after a step, counted from 0."""
        if self.averages:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)

    @torch.no_grad()
    def swap(self):
        for name, average in self.averages.items():
            raw = self.parameters[name].clone()
            self.parameters[name].copy_(average)
            average.copy_(raw)

    @contextlib.contextmanager
    def weights(self, variant: str):
        """In this context, the model has the weights of a variant: "raw" or "ema"."""
        if variant == "raw":
            yield
            return
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.averages)

    def load_state_dict(self, state: dict[str, torch.Tensor]):
        for name, average in self.averages.items():
            average.copy_(state[name])
