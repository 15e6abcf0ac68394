"""Lets `import torchvision` succeed where its compiled part does not load, as beside a CPU build of torch.

Put beside a .pth file that imports it into a virtual environment's site-packages. torchvision's Python part is enough
for image processors, but its import describes two operators of the compiled part, which must exist by then.
"""

import importlib.abc
import sys

OPERATORS = ("nms", "qnms")


class DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations":  # the module that describes them
            import torch

            for operator in OPERATORS:
                if not hasattr(torch.ops.torchvision, operator):
                    schema = "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor"
                    torch.library.define(f"torchvision::{operator}", schema)
        return None  # the next finder finds it


sys.meta_path.insert(0, DeclareOperators())
