"""From what was predicted to what is to be expected, given what was measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def calibrated(predicted: np.ndarray, measured: Mapping[float, float]) -> np.ndarray:
    """Predictions, any shape, corrected by measurements of others.

    Between two that were measured it is interpolated, so that a fixed time and a factor that the
    predictions do not know are taken in; beyond them, the factor of the last one counts.

    Args:
        predicted: costs above 0.
        measured: for predictions, what was measured. Where there is none, nothing is corrected.
    """
    if not measured:
        return predicted
    known = sorted(measured)
    values = [measured[each] for each in known]
    low, high = values[0] / known[0], values[-1] / known[-1]
    found = np.interp(predicted, known, values)
    found = np.where(predicted < known[0], predicted * low, found)
    return np.where(predicted > known[-1], predicted * high, found)
