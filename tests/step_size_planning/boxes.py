"""Algorithms 1 and 2 of Yao's paper in float64 NumPy, as loops over iterations, and test problems.

Written from the paper and the reading of it that reproduces its numbers (design/methods,
section 1.1): a stored pair is the weight after a step and the gradient before it, every gradient
is fresh, only steps of the outer loop are stored, and α(i) = 0 where the squared gradients are 0.
"""

import numpy as np


def rosenbrock(w):
    u, v = w
    return (1 - u) ** 2 + 100 * (v - u**2) ** 2


def rosenbrock_gradient(w):
    u, v = w
    return np.stack([-2 * (1 - u) - 400 * u * (v - u**2), 200 * (v - u**2)])


def convex_gradient(w):
    return np.array([1000.0, 1.0]) * w


def step_sizes(older, newer):
    """α of two buffers of pairs (w, g)."""
    first = np.zeros_like(older[0][0])
    second = np.zeros_like(first)
    for (w, g), (later, _) in zip(older, newer, strict=True):
        first = first + g * (w - later)
        second = second + g * g
    return np.where(second == 0, 0.0, first / np.where(second == 0, 1.0, second))


def planning(gradient, w, rate, window, projections, corrections, evaluations, *, reuse=False):
    """The point after every gradient evaluation, and the step sizes of every plan."""
    points, plans, buffers = [], [], [[], []]

    def move(step):
        nonlocal w
        w = w + step
        points.append(w)

    while len(points) < evaluations:
        g = gradient(w)
        move(-(rate * g))
        buffers[1 if len(buffers[0]) == window else 0].append((w, g))
        if len(buffers[1]) < window:
            continue
        plans.append(step_sizes(*buffers))
        buffers = [buffers[1], []]
        if reuse:
            w = w - plans[-1] * g
            points[-1] = w
            continue
        for _ in range(projections):
            move(-(plans[-1] * gradient(w)))
            for _ in range(corrections):
                move(-(rate * gradient(w)))
    return np.array(points[:evaluations]), plans


def matched_planning(gradient, w, rate, window, evaluations):
    """Algorithm 1 with pairs (w, g(w)): the pair that completes the window is projected along."""
    points, plans, buffers = [], [], [[], []]
    fresh = True  # the first step after a projection is not stored
    while len(points) < evaluations:
        g = gradient(w)
        if not fresh:
            buffers[1 if len(buffers[0]) == window else 0].append((w, g))
        fresh = len(buffers[1]) == window
        if fresh:
            plans.append(step_sizes(*buffers))
            buffers = [buffers[1], []]
        w = w - (plans[-1] if fresh else rate) * g
        points.append(w)
    return np.array(points), plans
