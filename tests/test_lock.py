"""An interrupt at any moment leaves no lock of the package locked."""

from __future__ import annotations

import random
import signal
import threading

import pytest

from convtap._torch.lock import Lock
from tests.structure import MODULES


@pytest.fixture
def strike():
    """Interrupts an action after some seconds, by a signal. Returns whether the interrupt came in time."""
    armed = [False]

    def handler(number, frame):
        if armed[0]:
            armed[0] = False
            raise KeyboardInterrupt

    def strike(seconds, action):
        try:
            armed[0] = True
            signal.setitimer(signal.ITIMER_REAL, seconds)
            action()
            armed[0] = False
        except KeyboardInterrupt:
            return True
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return False

    before = signal.signal(signal.SIGALRM, handler)
    yield strike
    signal.signal(signal.SIGALRM, before)


def is_free(lock):
    """Whether another thread can lock it."""
    found = []

    def attempt():
        found.append(lock.acquire(blocking=False))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return found[0]


def test_an_interrupt_at_any_moment_leaves_the_lock_unlocked(strike):
    lock = Lock()

    def often():
        for _ in range(2000):
            with lock:
                pass

    draw, struck = random.Random(0), 0
    for _ in range(1000):
        struck += strike(draw.uniform(1e-6, 3e-4), often)
        assert not lock._is_owned()
    assert struck > 500


def test_an_interrupt_while_it_waits_leaves_the_lock_to_its_owner(strike):
    lock, locked, done = Lock(), threading.Event(), threading.Event()

    def own():
        with lock:
            locked.set()
            done.wait(20)

    owner = threading.Thread(target=own)
    owner.start()
    locked.wait(20)

    def enter():
        with lock:
            pass

    assert strike(0.05, enter)
    assert not is_free(lock)
    done.set()
    owner.join()
    assert is_free(lock)


def test_the_package_has_no_other_locks():
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert name == "_torch.lock" or not ("threading.Lock(" in text or "threading.RLock(" in text), name
