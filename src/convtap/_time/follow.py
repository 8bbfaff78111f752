"""Follows the time axis through one pass of a model: what is known of each tensor, and of each layer's output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from convtap._owners import Owners
from convtap._select import CONV1D, FUNCTION
from convtap._structure import walk_tensors
from convtap._time.axis_node import Node
from convtap._time.axis_op import Op, Shape, is_composite, is_view, written
from convtap._time.axis_table import CONSTANT, apply, rule_for
from convtap._time.axis_views import MANY, VIEWS, pieces
from convtap._time.mark import Digit, Mark, unknown
from convtap._torch.hooks import Hooks
from convtap._tree import ModuleTree
from convtap.taps.module import as_input

# Note: [Two modes]
# Assumption: a dispatch mode sees every operation of a pass in about a hundred low-level forms, inside TorchScript as well.
# Failure: a recurrence then is a loop over single frames, and circular padding a handful of writes into an empty tensor.
# Choice: follow the low-level forms, and let a function mode take these few calls as one operation each.
_CALLS = ("lstm", "gru", "rnn_tanh", "rnn_relu", "scaled_dot_product_attention")

_CONVOLUTIONS = ("convolution", "_convolution")


@dataclass(frozen=True)
class Record:
    """One run of one layer.

    Attributes:
        name: the layer.
        kind: the class of the module, or ``"function"``.
        is_layer: whether it is a convolution, and so has a line in the table.
        mark: what is known of its output's time axis.
        shape: the shape of the output.
        path: which tensor of the output it is about; empty if the output is one.
    """

    name: str
    kind: str
    is_layer: bool
    mark: Mark
    shape: tuple[int, ...]
    path: str = ""


class Follower:
    """Follows one pass.

    Args:
        every: ``"output"`` or ``"input"`` to record every tensor that modules return, or are given; None for the first one
            that they return.

    Attributes:
        records: the layers' runs in order.
    """

    def __init__(self, tree: ModuleTree, signal: Tensor, time_dim: int, every: str | None = None) -> None:
        self.records: list[Record] = []
        self._tree = tree
        self._every = every
        self._time_dim: int | None = time_dim
        self._nodes: Any = WeakTensorKeyDictionary()
        samples = int(signal.shape[time_dim])
        self._nodes[signal] = Node(Mark((Digit(time_dim, samples),), clear=(0, samples)))
        self._stack: list[tuple[str, nn.Module]] = []
        self._owners = Owners(tree, tree.names)
        self._muted = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches what runs in this thread, and which module it runs in."""
        hooks = Hooks()
        with ExitStack() as stack:
            stack.callback(hooks.remove)
            for name, module in self._tree.names.items():
                hooks.before(module, self._enter, name)
                hooks.after(module, self._leave, name, always=True)
            stack.enter_context(_Functions(self))
            stack.enter_context(_Operations(self))
            yield

    # -- modules

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._stack.append((name, module))
        if self._every == "input":
            self._look_at(name, module, as_input(args, kwargs))

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and self._stack[-1][1] is module:
            self._stack.pop()
        if self._every != "input":
            self._look_at(name, module, output)

    def _look_at(self, name: str, module: nn.Module, value: Any) -> None:
        """Records what is known of the tensors in a module's output or input."""
        for path, tensor in walk_tensors(value):
            mark = self.mark(tensor)
            if mark is not None:
                is_layer = isinstance(module, (nn.modules.conv._ConvNd, *CONV1D))
                self._record(name, type(module).__name__, is_layer, mark, tensor, path)
                if self._every is None:
                    return

    def _record(self, name: str, kind: str, is_layer: bool, mark: Mark, tensor: Tensor, path: str = "") -> None:
        self.records.append(Record(name, kind, is_layer, mark, tuple(tensor.shape), path))

    @property
    def _module(self) -> str:
        return self._stack[-1][0] if self._stack else ""

    # -- tensors

    def mark(self, value: Any) -> Mark | None:
        """Returns what is known of a tensor; None if it does not depend on the input."""
        node = self._nodes.get(value) if isinstance(value, Tensor) else None
        return None if node is None else node.get()

    def _node(self, tensor: Tensor) -> Node:
        node = self._nodes.get(tensor)
        if node is None:
            node = self._nodes[tensor] = Node()
        return node  # type: ignore[no-any-return]

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Takes one call of a torch function as one operation. See Note: [Two modes]."""
        name = getattr(func, "__name__", "")
        values = list(args)
        circular = name == "pad" and func is torch.nn.functional.pad and "circular" in (*args[2:3], kwargs.get("mode"))
        if func is Tensor.__getitem__ and not self._muted:
            return self._indexed(func, args)
        if self._muted or not (circular or (name in _CALLS and len(args) > 2)):
            return func(*args, **kwargs)
        self._muted = True
        try:
            out = func(*args, **kwargs)
        finally:
            self._muted = False
        if circular and len(values) < 2:
            values.append(kwargs["pad"])
        op = self._op(name, values, kwargs, out)
        self._assign(out, apply(func, op), op)
        return out

    def _indexed(self, func: Any, args: Any) -> Any:
        """Takes ``x[..., :n]`` where n is all there is: torch leaves it out, and at another length it may cut."""
        out = func(*args)
        tensor, index = args
        if not isinstance(out, Tensor) or out.shape != tensor.shape or self.mark(tensor) is None:
            return out
        parts = index if isinstance(index, tuple) else (index,)
        if not all(part is ... or isinstance(part, slice) for part in parts):
            return out
        kept = next((i for i, part in enumerate(parts) if part is ...), len(parts))
        for i, part in enumerate(parts):
            dim = i if i < kept else tensor.dim() - len(parts) + i
            if isinstance(part, slice) and isinstance(part.stop, int) and part.stop >= tensor.shape[dim]:
                view = (Shape(tensor), dim, 0, part.stop, 1)
                self._view(torch.ops.aten.slice.Tensor, "slice", view, {}, out, self._node(tensor))
        return out

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Takes one low-level operation."""
        if self._muted:
            return func(*args, **kwargs)
        schema = func._schema
        name = schema.name.rpartition("::")[2]
        if name.endswith("_") and not name.endswith("__"):
            name = name[:-1]
        if rule_for(func, name) is None and schema.name.startswith("aten::") and is_composite(func):
            with _Operations(self):
                return func.decompose(*args, **kwargs)
        target = written(schema, args, kwargs)
        if target is not None and name in VIEWS:
            before = Shape(target)
            out = func(*args, **kwargs)
            self._view(func, name, (before, *args[1:]), kwargs, out, self._node(target))
            return out
        out = func(*args, **kwargs)
        if target is not None:
            self._write(func, name, args, kwargs, out, target)
        elif is_view(schema) and args and isinstance(args[0], Tensor):
            if isinstance(out, Tensor) or name in MANY:
                self._view(func, name, (Shape(args[0]), *args[1:]), kwargs, out, self._node(args[0]))
        elif self._touches(args) or self._touches(kwargs.values()):
            self._result(func, name, args, kwargs, out)
        return out

    def _touches(self, values: Any) -> bool:
        for value in values:
            if isinstance(value, Tensor):
                if self.mark(value) is not None:
                    return True
            elif isinstance(value, (list, tuple)) and value and self._touches(value):
                return True
        return False

    def _op(self, name: str, args: Any, kwargs: Any, out: Any) -> Op:
        inside = self._stack[-1][1] if self._stack else None
        settled = isinstance(inside, nn.modules.conv._ConvNd)
        return Op(name, args, kwargs, out, self._module, self._time_dim, self.mark, settled=settled)

    def _result(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        inside = self._stack[-1][1] if self._stack else None
        if isinstance(inside, nnq.Conv1d) and name.startswith("conv"):
            name, args, kwargs = "convolution", _quantized(inside, args[0]), {}
        op = self._op(name, args, kwargs, out)
        if name in MANY:
            for tensor, mark in zip(out, pieces(op, self.mark(args[0])), strict=True):
                self._nodes[tensor] = Node(mark)
            return
        mark = apply(func, op)
        self._assign(out, mark, op)
        if name in _CONVOLUTIONS and isinstance(args[0], Tensor):
            self._convolved(args, out, mark)

    def _assign(self, out: Any, mark: Mark | None, op: Op) -> None:
        """Notes what is known of the results of an operation."""
        if mark is None:
            return
        results = [value for value in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(value, Tensor)]
        for i, tensor in enumerate(results):
            known = mark
            if i and tensor.shape != results[0].shape:
                known = unknown(f"a further result of {op.what}")
                if op.name in _CALLS and not mark.unknown:
                    known = replace(mark, digits=())
            self._nodes[tensor] = Node(known)

    def _view(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, parent: Node) -> None:
        """Notes that a tensor, or several, are views of another."""
        several = isinstance(out, (tuple, list))
        shapes = [Shape(tensor) for tensor in out] if several else Shape(out)
        op = Op(name, args, kwargs, shapes, self._module, None, lambda value: None)
        for i, tensor in enumerate(out if several else [out]):
            self._nodes[tensor] = Node(parent=parent, op=(func, op), index=i if several else None)

    def _write(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, target: Tensor) -> None:
        """Notes that a tensor was written to."""
        node = self._node(target)
        before = node.get()
        if name in CONSTANT:
            after = None
        elif name == "copy":
            op = self._op(name, (args[1],), {}, target)
            source = apply(func, op)
            ahead = target.dim() - args[1].dim()
            after = source if source is None else source.moved(lambda dim: dim + ahead)
        elif not self._touches(args) and not self._touches(kwargs.values()):
            return
        else:
            op = self._op(name, args, kwargs, target)
            after = apply(func, op)
        if after != before:
            node.put(after)

    # -- convolutions that are called as functions

    def _convolved(self, args: Any, out: Tensor, mark: Mark | None) -> None:
        if mark is not None and not mark.unknown:
            self._time_dim = None
        weight = args[1]
        inside = any(isinstance(module, CONV1D) for _, module in self._stack)
        if mark is None or inside or weight.dim() != 3 or args[6]:
            return
        if self._every == "input":
            mark, out = self.mark(args[0]) or mark, args[0]
        self._record(self._owners.find(weight) or FUNCTION, "function", True, mark, out)


def _quantized(module: nnq.Conv1d, value: Tensor) -> tuple[Any, ...]:
    """The arguments of the plain convolution that a quantized one stands for; of the weight only the shape."""
    weight = torch.empty(module.out_channels, 1, *module.kernel_size, device="meta")
    padding = (0,) if module.padding_mode != "zeros" else module.padding
    return (value, weight, None, module.stride, padding, module.dilation, False, (0,), 1)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # with True, the first operation imports torch's compiler, which takes over a second

    def __init__(self, follower: Follower) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._follower = follower

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._follower.operation(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    def __init__(self, follower: Follower) -> None:
        super().__init__()
        self._follower = follower

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._follower.call(func, args, kwargs or {})
