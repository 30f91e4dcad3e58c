"""Fixtures that hand out migrated databases and stores; made once, emptied or copied for each test."""

import shutil

import pytest

from service.store import SqlStore, migrate
from service.store.engine import create_engine
from tests.contract.store_databases import KINDS, empty, postgres_schema, sqlite_url
from tests.fakes import FakeJobStore


@pytest.fixture(scope="session")
def _migrated_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "migrated.sqlite"
    migrate(sqlite_url(path))
    return path


@pytest.fixture(scope="session")
def _migrated_schema():
    with postgres_schema() as url:
        migrate(url)
        engine = create_engine(url)
        yield engine
        engine.dispose()


@pytest.fixture(params=KINDS)
def database_url(request, tmp_path):
    """A database with all tables and no rows."""
    return _database_url(request.param, request, tmp_path)


def _database_url(kind, request, tmp_path):
    if kind == "sqlite":
        path = tmp_path / "service.sqlite"
        shutil.copy(request.getfixturevalue("_migrated_file"), path)
        return sqlite_url(path)
    engine = request.getfixturevalue("_migrated_schema")
    empty(engine)
    return engine.url.render_as_string(hide_password=False)


@pytest.fixture(params=KINDS)
def empty_url(request, tmp_path):
    """A database without tables."""
    if request.param == "sqlite":
        yield sqlite_url(tmp_path / "service.sqlite")
    else:
        with postgres_schema() as url:
            yield url


@pytest.fixture
def store(database_url):
    store = SqlStore(database_url)
    yield store
    store.close()


@pytest.fixture(params=[*KINDS, "fake"])
def any_store(request, tmp_path):
    """An empty store of every implementation, the fake of the API's tests included."""
    if request.param == "fake":
        yield FakeJobStore()
        return
    store = SqlStore(_database_url(request.param, request, tmp_path))
    yield store
    store.close()
