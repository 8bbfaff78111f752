"""Follows the time axis through one pass of a model: what is known of each tensor, and of each layer's output."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from convtap._select.module_tree import ModuleTree
from convtap._select.selection import CONV1D, FUNCTION
from convtap._select.weight_owners import Owners
from convtap._taps.modules import as_input
from convtap._tensors.nested import walk_tensors
from convtap._time.axis_edge import Edge, Start
from convtap._time.axis_node import Node
from convtap._time.axis_op import Op, Shape, is_composite, is_view, written
from convtap._time.axis_table import CONSTANT, apply, apply_pieces, rule_for
from convtap._time.axis_views import MANY, VIEWS
from convtap._time.mark import Digit, Mark, collapsed, unknown
from convtap._time.origins import LEAVES, Origins
from convtap._time.record import Pass, Record
from convtap._time.watching import Functions, Operations, quantized_arguments, whole_slices
from convtap._torch.hooks import Hooks

# Note: [Two modes]
# Assumption: a dispatch mode sees every operation of a pass in about a hundred low-level forms, inside TorchScript as well.
# Failure: a recurrence then is a loop over single frames, and circular padding a handful of writes into an empty tensor.
# Choice: follow the low-level forms, and let a function mode take these few calls as one operation each.
_CALLS = ("lstm", "gru", "rnn_tanh", "rnn_relu", "scaled_dot_product_attention")

_CONVOLUTIONS = ("convolution", "_convolution")

#: What ``tensor.data`` calls: no operation, and yet a view.
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class Follower:
    """Follows one pass.

    Args:
        inputs: the tensors of the example, by their paths in it.
        trains: the modules that are in train mode outside of this pass.

    Attributes:
        records: the layers' runs in order.
    """

    def __init__(
        self, tree: ModuleTree, how: Pass, inputs: Mapping[str, Tensor], trains: Collection[nn.Module] = ()
    ) -> None:
        self.records: list[Record] = []
        self._tree = tree
        self._path = how.path
        self._every = how.every
        self._trains = trains
        self._origins = Origins(tree.names.values(), inputs)
        signal, time_dim = inputs[how.path], how.axis
        # of (B, T) no other axis can be meant
        self._time_dim: int | None = time_dim if signal.dim() > 2 or time_dim == 0 else None
        self._nodes: Any = WeakTensorKeyDictionary()
        samples = int(signal.shape[time_dim])
        start = Mark((Digit(time_dim, samples),), clear=(0, samples), edge=Edge(Start()))
        self._nodes[signal] = Node(replace(start, zeroed=start.edge if how.zeros else None))
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
            stack.enter_context(Functions(self))
            stack.enter_context(Operations(self))
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
        is_layer, kind = isinstance(module, (nn.modules.conv._ConvNd, *CONV1D)), type(module).__name__
        tensors, depends = list(walk_tensors(value)), False
        for path, tensor in tensors:
            self._adopt(tensor)
            mark = self.mark(tensor)
            if mark is not None:
                self._record(name, kind, is_layer, mark, tensor, path)
                depends = True
                if self._every is None:
                    return
        if is_layer and tensors and not depends:
            self._record_elsewhere(name, kind, *tensors[0])

    def _record_elsewhere(self, name: str, kind: str, path: str, tensor: Tensor) -> None:
        """Records a layer's tensor that does not depend on the signal: the mark says what else it depends on."""
        why = self._origins.instead_of(self._path, tensor)
        mark = Mark() if why is None else unknown(why)
        self._record(name, kind, True, mark, tensor, path, depends=False)

    def _adopt(self, *given: Any) -> None:
        """Marks tensors that came from outside of torch after values of the signal went there."""
        for tensor in self._origins.strangers(*given):
            self._origins.note(tensor)
            why = f"values of the signal left torch by {self._origins.left}, and what came back is not followed"
            self._nodes[tensor] = Node(unknown(why))

    def _record(
        self, name: str, kind: str, is_layer: bool, mark: Mark, tensor: Tensor, path: str = "", *, depends: bool = True
    ) -> None:
        mark, shape = collapsed(mark, name), tuple(tensor.shape)
        self.records.append(Record(name, kind, is_layer, mark, shape, path, self._origins.numbers, depends))

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
        if name in LEAVES and args and self.mark(args[0]) is not None and self._origins.left is None:
            self._origins.left = self._op(name, args, kwargs, None).what
        if func == _DATA and not self._muted:
            out = func(*args)
            self._view(torch.ops.aten.detach.default, "detach", (Shape(args[0]),), {}, out, self._node(args[0]))
            self._origins.note(out, args)
            return out
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
        self._adopt(args, kwargs)
        op = self._op(name, values, kwargs, out)
        self._assign(out, apply(func, op), op)
        self._origins.note(out, args, kwargs)
        return out

    def _indexed(self, func: Any, args: Any) -> Any:
        """Takes ``x[..., :n]`` where n is all there is: torch leaves it out, and at another length it may cut."""
        out = func(*args)
        tensor, index = args
        if not isinstance(out, Tensor) or out.shape != tensor.shape or self.mark(tensor) is None:
            return out
        for dim, stop in whole_slices(tensor, index):
            view = (Shape(tensor), dim, 0, stop, 1)
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
            with Operations(self):
                return func.decompose(*args, **kwargs)
        self._adopt(args, kwargs)
        out = self._followed(func, schema, name, args, kwargs)
        self._origins.note(out, args, kwargs)
        return out

    def _followed(self, func: Any, schema: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
            if out is not args[0] and (isinstance(out, Tensor) or name in MANY):
                self._view(func, name, (Shape(args[0]), *args[1:]), kwargs, out, self._node(args[0]))
        elif self._touches(args) or self._touches(kwargs.values()):
            if name == "_local_scalar_dense" and args[0].dtype != torch.bool:
                self._origins.read(self._op("item", args, kwargs, out).what)
            self._result(func, name, args, kwargs, out)
        elif name in _CONVOLUTIONS:
            self._convolved(args, out, None)
        return out

    def _touches(self, values: Any) -> bool:
        return any(
            self._touches(value) if isinstance(value, (list, tuple)) else self.mark(value) is not None
            for value in values
        )

    def _op(self, name: str, args: Any, kwargs: Any, out: Any) -> Op:
        inside = self._stack[-1][1] if self._stack else None
        flags = {"settled": isinstance(inside, nn.modules.conv._ConvNd), "trains": inside in self._trains}
        return Op(name, args, kwargs, out, self._module, self._time_dim, self.mark, **flags)

    def _result(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        inside = self._stack[-1][1] if self._stack else None
        if isinstance(inside, nnq.Conv1d) and name.startswith("conv"):
            name, args, kwargs = "convolution", quantized_arguments(inside, args[0]), {}
        op = self._op(name, args, kwargs, out)
        if name in MANY:
            for tensor, mark in zip(out, apply_pieces(op), strict=True):
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
        if inside or weight.dim() != 3 or args[6]:
            return
        name = self._owners.find(weight) or FUNCTION
        if mark is None:
            self._origins.note(out, args)
            self._record_elsewhere(name, "function", "", args[0] if self._every == "input" else out)
            return
        if self._every == "input":
            mark, out = self.mark(args[0]) or mark, args[0]
        self._record(name, "function", True, mark, out)
