"""Run storage: journals, logs and checkpoints through fsspec; no SQL."""
