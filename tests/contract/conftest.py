from tests.contract.store_fixtures import _migrated_file, _migrated_schema, database_url, store

__all__ = ["_migrated_file", "_migrated_schema", "database_url", "store"]
