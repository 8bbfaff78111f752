"""The cases of the correctness table: models, inputs and reference outputs."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

from benchmarks.libraries import Collected, _nothing

Collect = Callable[..., Collected]


class Wrong(Exception):
    """A library returned another result than the reference, without an error."""


class NoHint(Exception):
    """A library raised an error, as expected, but without the helpful name."""


class NotApplicable(Exception):
    """A library does not offer the feature of the case."""


class Net(nn.Module):
    """Convolutions with a function as their ``forward``."""

    def __init__(self, forward: Callable[..., Any], convs: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, conv in convs.items():
            setattr(self, name, conv)
        self.run = forward

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def conv(inputs: int = 2, outputs: int = 2, **options: Any) -> nn.Conv1d:
    """A small convolution."""
    return nn.Conv1d(inputs, outputs, 3, padding=1, **options)


def compare(found: Collected, expected: Collected) -> None:
    """Raises Wrong, with the difference, unless the values equal the reference's."""
    for name, values in expected.items():
        got = found.get(name, [])
        if len(got) != len(values):
            raise Wrong(f"{len(got)} of {len(values)} calls" if got else "nothing, silently")
        for value, right in zip(got, values, strict=True):
            value = value[0] if isinstance(value, (tuple, list)) else value
            if not isinstance(value, Tensor) or value.shape != right.shape:
                raise Wrong(
                    f"a {type(value).__name__}" if not isinstance(value, Tensor) else f"shape {tuple(value.shape)}"
                )
            try:
                close = torch.allclose(value.detach(), right, atol=1e-6)
            except RuntimeError as error:
                raise Wrong("a tensor that cannot be read") from error
            if not close:
                raise Wrong("another value")


def once(collect: Collect, model: nn.Module, x: Tensor, expected: dict[str, Tensor], after: Any = _nothing) -> None:
    """One forward pass on one tensor."""
    compare(collect(model, list(expected), [((x.clone(),), {})], after), {k: [v] for k, v in expected.items()})


X = torch.linspace(-1, 1, 24).reshape(1, 2, 12)


def five_plain(collect: Collect) -> None:
    """five plain convolutions"""
    model = Net(lambda m, x: m.e(m.d(m.c(m.b(m.a(x))))), {name: conv() for name in "abcde"})
    y, expected = X, {}
    for name in "abcde":
        y = expected[name] = getattr(model, name)(y).detach()
    once(collect, model, X, expected)


def inplace_relu(collect: Collect) -> None:
    """in-place ReLU after the convolution"""
    model = nn.Sequential()
    model.add_module("a", conv())
    model.add_module("relu", nn.ReLU(inplace=True))
    model.add_module("b", conv())
    first = model.a(X).detach()
    once(collect, model, X, {"a": first, "b": model.b(first.relu()).detach()})


def inplace_add(collect: Collect) -> None:
    """`y += 1` after the convolution"""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y += 1
        return m.b(y)

    model = Net(forward, {"a": conv(), "b": conv()})
    first = model.a(X).detach()
    once(collect, model, X, {"a": first.clone(), "b": model.b(first + 1).detach()})


def view_write(collect: Collect) -> None:
    """a write through a view: `y[:, 0] = 0`"""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y[:, 0] = 0
        return m.b(y)

    model = Net(forward, {"a": conv(), "b": conv()})
    first = model.a(X).detach()
    second = torch.stack([torch.zeros_like(first[:, 0]), first[:, 1]], 1)
    once(collect, model, X, {"a": first.clone(), "b": model.b(second).detach()})


def three_calls(collect: Collect) -> None:
    """one module called three times"""
    model = Net(lambda m, x: m.a(m.a(m.a(x))), {"a": conv()})
    values = [X]
    for _ in range(3):
        values.append(model.a(values[-1]).detach())
    compare(collect(model, ["a"], [((X,), {})], _nothing), {"a": values[1:]})


def two_passes(collect: Collect) -> None:
    """two forward passes"""
    model = Net(lambda m, x: m.a(x), {"a": conv()})
    expected = [model.a(X).detach(), model.a(X * 2).detach()]
    compare(collect(model, ["a"], [((X,), {}), ((X * 2,), {})], _nothing), {"a": expected})


def raises(collect: Collect) -> None:
    """forward raises: no hook is left"""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.a(x)
        raise ZeroDivisionError

    model = Net(forward, {"a": conv()})
    with contextlib.suppress(ZeroDivisionError):
        collect(model, ["a"], [((X,), {})], _nothing)
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        raise Wrong("hooks left on the model")


def checkpointed(collect: Collect) -> None:
    """activation checkpointing, then backward"""
    count = []
    model = Net(lambda m, x: checkpoint(lambda y: m.b(m.a(y)), x, use_reentrant=False), {"a": conv(), "b": conv()})
    first = model.a(X).detach()

    def after(output: Any) -> None:
        count.append(1)
        (output[0] if isinstance(output, (tuple, list)) else output).sum().backward()

    once(collect, model, X, {"a": first, "b": model.b(first).detach()}, after)
    if not count:
        raise NotApplicable("gives no output to call backward on")


def compiled(collect: Collect) -> None:
    """compiled before the capture"""
    inner = Net(lambda m, x: m.b(m.a(x)), {"a": conv(), "b": conv()})
    expected = {"a": inner.a(X).detach(), "b": inner.b(inner.a(X)).detach()}
    model = torch.compile(inner, backend="eager")
    model(X)
    for prefix in ("", "_orig_mod."):
        names = [prefix + name for name in expected]
        try:
            found = collect(model, names, [((X,), {})], _nothing)
        except Exception:
            if prefix:
                raise
            continue
        compare(
            {name.removeprefix("_orig_mod."): found.get(name, []) for name in names},
            {k: [v] for k, v in expected.items()},
        )
        return


class Scriptable(nn.Module):
    """Two convolutions that TorchScript can compile."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def scripted(collect: Collect) -> None:
    """a `torch.jit.script` model"""
    inner = Scriptable()
    expected = {"a": inner.a(X).detach(), "b": inner.b(inner.a(X)).detach()}
    once(collect, torch.jit.script(inner), X, expected)


def parameter(collect: Collect) -> None:
    """`F.conv1d` on a plain Parameter"""

    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.ones(2, 2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv1d(x, self.kernel, padding=1)

    model = Loose()
    once(collect, model, X, {"kernel": F.conv1d(X, model.kernel, padding=1).detach()})


def borrowed_weight(collect: Collect) -> None:
    """`F.conv1d(x, self.a.weight)`, as in Mamba"""
    model = Net(lambda m, x: F.conv1d(x, m.a.weight, m.a.bias, padding=1), {"a": conv()})
    once(collect, model, X, {"a": model.a(X).detach()})


def tuple_output(collect: Collect) -> None:
    """a layer that returns a tuple"""

    class Pair(nn.Conv1d):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), None

    model = Net(lambda m, x: m.a(x)[0].relu(), {"a": Pair(2, 2, 3)})
    once(collect, model, X, {"a": model.a(X)[0].detach()})


def wrong_name(collect: Collect) -> None:
    """a wrong name: an error that names near ones"""
    model = Net(lambda m, x: m.encoder(x), {"encoder": conv()})
    try:
        found = collect(model, ["encodr"], [((X,), {})], _nothing)
    except Exception as error:
        if "encoder" not in str(error):
            raise NoHint from error
        return
    raise Wrong(f"no error, and {found!r}")


def data_dependent(collect: Collect) -> None:
    """a branch on the data; the second pass runs another layer"""
    model = Net(lambda m, x: m.high(x) if float(x.sum()) > 0 else m.low(x), {"high": conv(), "low": conv()})
    compare(
        collect(model, ["high", "low"], [((X + 1,), {}), ((X - 1,), {})], _nothing),
        {"high": [model.high(X + 1).detach()], "low": [model.low(X - 1).detach()]},
    )


def idle_layer(collect: Collect) -> None:
    """a layer asked for by name that never runs is reported"""
    model = Net(lambda m, x: m.a(x), {"a": conv(), "idle": conv()})
    try:
        collect(model, ["a", "idle"], [((X,), {})], _nothing)
    except Exception as error:
        if "idle" in str(error):
            return
        raise NoHint from error
    raise Wrong("nothing is said")


def mapped(collect: Collect) -> None:
    """inside `vmap`"""
    inner = conv()
    model = Net(lambda m, x: vmap(m.a)(x), {"a": inner})
    batch = torch.stack([X[0], X[0] * 2, X[0] - 1])
    once(collect, model, batch, {"a": torch.stack([inner(x) for x in batch]).detach()})


def keyword_only(collect: Collect) -> None:
    """a forward with keyword-only arguments"""

    class KeywordOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv()

        def forward(self, *, signal: Tensor) -> Tensor:
            return self.a(signal)

    model = KeywordOnly()
    compare(collect(model, ["a"], [((), {"signal": X})], _nothing), {"a": [model.a(X).detach()]})


def fast_path(collect: Collect) -> None:
    """a padded `nn.TransformerEncoder` behind the layer computes as it did"""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
    outputs: list[Tensor] = []

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.encoder = conv(2, 4), nn.TransformerEncoder(layer, 1)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros(1, 12, dtype=torch.bool)
            mask[:, 8:] = True
            y = self.encoder(self.a(x).transpose(1, 2), src_key_padding_mask=mask)
            outputs.append(y.detach().clone())
            return y

    model = Encoder().eval()
    with torch.no_grad():
        model(X)
        once(collect, model, X, {"a": model.a(X).clone()})
    if len(outputs) < 2:
        raise NotApplicable("runs a copy of the model")
    if outputs[0].shape != outputs[1].shape or not torch.equal(outputs[0], outputs[1]):
        raise Wrong("the model's output changed")


def freed(collect: Collect) -> None:
    """freed when dropped, without the cycle collector"""
    model = Net(lambda m, x: m.a(x), {"a": conv()})
    gc.collect()
    gc.disable()
    try:
        found = collect(model, ["a"], [((X,), {})], _nothing)
        value = found["a"][0]
        alive = weakref.ref(value)
        del found, value
        if alive() is not None:
            raise Wrong("freed by the cycle collector only")
    finally:
        gc.enable()


#: In the order of the table. The docstring is the row's name.
CASES: tuple[Callable[[Collect], None], ...] = (
    five_plain,
    inplace_relu,
    inplace_add,
    view_write,
    three_calls,
    two_passes,
    raises,
    checkpointed,
    compiled,
    scripted,
    parameter,
    borrowed_weight,
    tuple_output,
    wrong_name,
    data_dependent,
    idle_layer,
    mapped,
    keyword_only,
    fast_path,
    freed,
)
