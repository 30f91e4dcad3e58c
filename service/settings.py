"""What an operator sets, from the environment (``SYNCBN_…``) or by ``syncbn serve``'s options."""

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.domain.ports import MAX_LOG_BYTES
from service.domain.uploads import MAX_BUNDLE_BYTES, MAX_DATASET_BYTES, NODE_CACHE_BYTES, PREPARE_TIMEOUT_S


def default_data_dir() -> Path:
    """Return where the embedded service keeps its data unless told otherwise."""
    return Path.home() / ".syncbn"


class Settings(BaseSettings):
    """Settings of the service's processes. docs/operations.md lists them; a test compares.

    Attributes:
        data_dir: database, token, run storage and logs of the embedded service.
        database_url: SQLAlchemy URL; by default an SQLite file in ``data_dir``.
        storage_url: root of run storage, a path or an fsspec URL; by default a directory in ``data_dir``.
        token: guards every route but health; by default made at first start and kept in ``data_dir``.
        ray_address: ``host:port`` of the Ray head.
        node_ip: address of the scheduler's machine that the cluster's nodes use; by default Ray finds it.
        pass_environment: comma-separated names of variables that training processes are given beside the usual ones.
        node_dir: node-local directory, on every node, for logs under way and staged checkpoints.
        max_cpus: CPUs that the cluster will ever have; jobs that need more are refused. None: unknown.
        max_gpus: likewise GPUs.
        max_memory_bytes: likewise main memory.
        max_bundle_bytes: largest bundle of code that may be uploaded.
        max_dataset_bytes: largest file of data that may be uploaded.
        upload_dir: local directory in which the API keeps a body until it is whole and checked.
        node_cache_bytes: most that a node keeps of bundles, files of data and environments, but for those in use.
        max_log_bytes: most that run storage keeps of what a rank of an attempt prints.
        lease_ttl_s: how long a leader may be silent, by the clock of whoever watches it, before another takes over.
        collective_timeout_s: how long a rank waits for its peers.
        start_timeout_s: how long the ranks of an attempt may take to start.
        prepare_timeout_s: how long a node may take before that to fetch what the job brings and install requirements.
        stop_grace_s: how long a rank that was asked to stop may take for its last checkpoint.
        resize_interval_s: how long an elastic job runs before it is interrupted to give it more workers.
        warm_supervisors: how many supervisors wait for an attempt.
        warm_ranks: how many rank actors wait for an attempt on each node.
    """

    model_config = SettingsConfigDict(env_prefix="SYNCBN_", extra="ignore", frozen=True)

    data_dir: Path = Field(default_factory=default_data_dir)
    database_url: str | None = None
    storage_url: str | None = None
    token: str | None = None
    ray_address: str | None = None
    node_ip: str | None = None
    pass_environment: str = ""
    node_dir: Path | None = None
    max_cpus: Annotated[float | None, Field(ge=0)] = None
    max_gpus: Annotated[int | None, Field(ge=0)] = None
    max_memory_bytes: Annotated[int | None, Field(ge=0)] = None
    max_bundle_bytes: Annotated[int, Field(ge=1)] = MAX_BUNDLE_BYTES
    max_dataset_bytes: Annotated[int, Field(ge=1)] = MAX_DATASET_BYTES
    upload_dir: Path | None = None
    node_cache_bytes: Annotated[int, Field(ge=0)] = NODE_CACHE_BYTES
    max_log_bytes: Annotated[int, Field(ge=2**20)] = MAX_LOG_BYTES
    lease_ttl_s: Annotated[float, Field(gt=0)] = 5.0
    collective_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    start_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    prepare_timeout_s: Annotated[float, Field(gt=0)] = PREPARE_TIMEOUT_S
    stop_grace_s: Annotated[float, Field(gt=0)] = 10.0
    resize_interval_s: Annotated[float, Field(ge=0)] = 60.0
    warm_supervisors: Annotated[int, Field(ge=0)] = 1
    warm_ranks: Annotated[int, Field(ge=0)] = 2

    @property
    def database(self) -> str:
        """The database's URL, with the default filled in."""
        return self.database_url or f"sqlite:///{self.data_dir / 'service.sqlite'}"

    @property
    def storage(self) -> str:
        """Run storage's root, with the default filled in."""
        return self.storage_url or str(self.data_dir / "runs")

    @property
    def upload_dir_or_default(self) -> Path:
        """The API's own local directory, with the default filled in."""
        return self.upload_dir or self.data_dir / "incoming"

    @property
    def node_dir_or_default(self) -> Path:
        """The node-local directory, with the default filled in."""
        return self.node_dir or self.data_dir / "node"
