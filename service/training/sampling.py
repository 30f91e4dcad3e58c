"""Which samples a step trains on: a pure function of (seed, epoch, step), whatever the world."""

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """Every sample once per epoch in an order of its own.

    Attributes:
        num_samples: of the training split.
        batch_size: samples of a mini-batch, at most ``num_samples``.
        seed: of the job.
        drop_last: whether an epoch's last, partial mini-batch is left out.
        shuffled: whether samples are reordered; a stream comes in an order of its own.
    """

    num_samples: int
    batch_size: int
    seed: int
    drop_last: bool = True
    shuffled: bool = True

    @property
    def steps_per_epoch(self) -> int:
        """Mini-batches in an epoch."""
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def minibatch(self, step: int) -> NDArray[np.int64]:
        """Return the samples of a mini-batch.

        Args:
            step: optimizer steps done before it.

        Returns:
            Indices into the training split, shape (batch_size,); fewer at an epoch's end where it is not dropped.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        first, last = position * self.batch_size, (position + 1) * self.batch_size
        if not self.shuffled:
            return np.arange(first, min(last, self.num_samples))
        return permutation(self.num_samples, seed=self.seed, purpose="samples", index=epoch)[first:last]


@lru_cache(maxsize=4)
def permutation(length: int, *, seed: int, purpose: str, index: int = 0) -> NDArray[np.int64]:
    """Return the permutation of ``range(length)`` that belongs to a key.

    It sorts the raw stream of a counter-based generator (Philox; Salmon et al. 2011), which, unlike the methods of
    ``numpy.random.Generator`` and of torch, stays the same from release to release.

    Returns:
        Shape (length,), read-only.
    """
    generator = np.random.Philox(key=derive_seed(seed=seed, purpose=purpose, index=index))
    order = np.argsort(generator.random_raw(length), kind="stable")
    order.setflags(write=False)
    return order


def derive_seed(*, seed: int, purpose: str, index: int = 0) -> int:
    """Return a 63-bit seed that belongs to one use of the job's seed, unrelated to those of other uses."""
    digest = blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
