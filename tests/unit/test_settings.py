"""What an operator sets. A failure means a setting that nobody finds, or that is read otherwise than documented."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"SYNCBN_{name.upper()}", raising=False)


def test_every_setting_is_documented_and_every_documented_one_exists():
    documented = set(re.findall(r"SYNCBN_([A-Z_]+)", OPERATIONS.read_text()))
    names = {name.upper() for name in Settings.model_fields}
    assert names - documented == set()
    # The client's own, and the tests', which are no settings of the service.
    assert documented - names <= {"URL", "OWNER", "CRASH_AT"}


def test_documented_defaults_are_the_defaults():
    rows = re.findall(r"^\| `SYNCBN_([A-Z_]+)` \| ([\d.]+) \|", OPERATIONS.read_text(), flags=re.MULTILINE)
    assert len(rows) >= 4
    settings = Settings()
    for name, default in rows:
        assert getattr(settings, name.lower()) == float(default), name


def test_the_docstring_names_every_setting():
    described = re.findall(r"^    +(\w+): ", Settings.__doc__, flags=re.MULTILINE)
    assert described == list(Settings.model_fields)


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("SYNCBN_MAX_CPUS", "2.5")
    monkeypatch.setenv("SYNCBN_LEASE_TTL_S", "0.5")
    monkeypatch.setenv("SYNCBN_NODE_DIR", "/tmp/node")
    monkeypatch.setenv("SYNCBN_UNHEARD_OF", "1")
    settings = Settings()
    assert (settings.max_cpus, settings.lease_ttl_s, settings.node_dir) == (2.5, 0.5, Path("/tmp/node"))
    assert Settings(lease_ttl_s=7.0).lease_ttl_s == 7.0


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon", ""])
@pytest.mark.parametrize("name", ["LEASE_TTL_S", "COLLECTIVE_TIMEOUT_S", "START_TIMEOUT_S", "STOP_GRACE_S"])
def test_a_duration_is_a_positive_number(monkeypatch, name, value):
    monkeypatch.setenv(f"SYNCBN_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()


def test_everything_lies_in_the_data_directory_unless_said_otherwise(tmp_path):
    settings = Settings(data_dir=tmp_path)
    assert settings.database == f"sqlite:///{tmp_path}/service.sqlite"
    assert settings.storage == f"{tmp_path}/runs"
    assert settings.node_dir_or_default == tmp_path / "node"
    told = Settings(database_url="postgresql://host/db", storage_url="s3://bucket/runs", node_dir=Path("/scratch"))
    assert (told.database, told.storage) == ("postgresql://host/db", "s3://bucket/runs")
    assert told.node_dir_or_default == Path("/scratch")


def test_settings_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        Settings().token = "other"
