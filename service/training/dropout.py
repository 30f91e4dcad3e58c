"""Dropout whose masks belong to the normalization batch, so that no split of it over ranks changes them."""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

from service.training.errors import BadFactory
from service.training.sampling import derive_seed
from syncbn.tracking import is_recomputation


@dataclass(kw_only=True, eq=False)
class DropoutContext:
    """Which samples the present micro-step is about; shared by all dropout layers of a model.

    Attributes:
        seed: of the job.
        step: optimizer steps done.
        batch: index of the normalization batch within the mini-batch.
        num_samples: of the normalization batch.
        first: place of this rank's first sample in it.
        count: samples of this rank.
        misfits: paths of layers whose inputs did not begin with the samples' dimension.
    """

    seed: int
    step: int = 0
    batch: int = 0
    num_samples: int = 0
    first: int = 0
    count: int = 0
    misfits: set[str] = field(default_factory=set)
    _keys: dict[bytes, int] = field(default_factory=dict)
    _untouched: bytes | None = None
    _is_watching: bool = False
    _saw_foreign: bool = False

    def begin(self, *, step: int, batch: int, num_samples: int, first: int, count: int) -> None:
        """Begin a micro-step; all ranks of a group draw the same masks in it.

        Args:
            step: optimizer steps done.
            batch: index of the normalization batch.
            num_samples: of it.
            first: place of this rank's first sample in it.
            count: samples of this rank.
        """
        self.step, self.batch, self.num_samples, self.first, self.count = step, batch, num_samples, first, count
        self._keys = {}

    @contextmanager
    def watching(self) -> Iterator[Callable[[], bool]]:
        """Notice random numbers that something else than these layers draws; what is yielded says whether any were."""
        self._is_watching, self._saw_foreign = True, False
        self._untouched = _fingerprint()
        others = _other_generators()

        def saw_any() -> bool:
            return self._saw_foreign or self._untouched != _fingerprint() or others != _other_generators()

        try:
            yield saw_any
        finally:
            self._is_watching = False

    def draw(self, path: str, shape: torch.Size, device: torch.device, dtype: torch.dtype, keep: float) -> torch.Tensor:
        """Draw this rank's part of a mask: 1 where a value is kept, with probability ``keep``.

        Args:
            path: of the layer.
            shape: of the mask, the samples' dimension first; its length a multiple of this rank's samples.
            device: of the mask.
            dtype: of the mask.
            keep: the probability.

        Raises:
            BadFactory: a forward is repeated for its activations without the state of the random generator.
        """
        key = self._key(path)
        generator = torch.Generator(device)
        rows_per_sample, rest = divmod(shape[0], self.count) if self.count else (0, 1)
        if rest:
            # Not laid out by samples: whatever this rank draws is its own.
            self.misfits.add(path)
            purpose = f"dropout/{self.step}/{self.batch}/{self.first}"
            generator.manual_seed(derive_seed(seed=self.seed, purpose=purpose, index=key))
            return torch.empty(shape, device=device, dtype=dtype).bernoulli_(keep, generator=generator)
        generator.manual_seed(derive_seed(seed=self.seed, purpose=f"dropout/{self.step}/{self.batch}", index=key))
        whole = torch.empty((self.num_samples * rows_per_sample, *shape[1:]), device=device, dtype=dtype)
        whole.bernoulli_(keep, generator=generator)
        return whole[self.first * rows_per_sample :][: shape[0]]

    def _key(self, path: str) -> int:
        """Return the number of this call in the micro-step; a forward repeated in the backward gets that of the first.

        Activation checkpointing restores torch's random generator before it runs a forward again. So the generator's
        state tells which call is repeated, and each call moves it on, so that the next one has a state of its own.
        """
        state = _fingerprint()
        if self._is_watching and not is_recomputation():
            self._saw_foreign |= state != self._untouched
        if is_recomputation() and state not in self._keys:
            raise BadFactory(
                f"model: {path} is dropout inside of an activation checkpoint that does not restore the random "
                "generator, so its mask would differ in the backward. Use checkpoint(…, preserve_rng_state=True)."
            )
        key = self._keys.setdefault(state, len(self._keys))
        torch.rand(())
        if self._is_watching:
            self._untouched = _fingerprint()
        return key


def share_dropout(model: nn.Module, context: DropoutContext, *, is_compiled: bool = False) -> None:
    """Let every ``nn.Dropout*`` of a model draw its masks from a context, in place.

    Args:
        model: its modules stay the same objects.
        context: to be told of each micro-step.
        is_compiled: whether the model will be; masks are then drawn between the compiled parts.
    """
    if is_compiled:
        # Not a decorator: that would import the compiler with this module, which takes longer than a job's start.
        vars(context)["draw"] = torch.compiler.disable(context.draw)  # type: ignore[no-untyped-call]
    for path, layer in model.named_modules():
        shared = _SHARED.get(type(layer))
        if shared is not None:
            layer.__class__ = shared
            vars(layer).update(context=context, path=path)


# What SELU gives for a very negative input: what alpha dropout puts in place of a value (Klambauer et al. 2017).
_SATURATED = -1.7580993408473766


class _Shared(nn.modules.dropout._DropoutNd):
    """What stands before a class of torch.nn: its masks come from a context."""

    context: DropoutContext
    path: str
    drops_channels = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply dropout in training; (N, C, *) to the same."""
        if not self.training or self.p == 0:
            return input
        shape = input.shape
        if self.drops_channels:
            shape = torch.Size((*shape[:2], *(1 for _ in shape[2:])))
        keep = 1 - self.p
        mask = self.context.draw(self.path, shape, input.device, input.dtype, keep)
        return self._masked(input, mask, keep)

    def _masked(self, values: torch.Tensor, mask: torch.Tensor, keep: float) -> torch.Tensor:
        scaled = mask.div_(keep) if keep > 0 else mask
        return values.mul_(scaled) if self.inplace else values * scaled


class _SharedAlpha(_Shared):
    def _masked(self, values: torch.Tensor, mask: torch.Tensor, keep: float) -> torch.Tensor:
        if keep == 0:
            return values * 0
        # Mean and variance of standard normal values stay (Klambauer et al. 2017, section "New Dropout Technique").
        scale = (keep * (1 + self.p * _SATURATED**2)) ** -0.5
        shifted: torch.Tensor = (values * mask + _SATURATED * (1 - mask)) * scale - scale * _SATURATED * self.p
        return shifted


class _Dropout(_Shared, nn.Dropout):
    pass


class _Dropout1d(_Shared, nn.Dropout1d):
    drops_channels = True


class _Dropout2d(_Shared, nn.Dropout2d):
    drops_channels = True


class _Dropout3d(_Shared, nn.Dropout3d):
    drops_channels = True


class _AlphaDropout(_SharedAlpha, nn.AlphaDropout):
    pass


class _FeatureAlphaDropout(_SharedAlpha, nn.FeatureAlphaDropout):
    drops_channels = True


_SHARED: Mapping[type[nn.Module], type[_Shared]] = MappingProxyType(
    {
        nn.Dropout: _Dropout,
        nn.Dropout1d: _Dropout1d,
        nn.Dropout2d: _Dropout2d,
        nn.Dropout3d: _Dropout3d,
        nn.AlphaDropout: _AlphaDropout,
        nn.FeatureAlphaDropout: _FeatureAlphaDropout,
    }
)


def _fingerprint() -> bytes:
    return hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=16).digest()


def _other_generators() -> tuple[object, ...]:
    """Return the state of the shared generators that no layer here draws from."""
    _, numbers, *rest = np.random.get_state()
    of_device = b""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        of_device = torch.cuda.get_rng_state().numpy().tobytes()
    return random.getstate(), np.asarray(numbers).tobytes(), tuple(rest), of_device
