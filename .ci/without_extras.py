"""Run by .ci/run in an environment with the core dependencies only: what must work there."""

import importlib.util
import subprocess
import sys

import jax.numpy as jnp

import optgrad

for extra in ("flax", "matplotlib", "pydantic", "typer", "rich", "pooch", "sklearn", "orbax"):
    assert importlib.util.find_spec(extra) is None, f"{extra} is installed: nothing is tested"

params = {"w": jnp.ones(3)}
gradient = {"w": jnp.array([1.0, -2.0, 0.5])}
for method in optgrad.methods("dissecting_adam"):
    optimizer = optgrad.create(method.name, **method.test_hyperparams)
    extras = {"gradient_variance": gradient} if "gradient_variance" in method.needs else {}
    optimizer.update(gradient, optimizer.init(params), params, **extras)

command = subprocess.run(
    [sys.executable, "-m", "optgrad", "list"], check=False, capture_output=True, text=True
)
assert command.returncode == 1, command
assert "optgrad[experiments]" in command.stderr, command.stderr
print(f"optgrad {optgrad.__version__} works without extras")
