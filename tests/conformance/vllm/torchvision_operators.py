"""`sitecustomize` of vLLM's environment: lets torchvision be imported beside a torch for CPU.

The registry's torchvision is a CUDA build. Its compiled operators do not load, and its Python half wants two of them
declared; vLLM uses neither.
"""

import importlib.abc
import sys


class Declare(importlib.abc.MetaPathFinder):
    """Acts once, when torchvision is about to be imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            keep.append(self)


keep = []
sys.meta_path.insert(0, Declare())
