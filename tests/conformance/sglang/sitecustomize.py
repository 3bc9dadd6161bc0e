"""Lets SGLang be imported beside a CPU torch: its kernels are there in name, and fail when they are called.

`sgl_kernel` and its CPU operators are stood in for; torchvision's wheel of PyPI needs CUDA to register its operators.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any


class Missing:
    """A kernel, or a namespace of kernels."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self._name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> None:
        raise RuntimeError(f"{self._name} is a kernel that is not here")


class Kernels(types.ModuleType):
    __version__ = "99.0"

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.__name__}.{name}")


class Operators:
    """`torch.ops.sgl_kernel`: SGLang looks the CPU ones up, and the others only to find out whether they are there."""

    def __getattr__(self, name: str) -> Missing:
        if name.endswith("_cpu"):
            return Missing(f"torch.ops.sgl_kernel.{name}")
        raise AttributeError(name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self) -> None:
        self._libraries: list[Any] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name == "torchvision":
            self._register()
        if name.partition(".")[0] != "sgl_kernel":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Kernels(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass

    def _register(self) -> None:
        if not self._libraries:
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            self._libraries.append(library)
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torch.ops.sgl_kernel = Operators()


sys.meta_path.insert(0, Finder())
