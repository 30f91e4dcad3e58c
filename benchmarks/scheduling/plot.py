"""What happened on the simulated cluster, drawn."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # files, no window

import matplotlib.pyplot as plt

from benchmarks.scheduling.simulation import Outcome, Simulation

# Okabe & Ito 2008.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
_BINS = 400


def draw(simulation: Simulation, outcome: Outcome, path: Path) -> None:
    """Draw who held GPUs when, who waited, and how long decisions took."""
    days = [sample[0] / 86400.0 for sample in outcome.samples]
    step = max(1, len(days) // _BINS)
    samples, days = outcome.samples[::step], days[::step]
    figure, axes = plt.subplots(3, 1, figsize=(7.6, 8.0), layout="constrained")
    names = [queue.name for queue in simulation.queues]
    held = [[sample[1].get(name, 0) for sample in samples] for name in names]
    labels = [f"{queue.name} ({queue.weight:g})" for queue in simulation.queues]
    axes[0].stackplot(days, held, labels=labels, colors=_COLORS, linewidth=0)
    axes[0].plot(days, [sample[2] for sample in samples], color="#222222", linewidth=0.8, label="there")
    axes[0].set(title="GPUs held by queue (weight)", xlabel="days")
    axes[0].legend(loc="lower left", ncols=5, fontsize=8)
    axes[1].plot(days, [sample[3] for sample in samples], color=_COLORS[0])
    axes[1].set(title="jobs that wait", xlabel="days", ylim=(0, None))
    axes[2].scatter(outcome.sizes, [1e3 * time_s for time_s in outcome.decisions_s], s=2, color=_COLORS[0], alpha=0.3)
    axes[2].set(title="time of a decision, ms", xlabel="jobs that wait or run", ylim=(0, None))
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
