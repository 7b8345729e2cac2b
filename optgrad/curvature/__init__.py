"""The second-order methods of the survey slides, J. Duda, "Improving convergence of SGD"."""

__all__: list[str] = []
