"""Hints from the API to the scheduler. A failure means jobs that start half a second late, or an API that breaks."""

import threading
import time
import uuid
from contextlib import contextmanager

import pytest

from service.nudge import Nudge, NudgeListener

LONG_S = 20.0
SHORT_S = 0.05


@contextmanager
def _closing(*ends):
    try:
        yield ends
    finally:
        for end in ends:
            end._socket.close()  # in the service they live as long as their process


@pytest.fixture
def url():
    return f"sqlite:////tmp/{uuid.uuid4().hex}.sqlite"


def _waited_s(listener, timeout_s):
    started_at = time.monotonic()
    listener.wait(timeout_s)
    return time.monotonic() - started_at


def test_a_hint_wakes_the_listener(url):
    with _closing(NudgeListener(url), Nudge(url)) as (listener, nudge):
        waker = threading.Timer(SHORT_S, nudge)
        waker.start()
        assert SHORT_S / 2 < _waited_s(listener, LONG_S) < LONG_S / 2
        waker.join()


def test_without_a_hint_the_listener_waits_out_its_time(url):
    with _closing(NudgeListener(url)) as (listener,):
        assert _waited_s(listener, SHORT_S) >= SHORT_S


def test_a_hint_that_came_before_the_wait_counts_once(url):
    with _closing(NudgeListener(url), Nudge(url)) as (listener, nudge):
        for _ in range(3):
            nudge()
        assert _waited_s(listener, LONG_S) < LONG_S / 2
        assert _waited_s(listener, SHORT_S) >= SHORT_S


def test_a_hint_that_nobody_hears_harms_nobody(url):
    with _closing(Nudge(url)) as (nudge,):
        nudge()
        with _closing(NudgeListener(url)) as (listener,):
            nudge()
            assert _waited_s(listener, LONG_S) < LONG_S / 2
        nudge()


def test_a_flood_of_hints_blocks_nobody(url):
    with _closing(NudgeListener(url), Nudge(url)) as (listener, nudge):
        for _ in range(5000):  # far more than a socket holds
            nudge()
        assert _waited_s(listener, LONG_S) < LONG_S / 2
        assert _waited_s(listener, SHORT_S) >= SHORT_S


def test_databases_do_not_hear_each_others_hints(url):
    with _closing(NudgeListener(url), Nudge(f"{url}x")) as (listener, other):
        other()
        assert _waited_s(listener, SHORT_S) >= SHORT_S


def test_of_two_listeners_the_first_hears_and_the_second_polls(url):
    with _closing(NudgeListener(url), NudgeListener(url), Nudge(url)) as (first, second, nudge):
        nudge()
        assert _waited_s(second, SHORT_S) >= SHORT_S
        assert _waited_s(first, LONG_S) < LONG_S / 2


def test_a_listener_may_come_after_another_has_gone(url):
    with _closing(NudgeListener(url)):
        pass
    with _closing(NudgeListener(url), Nudge(url)) as (listener, nudge):
        nudge()
        assert _waited_s(listener, LONG_S) < LONG_S / 2
