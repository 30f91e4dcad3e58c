"""The channel to the rank actor: requests in any pieces, and an actor that is gone."""

import socket

import pytest

from service.domain.rank_protocol import Finished, StopRequest, parse_from_rank
from service.training.channel import Channel
from service.training.errors import ChannelClosed


@pytest.fixture
def actor_and_channel():
    ours, theirs = socket.socketpair()
    with ours:
        channel = Channel(theirs.detach())
        yield ours, channel
        channel.close()


def test_a_stop_may_come_in_pieces_and_is_remembered(actor_and_channel):
    actor, channel = actor_and_channel
    line = StopRequest().model_dump_json().encode() + b"\n"
    assert not channel.stop_requested()
    actor.sendall(line[:5])
    assert not channel.stop_requested()
    actor.sendall(line[5:] + line)
    assert channel.stop_requested()
    assert channel.stop_requested()


def test_a_message_is_one_line(actor_and_channel):
    actor, channel = actor_and_channel
    channel.send(Finished(step=3, stopped=False))
    line = actor.recv(1000)
    assert line.endswith(b"\n")
    assert parse_from_rank(line) == Finished(step=3, stopped=False)


def test_an_actor_that_hung_up_is_noticed(actor_and_channel):
    actor, channel = actor_and_channel
    actor.close()
    with pytest.raises(ChannelClosed, match="gone"):
        channel.stop_requested()
    with pytest.raises(ChannelClosed, match="does not read"):
        channel.send(Finished(step=3, stopped=False))
