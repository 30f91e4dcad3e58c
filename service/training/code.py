"""The job's own code in the training process."""

import logging
import sys
from pathlib import Path

from service.domain.rank_protocol import RankTask

_log = logging.getLogger(__name__)


def bring_code(task: RankTask) -> None:
    """Let modules of the job's bundle be imported, and the packages that its requirements.txt asked for.

    The bundle comes before everything that is installed, the packages after it: they add to the service's own
    environment and replace nothing of it. Nothing is imported here.

    Args:
        task: of this process, which has imported none of it yet.
    """
    # What is brought is shared by the node's ranks and compared with its hashes: no bytecode is written beside it.
    sys.dont_write_bytecode = True
    if task.code_dir is not None:
        sys.path.insert(0, task.code_dir)
        for name in _taken_names(Path(task.code_dir)):
            _log.warning(
                "The bundle's %r has the name of a module that is imported already, so `import %s` does not give the "
                "bundle's. Rename it, or put it into a package.",
                name,
                name,
            )
    if task.packages_dir is not None:
        sys.path.append(task.packages_dir)


def _taken_names(code_dir: Path) -> list[str]:
    """Return the bundle's top-level modules that the process has under their names from elsewhere."""
    names = {
        path.stem if path.suffix == ".py" else path.name
        for path in code_dir.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    return sorted(names & sys.modules.keys())
