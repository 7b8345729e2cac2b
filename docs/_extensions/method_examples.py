"""An example of each method, written from its record and executed when the site is built."""

import concurrent.futures
import contextlib
import io
import multiprocessing
from collections.abc import Sequence

import optgrad
from optgrad import registry

_PROBLEM = """\
import jax
import jax.numpy as jnp
import optgrad

x = jax.random.normal(jax.random.key(0), (20, 3))
batch = {"x": x, "y": x @ jnp.array([[1.0], [-2.0], [0.5]])}

"""
_LOSS = """
def loss(params, batch):
    return 0.5 * jnp.mean((batch["x"] @ params["kernel"] - batch["y"]) ** 2)

"""
_OUTPUTS = """
def outputs(params, batch):
    return batch["x"] @ params["kernel"]


def out_loss(z, batch):
    return 0.5 * jnp.mean((z - batch["y"]) ** 2)

"""
_RESIDUAL = """
def residual(params, batch):
    return (batch["x"] @ params["kernel"] - batch["y"]) / len(batch["x"]) ** 0.5

"""
_LAYERS = """
def layers(params, batch):
    errors = batch["x"] @ params["layer"]["kernel"] - batch["y"]
    return {"layer": optgrad.LayerStatistics(batch["x"], errors)}

"""
_RUN = """
step = optgrad.make_step({arguments})
params = {params}
state = step.init(params)
losses = []
for _ in range({steps}):
    params, state, info = step(params, state, batch)
    losses.append(float(info.value))
print(f"loss: {{losses[0]:.2g}} at first, {{losses[-1]:.2g}} at step {steps}")
"""
_STEPS = 100


def source(method: registry.Method) -> str:
    """A least-squares problem of three parameters, and what the method needs on it.

    Examples:
      >>> import optgrad
      >>> "residual=residual" in source(optgrad.get_method("gauss_newton"))
      True
    """
    needs = method.extras(has_layers=True)
    functions, arguments = _LOSS, ["loss"]
    params = '{"kernel": jnp.zeros((3, 1))}'
    if needs & {"outputs_fn", "out_loss_fn", "curvature_diagonal"}:
        functions, arguments = _OUTPUTS, ["outputs=outputs", "out_loss=out_loss"]
    if "residual_fn" in needs:
        functions, arguments = _RESIDUAL, ["residual=residual"]
    if "kfac_stats" in needs:
        functions = _LOSS.replace('params["kernel"]', 'params["layer"]["kernel"]') + _LAYERS
        arguments = ["loss", "kfac=layers"]
        params = '{"layer": {"kernel": jnp.zeros((3, 1))}}'
    settings = [f"{name}={value!r}" for name, value in _hyperparams(method).items()]
    called = ", ".join([f'"{method.name}"', *arguments, *settings])
    return _PROBLEM + functions + _RUN.format(arguments=called, params=params, steps=_STEPS)


def _hyperparams(method: registry.Method) -> dict[str, object]:
    simple = (bool, int, float, str, tuple)
    return {k: v for k, v in method.test_hyperparams.items() if isinstance(v, simple)}


def printed(code: str) -> str:
    """What the code prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "<example>", "exec"), {"__name__": "example"})
    return out.getvalue()


def all_printed(sources: Sequence[str], processes: int = 2) -> list[str]:
    """What each of the sources prints, in processes of their own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(printed, sources, chunksize=4))


if __name__ == "__main__":  # all of them, to look at
    chosen = [source(method) for method in optgrad.methods()]
    for method, text in zip(optgrad.methods(), all_printed(chosen), strict=True):
        print(f"{method.name}: {text}", end="")
