"""What an anomaly detector must beat: isolation forest, moving z-score, reconstruction by principal components.

Each takes standardised training and test parts (t c) float64 and the window, and returns a score of every point.
"""

from __future__ import annotations

import numpy as np

CONTEXT = 10  # points before each that the forest sees with it


def isolation_forest(train: np.ndarray, test: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's forest of 100 trees on each point with the ten before it."""
    from sklearn.ensemble import IsolationForest

    forest = IsolationForest(random_state=0).fit(_with_past(train))
    return tuple(-forest.score_samples(_with_past(part)) for part in (train, test))


def moving_z_score(train: np.ndarray, test: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance from the mean of the window before, in its standard deviations; the largest over channels."""
    return tuple(_z_score(part, window) for part in (train, test))


def pca(train: np.ndarray, test: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared error of windows rebuilt from the components that hold 95 % of the training windows' variance."""
    from sklearn.decomposition import PCA

    step = max(1, len(train) // 4000)
    rows = np.stack([train[i : i + window].ravel() for i in range(0, len(train) - window + 1, step)])
    model = PCA(n_components=0.95, svd_solver="full").fit(rows)
    return tuple(_rebuilt(model, part, window) for part in (train, test))


BASELINES = {"isolation forest": isolation_forest, "moving z-score": moving_z_score, "PCA": pca}


def _with_past(part: np.ndarray) -> np.ndarray:
    padded = np.concatenate([np.repeat(part[:1], CONTEXT, 0), part])
    return np.concatenate([padded[i : i + len(part)] for i in range(CONTEXT + 1)], axis=1)


def _z_score(part: np.ndarray, window: int) -> np.ndarray:
    padded = np.concatenate([np.repeat(part[:1], window, 0), part])
    sums, squares = (np.concatenate([np.zeros((1, part.shape[1])), np.cumsum(v, 0)]) for v in (padded, padded**2))
    mean = (sums[window:-1] - sums[: -window - 1]) / window
    variance = (squares[window:-1] - squares[: -window - 1]) / window - mean**2
    return (np.abs(part - mean) / np.sqrt(variance.clip(1e-4))).max(1)


def _rebuilt(model, part: np.ndarray, window: int) -> np.ndarray:
    starts = list(range(0, len(part) - window + 1, window))
    starts += [len(part) - window] if starts[-1] + window < len(part) else []
    rows = np.stack([part[s : s + window].ravel() for s in starts])
    back = model.inverse_transform(model.transform(rows)).reshape(len(starts), window, -1)
    score = np.empty(len(part))
    for start, rebuilt in zip(starts, back):
        score[start : start + window] = np.square(part[start : start + window] - rebuilt).mean(1)
    return score
