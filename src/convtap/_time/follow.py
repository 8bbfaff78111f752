"""Follows the time axis through one forward pass of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn

from convtap._select.module_tree import ModuleTree
from convtap._select.selection import CONV1D, FUNCTION
from convtap._select.weight_owners import Owners
from convtap._taps.modules import as_input
from convtap._tensors.nested import walk_tensors
from convtap._time.axis_count import Digit
from convtap._time.edge import Edge, Start
from convtap._time.mark import Mark, collapsed, in_pieces, unknown
from convtap._time.modes import Functions, Operations, is_composite, is_view, quantized_arguments, whole_slices, written
from convtap._time.nodes import Nodes
from convtap._time.operation import Op, Shape
from convtap._time.origins import LEAVES, Origins
from convtap._time.record import Pass, Record
from convtap._time.table import CONSTANT, apply, rule_for
from convtap._time.views import MANY, VIEWS, pieces
from convtap._torch.cleanup import undone
from convtap._torch.hooks import Hooks

# Note: [Two modes]
# Assumption: a dispatch mode sees every operation of a pass in about a hundred low-level forms, inside TorchScript as well.
# Failure: a recurrence is then a loop over single frames, and circular padding is several writes into an empty tensor.
# Choice: follow the low-level forms, and let a function mode treat each of these few calls as one operation.
_CALLS = ("lstm", "gru", "rnn_tanh", "rnn_relu", "scaled_dot_product_attention")

_CONVOLUTIONS = ("convolution", "_convolution")

#: The function behind ``tensor.data``, which makes a view without an operation.
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class Follower:
    """Follows the time axis through one forward pass.

    Args:
        tree: the model's modules.
        how: the settings of the pass.
        inputs: the tensors of the example, by path.
        trains: the modules that are in train mode outside of this pass.

    Attributes:
        records: the records of the layers' runs, in order.
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
        self._nodes = Nodes()
        signal, time_dim = inputs[how.path], how.axis
        # in (B, T) only one axis can be time
        self._time_dim: int | None = time_dim if signal.dim() > 2 or time_dim == 0 else None
        samples = int(signal.shape[time_dim])
        start = Mark((Digit(time_dim, samples),), clear=(0, samples), edge=Edge(Start()))
        self._nodes.set(signal, replace(start, zeroed=start.edge if how.zeros else None))
        self._stack: list[tuple[str, nn.Module | None]] = [("", None)]
        self._owners = Owners(tree, tree.names)
        self._is_muted = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the operations of this thread and the modules in which they run."""
        hooks, functions, operations = Hooks(), Functions(self._call), Operations(self._operation)
        with undone([hooks.remove, functions.leave, operations.leave]):
            for name, module in self._tree.names.items():
                hooks.before(module, self._enter, name)
                hooks.after(module, self._leave, name, always=True)
            functions.__enter__()  # type: ignore[no-untyped-call]
            operations.__enter__()  # type: ignore[no-untyped-call]
            yield

    # -- modules

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._stack.append((name, module))
        if self._every == "input":
            self._look_at(name, module, as_input(args, kwargs))

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack[-1][1] is module:
            self._stack.pop()
        if self._every != "input":
            self._look_at(name, module, output)

    def _look_at(self, name: str, module: nn.Module, value: Any) -> None:
        """Records the marks of the tensors in a module's output or input."""
        is_layer, kind = isinstance(module, (nn.modules.conv._ConvNd, *CONV1D)), type(module).__name__
        tensors, depends = list(walk_tensors(value)), False
        for path, tensor in tensors:
            self._adopt(tensor)
            mark = self._nodes.mark(tensor)
            if mark is not None:
                self._record(name, kind, is_layer, mark, tensor, path)
                depends = True
                if self._every is None:
                    return
        if is_layer and tensors and not depends:
            self._record_elsewhere(name, kind, *tensors[0])

    def _record_elsewhere(self, name: str, kind: str, path: str, tensor: Tensor) -> None:
        """Records a layer's tensor that does not depend on the signal.

        The mark says which other inputs it depends on.
        """
        why = self._origins.instead_of(self._path, tensor)
        self._record(name, kind, True, Mark(unknown=why), tensor, path, depends=False)

    def _adopt(self, *given: Any) -> None:
        """Marks tensors from outside of torch, once values of the signal have left torch."""
        for tensor in self._origins.strangers(*given):
            self._origins.note(tensor)
            why = f"values of the signal left torch in {self._origins.left}, and convtap does not follow them there"
            self._nodes.set(tensor, unknown(why))

    def _record(
        self, name: str, kind: str, is_layer: bool, mark: Mark, tensor: Tensor, path: str = "", *, depends: bool = True
    ) -> None:
        mark, shape = collapsed(mark, name), tuple(tensor.shape)
        if not mark.unknown and (why := in_pieces(mark, shape)) is not None:
            mark = replace(mark, unknown=why)
        self.records.append(Record(name, kind, is_layer, mark, shape, path, self._origins.numbers, depends))

    # -- calls of torch functions

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs a torch function, some of them as one operation. See Note: [Two modes]."""
        name = getattr(func, "__name__", "")
        if name in LEAVES and args and self._nodes.mark(args[0]) is not None and self._origins.left is None:
            self._origins.left = self._op(func, name, args, kwargs, None).what
        if self._is_muted:
            return func(*args, **kwargs)
        if func == _DATA:
            out = func(*args)
            self._view(torch.ops.aten.detach.default, "detach", args, {}, out)
            self._origins.note(out, args)
            return out
        if func is Tensor.__getitem__:
            return self._indexed(func, args)
        circular = name == "pad" and func is torch.nn.functional.pad and "circular" in (*args[2:3], kwargs.get("mode"))
        if circular or (name in _CALLS and len(args) > 2):
            return self._as_one(func, name, args, kwargs)
        return func(*args, **kwargs)

    def _as_one(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Runs a call and treats it as one operation."""
        self._is_muted = True
        try:
            out = func(*args, **kwargs)
        finally:
            self._is_muted = False
        self._adopt(args, kwargs)
        op = self._op(func, name, (*args, kwargs["pad"]) if len(args) < 2 else args, kwargs, out)
        self._assign(out, apply(op), op)
        self._origins.note(out, args, kwargs)
        return out

    def _indexed(self, func: Any, args: Any) -> Any:
        """Notes ``x[..., :n]`` as a slice if it takes all frames.

        torch runs no operation for it, but at another length it may cut.
        """
        out = func(*args)
        tensor, index = args
        if isinstance(out, Tensor) and out.shape == tensor.shape and self._nodes.mark(tensor) is not None:
            for dim, stop in whole_slices(tensor, index):
                self._view(torch.ops.aten.slice.Tensor, "slice", (tensor, dim, 0, stop, 1), {}, out)
        return out

    # -- low-level operations

    def _operation(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs a low-level operation and notes the marks of its results."""
        if self._is_muted:
            return func(*args, **kwargs)
        schema = func._schema
        name = schema.name.rpartition("::")[2]
        if name.endswith("_") and not name.endswith("__"):
            name = name[:-1]
        if rule_for(func, name) is None and schema.name.startswith("aten::") and is_composite(func):
            with Operations(self._operation):
                return func.decompose(*args, **kwargs)
        self._adopt(args, kwargs)
        target = written(schema, args, kwargs)
        before = Shape(target) if target is not None and name in VIEWS else None
        out = func(*args, **kwargs)
        if before is not None:
            self._view(func, name, args, kwargs, out, before)
        elif target is not None:
            self._write(func, name, args, kwargs, target)
        elif is_view(schema) and args and isinstance(args[0], Tensor):
            if out is not args[0] and (isinstance(out, Tensor) or name in MANY):
                self._view(func, name, args, kwargs, out)
        elif self._nodes.touches((*args, *kwargs.values())):
            self._result(func, name, args, kwargs, out)
        elif name in _CONVOLUTIONS:
            self._convolved(args, out, None)
        self._origins.note(out, args, kwargs)
        return out

    def _op(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> Op:
        module, inside = self._stack[-1]
        settled, trains = isinstance(inside, nn.modules.conv._ConvNd), inside in self._trains
        return Op(func, name, args, kwargs, out, module, self._nodes.mark, self._time_dim, settled, trains)

    def _result(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        inside = self._stack[-1][1]
        if name == "_local_scalar_dense" and args[0].dtype != torch.bool:
            self._origins.read(self._op(func, "item", args, kwargs, out).what)
        if isinstance(inside, nnq.Conv1d) and name.startswith("conv"):
            name, args, kwargs = "convolution", quantized_arguments(inside, args[0]), {}
        op = self._op(func, name, args, kwargs, out)
        if name in MANY:
            for one in pieces(op):
                self._nodes.set(one.out, apply(one))
            return
        mark = apply(op)
        self._assign(out, mark, op)
        if name in _CONVOLUTIONS and isinstance(args[0], Tensor):
            self._convolved(args, out, mark)

    def _assign(self, out: Any, mark: Mark | None, op: Op) -> None:
        """Notes the mark of an operation's results."""
        if mark is None:
            return
        results = [value for value in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(value, Tensor)]
        for tensor in results:
            known = mark
            if tensor.shape != results[0].shape:
                is_state = op.name in _CALLS and not mark.unknown
                known = replace(mark, digits=()) if is_state else unknown(f"a further result of {op.what}")
            self._nodes.set(tensor, known)

    def _view(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, before: Shape | None = None) -> None:
        """Notes that the results are views of the first argument.

        An operation in place makes a view of the argument as it was ``before``.
        """
        base, *others = args
        op = Op(func, name, (before or Shape(base), *others), kwargs, out, self._stack[-1][0])
        self._nodes.view(op, base)

    def _write(self, func: Any, name: str, args: Any, kwargs: Any, target: Tensor) -> None:
        """Notes that a tensor was written to."""
        if name in CONSTANT:
            after = None
        elif name == "copy":
            ahead = target.dim() - args[1].dim()
            source = apply(self._op(func, name, (args[1],), {}, target))
            after = source and source.moved(lambda dim: dim + ahead)
        elif self._nodes.touches((*args, *kwargs.values())):
            after = apply(self._op(func, name, args, kwargs, target))
        else:
            return
        self._nodes.write(target, after)

    # -- convolutions that are called as functions

    def _convolved(self, args: Any, out: Tensor, mark: Mark | None) -> None:
        if mark is not None and not mark.unknown:
            self._time_dim = None
        weight = args[1]
        inside = any(isinstance(module, CONV1D) for _, module in self._stack)
        if inside or weight.dim() != 3 or args[6]:
            return
        name = self._owners.find(weight) or FUNCTION
        tensor = args[0] if self._every == "input" else out
        if mark is None:
            self._origins.note(out, args)
            self._record_elsewhere(name, "function", "", tensor)
        else:
            self._record(name, "function", True, (self._nodes.mark(tensor) or mark), tensor)
