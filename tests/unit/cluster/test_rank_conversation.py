"""What a training process says, on its way to the supervisor. A failure means reports lost, torn or out of order."""

import socket

import pytest

from service.cluster.conversation import Conversation
from service.domain.journal import CheckpointWritten, Metrics, Warned
from service.domain.ports import Launch
from service.domain.rank_protocol import Errored, Finished, Staged, Stepped
from service.domain.spec import parse_spec
from service.storage.manifest import write_manifest
from service.storage.object_store import ObjectStore
from service.storage.run_files import StoredRunFiles
from tests.small_disk import small_disk


class _Supervisor:
    """Stands in for the way to the supervisor; keeps what was reported, and whether it was waited for."""

    def __init__(self):
        self.reports = []
        self.num_arrived = 0

    def send(self, reports):
        self.reports += reports

    def arrive(self):
        self.num_arrived = len(self.reports)


class _Rank:
    def __init__(self, directory, *, on_failure="continue"):
        spec = parse_spec(
            {
                "name": "digits",
                "model": {"factory": "builtin:mlp"},
                "dataset": {"factory": "builtin:digits"},
                "batch": {"size": 16},
                "steps": 3,
                "checkpoint": {"on_failure": on_failure},
            }
        )
        launch = Launch(
            job_id="job",
            attempt=1,
            spec=spec,
            node_ids=("a", "a"),
            storage_url=str(directory / "runs"),
            storage_id=ObjectStore(str(directory / "runs")).identify(),
            checkpoints=(),
            collective_timeout_s=1.0,
            start_timeout_s=1.0,
            stop_grace_s=1.0,
        )
        self.supervisor = _Supervisor()
        self.store = ObjectStore(launch.storage_url)
        self.conversation = Conversation(launch, 1, self.supervisor, self.store)
        self.ours, self.theirs = socket.socketpair()
        self._directory = directory

    def say(self, *messages):
        """Let the process say something, and take all of it in."""
        self.hear(b"".join(message.model_dump_json().encode() + b"\n" for message in messages))

    def hear(self, data):
        self.theirs.sendall(data)
        assert self.conversation.receive(self.ours)

    def stage(self, step, *, is_damaged=False):
        staged = self._directory / f"staged-{step}"
        staged.mkdir()
        (staged / "model.safetensors").write_bytes(b"weights")
        write_manifest(
            staged, job_id="job", attempt=1, step=step, spec_sha256="", world_size=2, metrics={}, versions={}
        )
        if is_damaged:
            (staged / "model.safetensors").write_bytes(b"damaged")
        return Staged(step=step, directory=str(staged), metrics={})

    def end(self, exit_status=0):
        """Let the process go; return how it ended."""
        self.theirs.close()
        assert not self.conversation.receive(self.ours)
        return self.conversation.close(exit_status)


@pytest.fixture
def rank(tmp_path):
    rank = _Rank(tmp_path)
    yield rank
    rank.theirs.close()
    rank.ours.close()


def test_reports_are_passed_on_in_order(rank):
    messages = [Stepped(num_steps=3), Metrics.of(1, {"a": 1.0}), Warned(message="w", rank=1), Metrics.of(2, {})]
    rank.say(*messages[:2])
    rank.say(*messages[2:])
    assert rank.supervisor.reports == messages
    rank.say(Finished(step=3, stopped=False))
    end = rank.end()
    assert (end.is_clean, end.step, end.stopped) == (True, 3, False)
    assert rank.supervisor.reports == messages


def test_a_message_may_come_in_pieces(rank):
    message = Metrics.of(1, {"naïve": 1.0})
    data = message.model_dump_json().encode() + b"\n"
    for position in range(len(data)):
        rank.hear(data[position : position + 1])
    rank.hear(data + data[:7])
    rank.hear(data[7:])
    assert rank.supervisor.reports == [message] * 3


def test_a_line_that_its_process_did_not_finish_is_left_out(rank):
    rank.hear(Warned(message="half", rank=1).model_dump_json().encode()[:-5])
    end = rank.end(exit_status=-9)
    assert rank.supervisor.reports == []
    assert (end.is_clean, end.exit_status, end.step) == (False, -9, None)


def test_a_checkpoint_is_stored_and_then_reported(rank):
    staged = rank.stage(2)
    rank.say(Metrics.of(2, {"a": 1.0}), staged, Finished(step=3, stopped=True))
    end = rank.end()
    first, written = rank.supervisor.reports
    assert first == Metrics.of(2, {"a": 1.0})
    assert isinstance(written, CheckpointWritten)
    assert (written.step, written.path) == (2, "jobs/job/attempts/1/checkpoints/000000002")
    assert rank.store.size(f"{written.path}/model.safetensors") == 7
    assert (end.is_clean, end.stopped) == (True, True)
    # Node-local disk is given back.
    assert not (rank._directory / "staged-2").exists()


def test_checkpoints_are_stored_in_their_order(rank):
    rank.say(*(rank.stage(step) for step in (1, 2, 3)), Finished(step=3, stopped=False))
    rank.end()
    assert [report.step for report in rank.supervisor.reports] == [1, 2, 3]


def test_a_checkpoint_that_could_not_be_stored_is_a_warning_while_others_follow(rank):
    rank.say(rank.stage(1, is_damaged=True), rank.stage(2), Finished(step=3, stopped=False))
    end = rank.end()
    warning, written = rank.supervisor.reports
    assert isinstance(warning, Warned)
    assert "step 1 could not be stored" in warning.message
    assert (warning.rank, written.step) == (1, 2)
    assert end.is_clean


def test_a_last_checkpoint_that_could_not_be_stored_is_the_end_of_the_rank(rank):
    rank.say(rank.stage(1), rank.stage(3, is_damaged=True), Finished(step=3, stopped=False))
    end = rank.end()
    assert not end.is_clean
    assert (end.error.cause, end.error.error_type) == ("checkpoint", "CorruptCheckpoint")


def test_what_the_process_met_itself_comes_first(rank):
    error = Errored(cause="user", error_type="ValueError", message="bad", traceback="…")
    rank.say(rank.stage(1, is_damaged=True), error)
    end = rank.end(exit_status=1)
    assert end.error == error
    assert end.step is None


@pytest.fixture
def strict_rank(tmp_path):
    """Of a job that stops when a checkpoint cannot be stored."""
    rank = _Rank(tmp_path, on_failure="stop")
    yield rank
    rank.theirs.close()
    rank.ours.close()


def test_a_job_that_stops_without_its_checkpoints_is_hung_up_on(strict_rank):
    rank = strict_rank
    rank.say(rank.stage(1, is_damaged=True))
    rank.conversation._uploads[-1].result(timeout=30)
    rank.theirs.sendall(Metrics.of(2, {}).model_dump_json().encode() + b"\n")
    assert not rank.conversation.receive(rank.ours)
    assert rank.theirs.recv(1) == b"", "the process hears that nobody listens"
    end = rank.conversation.close(1)
    assert (end.error.cause, end.error.error_type) == ("checkpoint", "CorruptCheckpoint")
    assert "step 1 could not be stored" in end.error.message


def test_an_attempt_that_was_given_up_stores_no_checkpoint_and_is_hung_up_on(rank):
    """As behind a network that was cut: another attempt runs, and this one is the last to know."""
    rank.say(rank.stage(1))
    rank.conversation._uploads[-1].result(timeout=30)
    StoredRunFiles(rank.store).seal("job", 1)
    rank.say(rank.stage(2))
    rank.conversation._uploads[-1].result(timeout=30)
    assert not rank.conversation.receive(rank.ours)
    assert rank.theirs.recv(1) == b""
    end = rank.conversation.close(1)
    assert (end.error.cause, end.error.error_type) == ("checkpoint", "StaleWrite")
    assert rank.store.names("jobs/job/attempts/1/checkpoints") == ["000000001"]
    assert not (rank._directory / "staged-2").exists()


def test_a_job_that_has_finished_has_no_use_for_an_earlier_checkpoint(strict_rank):
    rank = strict_rank
    rank.say(rank.stage(1, is_damaged=True), rank.stage(3), Finished(step=3, stopped=False))
    rank.theirs.close()
    while rank.conversation.receive(rank.ours):
        pass
    assert rank.conversation.close(0).is_clean


def test_full_run_storage_is_a_warning_and_gives_its_room_back(tmp_path):
    with small_disk(tmp_path / "runs", 64 << 10) as disk:
        rank = _Rank(tmp_path)
        large, small = rank.stage(1), rank.stage(2)
        weights = tmp_path / "staged-1" / "model.safetensors"
        weights.write_bytes(bytes(100 << 10))
        write_manifest(
            weights.parent, job_id="job", attempt=1, step=1, spec_sha256="", world_size=2, metrics={}, versions={}
        )
        rank.say(large, small, Finished(step=3, stopped=False))
        end = rank.end()
        warning, written = rank.supervisor.reports
        assert "step 1 could not be stored" in warning.message
        assert written.step == 2
        assert end.is_clean
        assert [path.name for path in (disk / "jobs/job/attempts/1/checkpoints").iterdir()] == ["000000002"]
        rank.theirs.close()
        rank.ours.close()
