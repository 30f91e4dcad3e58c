"""Code such as users bring: models, datasets, tasks and training loops, each with one property that a test needs.

Jobs name it as ``tests.integration.training.brought_code:function``; ranks find it as any module on their path.
"""

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncbn import convert_sync_batchnorm

HERE = __name__


def too_large_model(kind):
    """No machine has a pebibyte."""
    return bytearray(1 << 50) if kind == "python" else torch.empty(1 << 50, dtype=torch.uint8)


class Net(nn.Module):
    """Convolution → norm → something → linear, for images of 8 × 8 pixels.

    Args:
        num_outputs: width of the output.
        between: what comes after the norm, (N, 6, 8, 8) to the same.
        momentum: of the norm.
    """

    def __init__(self, num_outputs, between=None, momentum=0.1):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6, momentum=momentum)
        self.between = between if between is not None else nn.Identity()
        self.head = nn.Linear(6 * 4 * 4, num_outputs)

    def forward(self, images):
        features = self.between(F.relu(self.norm(self.conv(images))))
        return self.head(F.max_pool2d(features, 2).flatten(1))


def plain(num_outputs, momentum=0.1):
    return Net(num_outputs, momentum=momentum)


def all_dropouts(num_outputs):
    """One layer several times in a forward among them, and a value per sample and one per window."""
    twice = nn.Dropout(0.1)
    return Net(
        num_outputs, nn.Sequential(nn.Dropout2d(0.3), twice, nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.2), twice)
    )


class Checkpointed(nn.Module):
    """A block that its author computes again in the backward."""

    def __init__(self, **options):
        super().__init__()
        self.block = nn.Sequential(nn.Dropout(0.3), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Dropout(0.3))
        self.options = options

    def forward(self, features):
        return features + checkpoint(self.block, features, **self.options)


def own_checkpoint(num_outputs, use_reentrant=False, preserve_rng_state=True):
    return Net(num_outputs, Checkpointed(use_reentrant=use_reentrant, preserve_rng_state=preserve_rng_state))


class OwnDropout(nn.Dropout):
    """A subclass, whose forward nobody but its author knows: it is left as it is."""


def dropout_left_as_it_is(num_outputs):
    return Net(num_outputs, OwnDropout(0.3))


class Draws(nn.Module):
    """Adds noise.

    Args:
        source: where from.
    """

    def __init__(self, source):
        super().__init__()
        self.source = source

    def forward(self, features):
        if not self.training:
            return features
        if self.source == "torch":
            return features + 0.1 * torch.randn_like(features)
        if self.source == "numpy":
            return features + 0.1 * torch.from_numpy(np.random.standard_normal(features.shape)).to(features)
        return features * (1 + 0.1 * random.random())


def draws(num_outputs, source):
    return Net(num_outputs, Draws(source))


class KeepsMean(nn.Module):
    """Divides by a running scale of its own, in the way of the wrong kind of batch norm."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, features):
        if self.training:
            self.scale.lerp_(features.detach().abs().mean(), 0.1)
        return features / self.scale


def keeps_a_buffer(num_outputs):
    return Net(num_outputs, KeepsMean())


class TimeFirst(nn.Module):
    """Drops out values whose first dimension is not the samples'."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def forward(self, features):
        return self.dropout(features.transpose(0, 1).contiguous()).transpose(0, 1)


def drops_out_time_first(num_outputs):
    return Net(num_outputs, TimeFirst())


class MeanOfTheBatch(nn.Module):
    """Couples the samples of a rank, unseen by anything but a comparison."""

    def forward(self, features):
        return features - features.mean(dim=0, keepdim=True)


def couples_samples(num_outputs):
    return Net(num_outputs, MeanOfTheBatch())


def zero_bias_before_a_norm(num_outputs):
    """As many networks begin; the gradient of that bias is zero but for rounding."""
    net = Net(num_outputs)
    nn.init.zeros_(net.conv.bias)
    return net


class Unused(nn.Module):
    def __init__(self, num_outputs):
        super().__init__()
        self.net = Net(num_outputs)
        self.spare = nn.Linear(4, 4)

    def forward(self, images):
        return self.net(images)


def with_an_unused_layer(num_outputs):
    return Unused(num_outputs)


def without_norm(num_outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_outputs))


class MeanLoss:
    """A mean of the samples at hand, which does not add up."""

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets)


class SumLoss:
    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="sum"), len(targets)

    def metrics(self, outputs, targets):
        return {"right": ((outputs.argmax(1) == targets).sum(), len(targets))}


class ContrastiveLoss(SumLoss):
    unsuited = "it compares the samples of a batch with each other."


def poisoned(value, index=5, num_samples=12):
    """Regression on noise, of which one target is not finite."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, 4, generator=generator, dtype=torch.float64)
    targets = inputs.sum(dim=1, keepdim=True)
    targets[index] = float(value)
    return (inputs, targets), None, 1


def linear(num_outputs):
    return nn.Linear(4, num_outputs)


def train(context):
    """A loop of the user's own: DDP and SyncBatchNorm over the default group, a step per mini-batch of noise."""
    torch.manual_seed(context.seed)
    model = convert_sync_batchnorm(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)))
    model = model.to(context.device).double()
    loaded = context.load()
    if loaded is not None:
        model.load_state_dict(loaded[0])
        assert loaded[1] == {"note": "hello", "step": context.resumed_from}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parallel = DistributedDataParallel(model)
    for step in range(context.resumed_from, context.num_steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(context.spec.batch.size, 4, generator=generator, dtype=torch.float64)
        own = context.plan.rank_slice(0, context.rank)
        loss = (parallel(inputs[own]) - inputs[own].sum(dim=1, keepdim=True)).square().sum() / len(inputs)
        optimizer.zero_grad()
        (loss * context.world_size).backward()
        optimizer.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        context.report(step + 1, {"train/loss": float(total)})
        if (step + 1) % context.spec.checkpoint.every_steps == 0 or step + 1 == context.num_steps:
            context.save(model.state_dict(), {"note": "hello", "step": step + 1})
        if context.should_stop():
            return


def never_reports(context):
    del context


def fails(context):
    raise ValueError(f"rank {context.rank} does not like this")


def images(num_samples, num_held_out=8):
    """Noise to classify, as images of 8 × 8 pixels."""
    generator = torch.Generator().manual_seed(0)

    def some(number):
        inputs = torch.randn(number, 1, 8, 8, generator=generator)
        return inputs, torch.randint(10, (number,), generator=generator)

    return some(num_samples), some(num_held_out), 10
