"""How far counts lie from a distribution."""

import numpy as np

SUSPICIOUS = 5.0  # deviations of a chi-square; chance gives so much once in a million


def deviations(counts, probabilities):
    """How many standard deviations a chi-square of counts lies above its mean; rare outcomes count together.

    Infinite where something was drawn that cannot be.
    """
    counts, expected = np.asarray(counts), np.asarray(probabilities) * np.sum(counts)
    if counts[expected == 0].sum():
        return np.inf
    rare = expected < 10
    pairs = [*zip(counts[~rare], expected[~rare], strict=True), (counts[rare].sum(), expected[rare].sum())]
    terms = [(found - wanted) ** 2 / wanted for found, wanted in pairs if wanted > 0]
    degrees = len(terms) - 1
    return (sum(terms) - degrees) / np.sqrt(2 * degrees) if degrees else 0.0
