"""Taps selected parts of outputs and inputs, such as ``lstm[0]``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from convtap._record.keeper import is_held_elsewhere
from convtap._record.policy import is_plain_structure
from convtap._record.recorder import Recorder
from convtap._result.log import Log
from convtap._select.parts import no_part
from convtap._select.selection import Selection
from convtap._taps.modules import as_input
from convtap._tensors.memory import shares_memory
from convtap._tensors.nested import MISSING, part_of, walk_tensors, with_part
from convtap._torch.hooks import Hooks
from convtap._torch.storage import is_copy_on_write


class Parted:
    """Passes outputs, or selected parts of them, to a recorder.

    Each part has its own name, such as ``lstm[0]``.

    Attributes:
        parts: the paths of the parts to record, by layer name. Other layers are recorded whole.
    """

    def __init__(self, recorder: Recorder, selection: Selection, log: Log) -> None:
        self._recorder = recorder
        self.inputs = recorder.inputs
        self._lacking = log.lacking
        self.parts = selection.parts
        self._exact = selection.exact
        self._modules = selection.modules

    def others(self, modules: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        """Returns the modules that are recorded whole."""
        if not self.parts:
            return modules
        return {name: module for name, module in modules.items() if name not in self.parts}

    def emit(self, name: str, output: Any, via: str, inputs: Any = (), alone: bool = False) -> Any:
        """Handles a layer's output. Returns a replacement for it, or None."""
        if name not in self.parts:
            return self._recorder.emit(name, output, via, inputs)
        if self._recorder.follow is not None:
            for part, found in self._found(name, output):
                self._recorder.emit(name + part, found, via)
            return None
        return self.record(name, output, via, inputs, alone=alone)

    def record(self, name: str, output: Any, via: str, inputs: Any = (), alone: bool = False) -> Any:
        """Records a layer's output. Returns as ``emit`` does."""
        if name not in self.parts:
            return self._recorder.record(name, output, via, inputs)
        module = self._modules.get(name)
        own = [] if module is None else [*module._parameters.values(), *module._buffers.values()]
        known = [*(t for _, t in walk_tensors(inputs)), *(tensor for tensor in own if tensor is not None)]
        alone, replaced = alone and is_plain_structure(output), False
        for part, found in self._found(name, output):
            fresh = is_copy_on_write(found) or not shares_memory((tensor for _, tensor in walk_tensors(found)), known)
            # memory that the rest of the output shares with the part must stay shared
            rest = [tensor for path, tensor in walk_tensors(output) if not path.startswith(part)]
            instead = self._recorder.record(name + part, found, via, (inputs, rest), fresh=fresh, alone=alone)
            if instead is not None:
                output, replaced = with_part(output, part, instead), True
        return output if replaced else None

    def emit_input(self, name: str, value: Any, via: str) -> None:
        """Records a layer's input before the layer runs."""
        if name not in self.parts:
            self._recorder.emit_input(name, value, via)
            return
        for part, found in self._found(name, value):
            self._recorder.emit_input(name + part, found, via)

    def _found(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        """Yields the selected parts that exist.

        Raises:
            LayerNotFound: a part that is selected by its exact name does not exist.
        """
        for part in self.parts[name]:
            found = part_of(value, part)
            if found is not MISSING:
                yield part, found
            elif name + part not in self._exact:
                self._lacking[name + part] = None
            elif self._recorder.is_here(name + part):
                self._recorder.failure = no_part(name, part, value)
                raise self._recorder.failure


class PartTap:
    """Emits parts of modules' outputs or inputs."""

    def __init__(self, modules: Mapping[str, nn.Module], parted: Parted, *, at: str) -> None:
        self._modules = {name: modules[name] for name in parted.parts if name in modules}
        self._parted = parted
        self._at = at
        self._hooks = Hooks()

    def open(self) -> None:
        """Registers a hook on every module."""
        for name, module in self._modules.items():
            if self._at == "input":
                self._hooks.before(module, self._emit_input, name, module)
            else:
                self._hooks.after(module, self._emit, name, module, kwargs=True)

    def close(self) -> None:
        """Removes the hooks."""
        self._hooks.remove()

    def _emit(self, name: str, tapped: nn.Module, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if module is not tapped:  # see Note: [Hooks and copies]
            return None
        alone = not is_held_elsewhere(sys.getrefcount(output), output)
        return self._parted.emit(name, output, "module", (args, kwargs), alone=alone)

    def _emit_input(self, name: str, tapped: nn.Module, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is tapped:
            self._parted.emit_input(name, as_input(args, kwargs), "module")
