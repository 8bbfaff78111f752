"""Taps convolutions that run in functions, TorchScript and compiled code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convtap._record.forward_passes import Passes
from convtap._record.recorder import Recorder
from convtap._select.module_tree import ModuleTree, tensors_of
from convtap._select.selection import CONV1D, FUNCTION, Selection
from convtap._select.weight_owners import Owners
from convtap._taps.activations import Follower
from convtap._taps.keras import is_claimed
from convtap._taps.modules import runs_alone
from convtap._torch import compiled_regions, convolution_key, modes
from convtap._torch.call_stack import skip_in_dynamo
from convtap._torch.convolution_key import is_inherited
from convtap._torch.weight_marks import Read, is_made_of
from convtap._torch.weight_reads import WeightReads

# Note: [Once each]
# Assumption: a convolution inside a module whose own tap emits it is not a second call.
# Failure: the kernel sees every convolution, and the owner of the weight does not tell whether the module's tap emits it.
# Choice: a convolution belongs to the call of its weight's owner while that call runs. A convolution that computes a
#   layer's weight belongs to that layer's call. Plain layers run with the key excluded (see ``_taps.modules``), so the
#   check costs them nothing.


class ConvolutionTap:
    """Emits the convolutions that no module tap emits.

    Each is named after the owner of its weight.

    Attributes:
        compiled_code_ran: whether compiled code ran in a thread of this capture.
    """

    compiled_code_ran = False

    def __init__(
        self,
        selection: Selection,
        recorder: Recorder,
        passes: Passes,
        token: modes.Token,
        owners: Owners,
        *,
        at: str,
        functions: bool,
        tapped: Mapping[str, nn.Module],
        shimmed: Mapping[str, nn.Module],
        watched: Mapping[str, nn.Module],
        compiled: Mapping[str, nn.Module],
        follower: Follower | None,
        uses_key: bool,
    ) -> None:
        self._token = token
        self._selection = selection
        self._recorder = recorder
        self._passes = passes
        self._around = passes.calls.modules
        self._owners = owners
        self._at = at
        self._functions = functions
        self._tapped = tapped
        self._shimmed = shimmed
        self._watched = watched
        self._compiled = compiled
        self._follower = follower
        self._wanted: dict[str, bool] = {}
        self._reads = WeightReads()
        self._home: Any = None
        self._uses_key = uses_key

    def open(self) -> None:
        """Starts to watch this thread's convolutions and the selected layers' weights."""
        self._passes.companion = self
        self._token.tap = self
        if self._uses_key:
            compiled_regions.watch(self._token)
        if self._uses_key or "torch._dynamo" not in sys.modules:  # Dynamo cannot trace a watched weight
            self._reads.open(self, self._watched_layers())
        self._home = self.here()
        self.visit(self._home)

    def close(self) -> None:
        """Stops watching."""
        self._passes.companion = None
        self._token.tap = None
        if self._home is not None:
            self._end(self._home)
        compiled_regions.leave(self._token)
        self._reads.close()

    @skip_in_dynamo
    def here(self) -> Any:
        """Returns this thread's captures, for ``visit`` and ``leave``."""
        return convolution_key.here(), modes.here()

    @skip_in_dynamo
    def visit(self, here: Any) -> None:
        """Starts to watch this thread, in which a pass of this capture runs."""
        key, mode = here
        if self._uses_key:
            convolution_key.begin(self._token, key)
        if not self._uses_key or self._follower is not None:
            self._token.watcher = self._watch
            modes.begin(self._token, mode)

    @skip_in_dynamo
    def leave(self, here: Any) -> None:
        """Ends a pass. Also ends ``visit``, if that was in another thread."""
        self._reads.release()
        if here is not None:
            self._end(here)

    def _end(self, here: Any) -> None:
        key, mode = here
        modes.end(self._token, mode)
        convolution_key.end(self._token, key)

    def _watched_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields the modules that hold weights of selected layers, with the layers' names."""
        for name, module in self._watched.items():
            if not isinstance(module, CONV1D):
                continue
            if not module._modules:
                yield name, module
                continue
            parametrizations: Any = module._modules.get("parametrizations")
            if parametrizations is not None and "weight" in parametrizations._modules:
                for part in parametrizations._modules["weight"].modules():
                    yield name, part
            else:
                yield name, module

    def pause(self) -> None:
        """Stops watching the weights until ``resume``, while compiled code runs."""
        self._reads.pause()

    def resume(self) -> None:
        """Watches the weights again."""
        if self._token.tap is self:
            self._reads.open(self, self._watched_layers())

    # -- convolutions

    def before(self, transposed: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, str] | None:
        """Returns the name to record a convolution under and how it was seen, or None.

        None means that this tap does not record the convolution.
        """
        recorder = self._recorder
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if recorder.muted or is_claimed() or compiled_regions.is_tracing() or self._passes.skips():
            return None
        if not _is_one_dimensional(transposed, weight, args, kwargs):
            return None
        if self._selection.tree.has_keras and isinstance(weight, Tensor) and weight.device.type == "meta":
            return None  # Keras only infers shapes
        innermost = next(self._around(), None)
        name = self._owners.find(weight, self._passes.current_of_model, self._around)
        is_script = isinstance(innermost, torch.jit.ScriptModule) or (innermost is None and is_inherited())
        via = "script" if is_script else "function"
        if name is None:
            name, via = self._name_without_owner(weight, innermost, via)
        elif self._is_a_modules_own(name, weight, innermost):
            return None
        if name is None or not (self._functions or via == "script") or not self._wants(name):
            return None
        if via == "function" and (name in self._compiled or compiled_regions.is_inside()):
            via = "compiled"
            if not self._is_whole(name, args, kwargs) and _peels_biases(args[0]):
                recorder.unseen.setdefault(name, "the compiler took its bias out of the convolution")
                return None
        if self._at == "input":
            recorder.emit_input(name, args[0] if args else kwargs.get("input"), via)
            return None
        recorder.inputs.note(name, args[0] if args else kwargs.get("input"))
        return name, via

    def after(self, plan: tuple[str, str], output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records a convolution's output. Returns a replacement for it, or None."""
        name, via = plan
        try:
            if via == "compiled" and type(output) is Tensor:
                self._recorder.emit(name, output.clone(), via)  # torch does not see when compiled code overwrites it
                return None
            return self._recorder.emit(name, output, via, (args, kwargs))
        finally:
            self._recorder.inputs.forget(name)

    def _is_whole(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Returns whether a compiled convolution adds its layer's bias."""
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return getattr(self._selection.tree.names.get(name), "bias", None) is None or bias is not None

    def _is_a_modules_own(self, name: str, weight: Any, innermost: Any) -> bool:
        """Returns whether a convolution belongs to a module that is being called.

        That module has its own tap, or it is not selected.
        """
        is_parameter = name not in self._selection.tree.names
        owner = name.rpartition(".")[0] if is_parameter else name
        layer = self._tapped.get(owner)
        alone = owner in self._shimmed and not compiled_regions.is_inside() and runs_alone(self._shimmed[owner])
        if (layer is None or alone) and not isinstance(innermost, CONV1D):
            return False  # see Note: [Plain layers]
        names = self._selection.tree.identities
        for module in self._around():
            around = names.get(id(module))
            if around is None:
                continue
            if module is self._tapped.get(name):
                return True
            if not isinstance(module, CONV1D) or isinstance(module, torch.jit.ScriptModule):
                continue
            if (is_parameter and around == owner) or any(tensor is weight for _, tensor in tensors_of(module)):
                return around in self._tapped or around not in self._selection.modules
        return False

    def _name_without_owner(self, weight: Any, innermost: Any, via: str) -> tuple[str | None, str]:
        """Names a convolution whose weight belongs to no module of the model.

        The weight is predicted or computed, or it belongs to a module outside of the model.
        """
        members = self._selection.tree.identities
        if any(isinstance(module, CONV1D) and id(module) in members for module in self._around()):
            return None, via  # it belongs to that convolution, for example because it computes the weight
        if not self._passes.in_method():
            return None, via
        if isinstance(innermost, CONV1D):
            name = ModuleTree(self._selection.tree.model).name_of(innermost)
            self._recorder.outside = True
            return (FUNCTION, via) if name is None else (name, "module")
        made_of = is_made_of(weight, self)
        if made_of is not None:
            self._recorder.seen_as_function(made_of)
        return FUNCTION, via

    def _wants(self, name: str) -> bool:
        wanted = self._wanted.get(name)
        if wanted is None:
            wanted = self._wanted[name] = self._selection.wants(name)
        return wanted

    def _watch(self, call: Callable[..., Any], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a torch function and inspects it.

        This is used if outputs are followed to their activations, or if torch has no convolution key.
        """
        if not self._uses_key and func in convolution_key.FUNCTIONS:
            result = modes.observe(call, (self._token,), convolution_key.FUNCTIONS[func], args, kwargs)
        else:
            result = call(*args, **kwargs)
        if self._follower is None or self._recorder.muted:
            return result
        replacement = self._follower.see(func, args, kwargs, result)
        return result if replacement is None else replacement

    # -- reads

    def may_read(self, name: str) -> bool:
        """Returns whether to follow a read of a layer's weight.

        A read by the layer itself, or outside of a pass, is not followed.
        """
        recorder = self._recorder
        if not recorder.is_open_here() or not self._passes.in_forward():
            return False
        layer = self._tapped.get(name)
        return name in self._shimmed or all(module is not layer for module in self._around())

    def weight_used(self, name: str, by: Read) -> None:
        """Notes that a call used the values of a layer's weight."""
        if self._recorder.is_open_here():
            self._recorder.weight_read(name, by)


def _peels_biases(x: Tensor) -> bool:
    """Returns whether a compiler takes biases out of convolutions on this device.

    Inductor does so on all devices except the CPU.
    """
    return x.device.type != "cpu"


def _is_one_dimensional(transposed: int | None, weight: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if transposed is None:
        return True
    is_transposed = args[transposed] if len(args) > transposed else kwargs.get("transposed", False)
    return isinstance(weight, Tensor) and weight.dim() == 3 and not is_transposed
