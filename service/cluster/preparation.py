"""What a job brings, on the node of a rank: its bundle, its requirements and its files of data."""

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Self

from service.cluster.requirements import install_requirements, read_requirements
from service.cluster.training_environment import training_environment
from service.domain.ports import Launch
from service.domain.uploads import upload_references
from service.storage.node_cache import NodeCache
from service.storage.object_store import ObjectStore
from service.storage.uploads import fetch_bundle, fetch_dataset


class Preparation:
    """What a rank was brought; it stays on the node until this is closed, or its process ends.

    Attributes:
        code_dir: directory of the unpacked bundle; None where there is none.
        packages_dir: directory with the installed requirements; likewise.
        uploads: files of data, by their SHA-256.
    """

    def __init__(self) -> None:
        self.code_dir: Path | None = None
        self.packages_dir: Path | None = None
        self.uploads: dict[str, Path] = {}
        self._held = ExitStack()

    @classmethod
    def fetch(cls, launch: Launch, store: ObjectStore, cache_dir: Path, log: IO[bytes]) -> Self:
        """Fetch and install what a job brings; ranks of a node share it, and one of them does the work.

        Args:
            launch: the attempt.
            store: run storage.
            cache_dir: of this node.
            log: takes what pip says.

        Raises:
            UserCodeRefused: it cannot be used, now or later.
            StorageError: run storage does not hold what was uploaded.
            OSError: it could not be fetched or installed this time.
        """
        preparation = cls()
        try:
            preparation._fetch(launch, store, NodeCache(cache_dir, max_bytes=launch.node_cache_bytes), log)
        except BaseException:
            preparation.close()
            raise
        return preparation

    def close(self) -> None:
        """Say that the rank no longer uses it."""
        self._held.close()

    def _fetch(self, launch: Launch, store: ObjectStore, cache: NodeCache, log: IO[bytes]) -> None:
        started = time.monotonic()
        for reference in upload_references(launch.spec):
            if reference.sha256 not in self.uploads:
                data = fetch_dataset(store, reference.sha256, cache)
                self._held.callback(data.close)
                self.uploads[reference.sha256] = data.path
        code = launch.spec.code
        if code.bundle is None:
            return
        bundle = fetch_bundle(store, code.bundle, cache)
        self._held.callback(bundle.close)
        self.code_dir = bundle.path
        if not code.requirements:
            return
        requirements = read_requirements(bundle.path, code.bundle)

        def install(target: Path) -> None:
            install_requirements(
                requirements,
                target,
                environment=training_environment(os.environ),
                log=log,
                deadline_s=max(1.0, launch.prepare_timeout_s - (time.monotonic() - started)),
            )

        self.packages_dir = self._held.enter_context(cache.claim("environments", requirements.key, install)).path
