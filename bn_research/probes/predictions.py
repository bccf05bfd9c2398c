"""Scores of predicted class probabilities: errors, likelihood and calibration.

Predictions are logarithms of probabilities in float32 and are averaged in float64, so that a small
probability is neither lost nor infinitely surprising.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

TOPS = (1, 2, 5)  # the classes among which the label must be
BINS = 15  # of confidence, as Guo et al. (2017) take


def average(predictions: Sequence[np.ndarray]) -> Float[np.ndarray, "examples classes"]:
    """Arithmetic mean of class probabilities, as in section 4.2.3 of Ioffe & Szegedy (2015)."""
    total = np.zeros(predictions[0].shape, np.float64)
    for logarithms in predictions:
        total += np.exp(np.asarray(logarithms, np.float64))
    return total / len(predictions)


def top_error(
    probabilities: Float[np.ndarray, "examples classes"], label: Int[np.ndarray, "examples"], k: int
) -> float:
    """Share of examples whose label is not among the k most probable classes; ties count as not."""
    of_label = probabilities[np.arange(len(label)), label]
    others_as_high = np.sum(probabilities >= of_label[:, None], axis=1) - 1
    return float(np.mean(others_as_high >= k))


def reliability(
    probabilities: Float[np.ndarray, "examples classes"], label: Int[np.ndarray, "examples"]
) -> dict[str, list[float]]:
    """Number of examples, mean confidence and accuracy in bins of equal width.

    The confidence is the largest probability; bin b of B holds those in ((b − 1)/B, b/B]. A bin
    without examples has confidence and accuracy 0.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == label
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(place, minlength=BINS)
    held = np.maximum(count, 1)
    return {
        "count": count.tolist(),
        "confidence": (np.bincount(place, confidence, BINS) / held).tolist(),
        "accuracy": (np.bincount(place, correct, BINS) / held).tolist(),
    }


def calibration_error(bins: dict[str, list[float]]) -> float:
    """Expected calibration error, Σ_b (n_b/n)·|accuracy_b − confidence_b| (Guo et al., 2017)."""
    count, confidence, accuracy = (np.asarray(bins[k]) for k in ("count", "confidence", "accuracy"))
    return float(np.sum(count * np.abs(accuracy - confidence)) / np.sum(count))


def pooled(
    bins: Sequence[Mapping[str, Sequence[float]]], *, at_least: int = 1
) -> tuple[Float[np.ndarray, "bins"], Float[np.ndarray, "bins"]]:
    """Confidence and accuracy of the bins of several networks together, as of one `reliability`.

    Args:
      bins: what `reliability` gives of each network.
      at_least: bins that hold fewer examples of all networks together are left out.
    """
    count = np.array([b["count"] for b in bins], np.float64)
    total = count.sum(axis=0)
    kept = total >= max(1, at_least)
    confidence, accuracy = (
        (count * [b[field] for b in bins]).sum(axis=0)[kept] / total[kept]
        for field in ("confidence", "accuracy")
    )
    return confidence, accuracy


def scores(
    probabilities: Float[np.ndarray, "examples classes"], label: Int[np.ndarray, "examples"]
) -> dict[str, Any]:
    """All scores: `error`, `error 2`, `error 5`, `nll`, `brier`, `ece`, `confidence`, `bins`.

    nll is the mean of −log p of the label, in nats; brier the mean of Σ_c (p_c − 1[c is the
    label])²; confidence the mean of the largest probability.
    """
    of_label = probabilities[np.arange(len(label)), label]
    bins = reliability(probabilities, label)
    return {
        **{"error" if k == 1 else f"error {k}": top_error(probabilities, label, k) for k in TOPS},
        "nll": float(-np.mean(np.log(of_label))),
        "brier": float(np.mean(np.sum(probabilities**2, axis=1) - 2 * of_label + 1)),
        "ece": calibration_error(bins),
        "confidence": float(np.mean(probabilities.max(axis=1))),
        "bins": bins,
    }


def by_size(
    predictions: Sequence[np.ndarray], label: Int[np.ndarray, "examples"]
) -> dict[str, list[float]]:
    """Error and nll of ensembles of 1, 2, … of the networks, means over all choices of so many."""
    found: dict[str, list[float]] = {"error": [], "nll": []}
    for size in range(1, len(predictions) + 1):
        errors, losses = [], []
        for chosen in itertools.combinations(predictions, size):
            probabilities = average(chosen)
            errors.append(top_error(probabilities, label, 1))
            losses.append(-np.mean(np.log(probabilities[np.arange(len(label)), label])))
        found["error"].append(float(np.mean(errors)))
        found["nll"].append(float(np.mean(losses)))
    return found


def disagreement(predictions: Sequence[np.ndarray]) -> float:
    """Share of examples that two networks class differently, mean over all pairs."""
    classes = [p.argmax(axis=1) for p in predictions]
    return float(np.mean([np.mean(a != b) for a, b in itertools.combinations(classes, 2)]))
