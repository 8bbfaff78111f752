"""Random networks against a second implementation: what is captured is what ran, and the model does not notice.

2,000 networks, the same in every run; ``CONVTAP_SOAK=20000`` draws that many new ones.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import Counter
from typing import Any

import torch
from hypothesis import HealthCheck, given, note, settings
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from convtap import ModifiedInPlace, NotCaptured, capture
from convtap._errors import CoverageWarning, StopForward
from convtap._torch.modes import open_tokens
from tests.interpreter import Event, Interpreter
from tests.networks import Case, Net, Options, Planned, cases
from tests.reference import same, snapshot_of

SOAK = int(os.environ.get("CONVTAP_SOAK", "0"))

profile = settings(
    max_examples=SOAK or 2000,
    derandomize=not SOAK,
    database=None,
    deadline=None,
    print_blob=True,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


class Run:
    """A network run over a case's passes: its outputs (or errors), its state afterwards and the random numbers used."""

    def __init__(self, case: Case, captures: tuple[Options, ...]) -> None:
        torch.manual_seed(case.seed)
        self.case = case
        self.net = Net(case)
        if case.dtype in ("float64", "bfloat16"):
            self.net.to(getattr(torch, case.dtype))
        self.net.train(case.training)
        self.captures = captures
        self.acts: list[Any] = []
        self.open: list[tuple[Options, Any]] = []
        self.empty: list[Options] = []
        self.gradients: list[tuple[Options, Any, Any]] = []  # calls, and the values whose gradients they are to have
        self.outputs: list[Any] = []
        self.before = snapshot_of(self.net)

    def start(self) -> list[Tensor]:
        torch.manual_seed(100 + self.case.seed)
        dtype = next(self.net.parameters()).dtype
        return [torch.randn(batch, 2, length).to(dtype) for _, batch, length in self.case.passes]

    def all_passes(self) -> Run:
        inputs = self.start()
        with mode(self.case):
            for i, x in enumerate(inputs):
                self.enter(i)
                if self.one_pass(i, x):
                    break
                self.leave(i)
        self.state = {key: value.clone() for key, value in self.net.state_dict().items()}
        self.random = torch.random.get_rng_state()
        return self

    def one_pass(self, i: int, x: Tensor) -> bool:
        part = self.case.passes[i][0]
        try:
            self.outputs.append((self.net if part < 0 else self.net.blocks[part])(x))
        except Planned:
            self.outputs.append("planned")
        except StopForward as stop:
            ((_, block),) = self.open
            return block.__exit__(type(stop), stop, None)
        except RuntimeError as error:
            self.outputs.append(str(error))
        return False

    def enter(self, i: int) -> None:
        for o in self.captures:
            if o.first == i:
                block = capture(self.net, strict=o.layers is None, **arguments(o))
                self.acts.append((o, block.__enter__()))
                self.open.append((o, block))

    def leave(self, i: int) -> None:
        for o, block in [pair for pair in self.open if pair[0].last == i]:
            try:
                block.__exit__(None, None, None)
            except NotCaptured:
                self.empty.append(o)

    def backward(self) -> Any:
        outputs = [o for o in self.outputs if isinstance(o, Tensor) and o.requires_grad]
        if not outputs:
            return None
        try:
            loss_of(outputs).backward()
        except RuntimeError as error:
            return type(error)
        return [p.grad for p in self.net.parameters()]


def loss_of(outputs: list[Tensor]) -> Tensor:
    return torch.stack([torch.tanh(output.float()).sum() for output in outputs]).sum()


@contextlib.contextmanager
def mode(case: Case):
    modes = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
    with modes[case.grad](), torch.autocast("cpu", enabled=case.dtype == "autocast"):
        yield


def arguments(o: Options) -> dict[str, Any]:
    names = ("at", "detach", "copy", "dtype", "keep", "functional", "offload", "stop", "grads")
    return {
        "layers": None if o.layers is None else list(o.layers),
        "reduce": mean_of if o.reduce else None,
        **{name: getattr(o, name) for name in names},
    }


def mean_of(tensor: Tensor) -> Tensor:
    return tensor.mean(-1)


# -- what is expected


def expected_events(o: Options, reference: Interpreter) -> list[Event]:
    """What a capture is to hold, before ``keep``: the events of its passes that it selects."""

    def wanted(event: Event) -> bool:
        if event.via == "function":
            selected = o.layers is None or event.name in o.layers
            return o.functional is not False and selected and not (event.name == "own" and o.layers is not None)
        if o.layers is None:
            return "conv" in event.name
        return event.name in o.layers

    events = reference.events if o.at == "output" else reference.given
    found = [e for e in events if o.first <= e.part <= o.last and wanted(e)]
    if o.stop:
        assert o.layers is not None
        missing = set(o.layers)
        for i, event in enumerate(found):
            missing.discard(event.name)
            if not missing:
                return found[: i + 1]
    return found


def kept(value: Any, o: Options) -> Any:
    """The value as the options ask for it, computed here."""
    if isinstance(value, tuple):
        return tuple(kept(item, o) for item in value)
    if isinstance(value, dict):
        return {key: kept(item, o) for key, item in value.items()}
    value = value.mean(-1) if o.reduce else value
    return value if o.dtype is None else value.to(o.dtype)


def check_capture(
    case: Case, o: Options, acts: Any, reference: Interpreter, was_empty: bool, gradients: list[Any]
) -> list[tuple[Tensor, Tensor]]:
    """Compares one capture with the reference; returns (captured, reference) tensors on the path to the loss."""
    events = expected_events(o, reference)
    counts = Counter(e.name for e in events)
    numbers, runs = [], Counter()
    for event in events:
        numbers.append(runs[event.name])
        runs[event.name] += 1
    pairs = list(zip(events, numbers, strict=True))
    if o.keep == "last":
        pairs = [(e, n) for e, n in pairs if n == counts[e.name] - 1]
    calls = acts.calls()
    assert [(c.name, c.via) for c in calls] == [(e.name, e.via) for e, _ in pairs]
    assert [c.index for c in calls] == [n for _, n in pairs]
    single = [counts[e.name] == 1 or o.keep == "last" for e, _ in pairs]
    keys = [e.name if alone else f"{e.name}#{n}" for (e, n), alone in zip(pairs, single, strict=True)]
    assert list(acts) == keys
    for name, count in counts.items():
        assert acts.coverage[name].captured == count
    if o.layers is None:
        assert was_empty == (not events)
    passes = [c.forward for c in calls]
    for forward, (event, _) in zip(passes, pairs, strict=True):
        if event.part == pairs[0][0].part:
            assert forward == passes[0]
        elif not may_be_one_pass(case, pairs[0][0].part, event.part):
            assert forward != passes[0]
    assert o.keep == "last" or passes == sorted(passes)
    if o.grads:
        gradients.extend((o, call, event.value) for call, (event, _) in zip(calls, pairs, strict=True))
    return [
        pair
        for call, (event, _) in zip(calls, pairs, strict=True)
        for pair in check_call(o, call, event, is_held(o, case))
    ]


def may_be_one_pass(case: Case, first: int, last: int) -> bool:
    """Whether calls of the network may be one pass: calls of different parts, with no call of the whole between them."""
    parts = [part for part, _, _ in case.passes[first : last + 1]]
    return min(parts) >= 0 and parts[0] != parts[-1]


def is_held(o: Options, case: Case) -> bool:
    """Whether another capture keeps aliases, so that the model has to go on with the very tensors that it made."""
    return any(other is not o and not other.copy for other in case.captures)


def check_call(o: Options, call: Any, event: Event, held: bool) -> list[tuple[Tensor, Tensor]]:
    try:
        output = call.output
    except ModifiedInPlace:
        assert event.was_written
        assert not o.copy or (not o.detach and (o.at == "input" or event.shares_memory or held))
        assert not o.reduce
        assert o.dtype is None
        return []
    assert same(output, kept(event.value, o)), f"{call.key} has another value than it had when it ran"
    if o.detach:
        assert not any(t.requires_grad for t in tensors(output))
        return []
    if o.reduce or o.dtype is not None:
        return []
    found = list(zip(tensors(output), tensors(event.value), strict=True))
    assert [a.requires_grad for a, _ in found] == [b.requires_grad for _, b in found]
    return [pair for pair in found if pair[0].requires_grad]


def tensors(value: Any) -> list[Any]:
    """The tensors of a structure, and None where it has None."""
    if value is None or isinstance(value, Tensor):
        return [value]
    return [t for item in (value.values() if isinstance(value, dict) else value) for t in tensors(item)]


def mentions(case: Case, *words: str) -> bool:
    text = repr((case.body, case.blocks))
    return any(f"'{word}'" in text for word in words)


# -- the test


def check(case: Case) -> None:
    plain = Run(case, ()).all_passes()
    tapped = Run(case, case.captures).all_passes()
    assert snapshot_of(tapped.net) == tapped.before
    assert open_tokens() == ()
    assert _get_current_function_mode_stack() == []
    stopped = any(o.stop for o in case.captures) and len(tapped.outputs) < len(plain.outputs)
    if not stopped:
        assert same(tapped.outputs, plain.outputs) or tapped.outputs == plain.outputs
        assert same(tapped.state, plain.state)
        assert torch.equal(tapped.random, plain.random)
    if any(isinstance(output, str) and output != "planned" for output in plain.outputs):
        return  # torch refuses what the network does
    reference = referred(case, plain)
    paths = [
        pair
        for o, acts in tapped.acts
        for pair in check_capture(case, o, acts, reference, o in tapped.empty, tapped.gradients)
    ]
    if stopped:
        return
    if paths and case.dtype in ("float32", "float64") and not mentions(case, "alias", "recomputed"):
        check_gradients(tapped, reference, paths)
    gradients = plain.backward()
    found = tapped.backward()
    # What the model goes on with may be a snapshot of its own, and then torch has nothing to refuse.
    parted = any(not o.detach or o.grads for o in case.captures)
    assert same_gradients(found, gradients) or (gradients is RuntimeError and parted)
    # Inside a checkpoint torch does not check versions, and an in-place write there gives it wrong gradients.
    if isinstance(found, list) and case.dtype in ("float32", "float64") and not mentions(case, "recomputed"):
        check_collected(tapped, reference)


def referred(case: Case, plain: Run) -> Interpreter:
    """Runs the second implementation, and holds the network without a capture against it."""
    other = Run(case, ())
    inputs = other.start()
    reference = Interpreter(other.net)
    reference.outputs = []
    with mode(case):
        for i, x in enumerate(inputs):
            reference.part = i
            try:
                reference.outputs.append(reference.forward(case.passes[i][0], x).value)
            except Planned:
                reference.outputs.append("planned")
    assert same(reference.outputs, plain.outputs), "the two implementations do not agree: a fault of the test"
    assert torch.equal(torch.random.get_rng_state(), plain.random)
    return reference


def check_gradients(tapped: Run, reference: Interpreter, paths: list[tuple[Tensor, Tensor]]) -> None:
    outputs = [(a, b) for a, b in zip(tapped.outputs, reference.outputs, strict=True) if isinstance(a, Tensor)]
    outputs = [(a, b) for a, b in outputs if a.requires_grad]
    if not outputs:
        return
    try:
        found = gradients_of([a for a, _ in outputs], [a for a, _ in paths])
    except RuntimeError as error:
        if "inplace" in str(error):  # the network itself cannot be differentiated; compared with the plain one below
            return
        raise
    expected = gradients_of([b for _, b in outputs], [b for _, b in paths])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(zero_if_none(a, b), zero_if_none(b, a), rtol=1e-4, atol=1e-5, equal_nan=True)


def check_collected(tapped: Run, reference: Interpreter) -> None:
    """Compares ``Call.grad`` with the reference's gradients."""
    outputs = [o for o in reference.outputs if isinstance(o, Tensor) and o.requires_grad]
    for o, call, value in tapped.gradients:
        if not all(t.requires_grad for t in tensors(value)):
            continue
        expected = gradients_of(outputs, tensors(value))
        found = [None] * len(expected) if call.grad is None else tensors(call.grad)
        for a, b in zip(found, expected, strict=True):
            exact = (1e-4, 1e-5) if o.dtype is None else (2e-3, 1e-5)
            a, b = zero_if_none(a, b), zero_if_none(b, a)
            if a is not None and b is not None:
                assert a.dtype is (o.dtype or b.dtype) or not a.any()
                torch.testing.assert_close(a.to(b.dtype), b, rtol=exact[0], atol=exact[1], equal_nan=True)


def gradients_of(outputs: list[Tensor], tensors: list[Tensor]) -> Any:
    return torch.autograd.grad(loss_of(outputs), tensors, allow_unused=True, retain_graph=True)


def zero_if_none(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return torch.zeros_like(b) if a is None and b is not None else a


def same_gradients(a: Any, b: Any) -> bool:
    if not isinstance(a, list) or not isinstance(b, list):
        return a is b
    return all((x is None) == (y is None) and (x is None or same(x, y)) for x, y in zip(a, b, strict=True))


@profile
@given(case=cases())
def test_captures_of_random_networks_hold_what_a_second_implementation_computes(case):
    note(str(case))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        check(case)
