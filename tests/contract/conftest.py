import pytest

from tests.contract.store_fixtures import _migrated_file, _migrated_schema, any_store

__all__ = ["_migrated_file", "_migrated_schema", "any_store", "store"]


@pytest.fixture
def store(any_store):
    return any_store
