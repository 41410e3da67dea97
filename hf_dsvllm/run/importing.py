"""Act on a module at the moment the script imports it: nothing is imported before, no environment variable read early.

A script may set `HF_HOME` or `CUDA_VISIBLE_DEVICES` above its imports; importing transformers for it would break that.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

__all__ = ["when_imported"]

Action = Callable[[ModuleType], None]


def when_imported(actions: Mapping[str, Action]) -> None:
    """Call each action with its module whenever the module has run; at once for those already imported."""
    later = {}
    for name, action in actions.items():
        if name in sys.modules:
            action(sys.modules[name])
        else:
            later[name] = action
    sys.meta_path.insert(0, _Finder(later))


class _Questions(threading.local):
    """The names this thread is asking the other finders for: those questions must not come back to us."""

    def __init__(self) -> None:
        self.open: set[str] = set()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it asks the others and puts the action behind the loader they name."""

    def __init__(self, actions: dict[str, Action]) -> None:
        self._actions = actions
        self._questions = _Questions()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._actions or fullname in self._questions.open:
            return None
        self._questions.open.add(fullname)
        try:
            others = (finder for finder in list(sys.meta_path) if finder is not self)
            specs = (finder.find_spec(fullname, path, target) for finder in others)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self._questions.open.discard(fullname)
        if spec is None or spec.loader is None:
            return None
        # The action stays: a script may look for a module, which comes by here, and import it later.
        _act_after(spec.loader, self._actions[fullname])
        return spec


def _act_after(loader: Any, action: Action) -> None:
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        action(module)

    loader.exec_module = exec_module
