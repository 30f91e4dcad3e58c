"""How the API is served."""

import statistics
import time

import pytest

from service.api.server import bind


def test_small_answers_are_sent_at_once(api):
    def took_s() -> float:
        started = time.perf_counter()
        assert api.get("/healthz").status_code == 200
        return time.perf_counter() - started

    # Without TCP_NODELAY the body waits for the acknowledgement of the head, which the other side delays by 40 ms.
    assert statistics.median(took_s() for _ in range(9)) < 0.035


def test_a_port_that_is_taken_is_refused():
    with bind() as listener:
        listener.listen()
        with pytest.raises(OSError, match="in use"):
            bind(port=listener.getsockname()[1])
    with bind("::1") as listener:
        assert listener.getsockname()[0] == "::1"
