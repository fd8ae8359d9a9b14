"""A picture of a profile: service times of core stages against their laws, and of light stages against their Gamma fits.

Needs matplotlib, which is not a dependency of this folder: whoever has it gets the picture.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from models import fit
from models.manifest import Manifest, Precision, StageProfile, StageSpec

COLUMNS = 3
_PANEL_INCHES = (4.2, 3.2)
_MARKERS = {"float32": "o", "float16": "s", "int8": "^"}


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(manifest: Manifest, path: Path) -> None:
    """Write the profile of every stage that has one as PNG or SVG, by the file's suffix: a panel for each stage.

    Raises:
        ValueError: no stage has a profile, or matplotlib does not write such files.
    """
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    stages = [stage for stage in manifest.stages if stage.profile]
    if not stages:
        raise ValueError(f"model {manifest.model!r} has no profile to draw")
    rows, columns = -(-len(stages) // COLUMNS), min(COLUMNS, len(stages))
    size = (columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1])
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel, stage in zip(axes.flat, stages, strict=False):
        if stage.tier == "core":
            _law(panel, stage)
        else:
            _distribution(panel, stage)
        panel.set_title(f"{stage.name} ({stage.tier})")
        panel.legend(fontsize="small")
    for panel in axes.flat[len(stages) :]:
        panel.axis("off")
    figure.suptitle(f"{manifest.model}, {stages[0].profile[next(iter(stages[0].profile))].cpu}")
    # Without the time of day, so that the same profile gives the same file.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _law(panel: Any, stage: StageSpec) -> None:
    """Mean times with their 95 % quantiles over the size of a batch, and the law as a line."""
    for precision, found in _each(stage):
        sizes = [stage.units(stage.inputs[0].sized(point.batch, point.length)) for point in found.points]
        means = np.array([point.mean_s for point in found.points]) * 1e3
        above = np.array([point.p95_s for point in found.points]) * 1e3 - means
        line = np.linspace(min(sizes), max(sizes), 50)
        label = f"{precision}, {found.threads} thread{'s' if found.threads > 1 else ''}, cv² {found.cv2:.2g}"
        drawn = panel.errorbar(
            sizes, means, [np.zeros_like(above), np.maximum(above, 0)], fmt=_MARKERS[precision], ms=4, lw=1, label=label
        )
        panel.plot(line, [found.law.mean_s(size) * 1e3 for size in line], lw=1, color=drawn[0].get_color())
    first = [axis for axis in stage.inputs[0].shape if isinstance(axis, str)]
    panel.set_xlabel(" × ".join(first))
    panel.set_ylabel("service time [ms]")
    panel.set_ylim(bottom=0)


def _distribution(panel: Any, stage: StageSpec) -> None:
    """The share of tasks done within a time: as measured at every twentieth, and of the fit as a line."""
    shares = np.linspace(0.01, 0.99, 99)
    for _, found in _each(stage):
        if found.gamma is None:
            continue
        verdict = "rejected" if found.gamma.rejected else "not rejected"
        panel.plot(np.array(found.gamma.quantiles_s) * 1e3, fit.QUANTILES, "o", ms=3, label=f"{found.gamma.samples} tasks")
        label = f"Gamma, shape {found.gamma.shape:.2g} ({verdict} at 1 %)"
        panel.plot(fit.quantile_s(found.gamma, list(shares)) * 1e3, shares, lw=1, label=label)
    panel.set_xlabel("service time [ms]")
    panel.set_ylabel("share of tasks")


def _each(stage: StageSpec) -> list[tuple[Precision, StageProfile]]:
    return [(precision, one) for precision, found in stage.profile.items() for one in (found, *found.other_threads)]
