"""Act on a module at the moment the script imports it: nothing is imported before, no environment variable read early.

A script may set `HF_HOME` or `CUDA_VISIBLE_DEVICES` above its imports; importing transformers for it would break that.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

__all__ = ["when_imported"]

Action = Callable[[ModuleType], None]


def when_imported(actions: Mapping[str, Action]) -> None:
    """Call each action with its module right after the module has run; at once for those already imported."""
    later = {}
    for name, action in actions.items():
        if name in sys.modules:
            action(sys.modules[name])
        else:
            later[name] = action
    sys.meta_path.insert(0, _Finder(later))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it asks the others and puts the action behind the loader they name."""

    def __init__(self, actions: dict[str, Action]) -> None:
        self._actions = actions

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._actions:
            return None
        action = self._actions.pop(fullname)  # so that the question below does not come back here
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            self._actions[fullname] = action
            return None
        _act_after(spec.loader, action)
        return spec


def _act_after(loader: Any, action: Action) -> None:
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        action(module)

    loader.exec_module = exec_module
