"""L. Balles and P. Hennig, "Dissecting Adam", 2018: every figure and table.

Stochastic quadratics (figure 2), variance adaptation factors (figure 5), theorem 1, and the
networks on MNIST, CIFAR-10 and CIFAR-100 (figures 3, 6 and 7) by the paper's tuning protocol.
"""

from optgrad.experiments.reproduce import FigureMaker, Reproduction
from optgrad.experiments.reproduce import dissecting_factors as factors
from optgrad.experiments.reproduce import dissecting_figure2 as quadratics
from optgrad.experiments.reproduce import dissecting_networks as networks
from optgrad.experiments.reproduce import dissecting_rate as rate

REPRODUCTION = Reproduction(
    name="dissecting-adam",
    title="Dissecting Adam: figures and claims",
    reference=(
        'L. Balles and P. Hennig, "Dissecting Adam: The Sign, Magnitude and Variance of Stochastic '
        'Gradients", 2018'
    ),
    figures={
        "fig2": FigureMaker("SGD and SSD on stochastic quadratics", quadratics.figure2, 35),
        "fig3": FigureMaker("four methods on three networks", networks.figure3, 880),
        "fig5": FigureMaker("variance adaptation factors", factors.figure5, 1),
        "fig6": FigureMaker("Adam and its variants on CIFAR", networks.figure6, 370),
        "fig7": FigureMaker("both versions of M-SVAG on CIFAR", networks.figure7, 230),
        "theorem1": FigureMaker("SVAG's O(1/t)", rate.theorem1, 45),
    },
    scales={
        "cpu": (
            "**Scale `cpu`: what two CPU cores do within 45 minutes if nothing else runs. The "
            "networks of figures 3, 6 and 7 are smaller, or trained far "
            "shorter, than the paper's: every verdict is one at that scale. `--scale paper` is "
            "the paper's.**"
        ),
        "paper": (
            "Scale `paper`: the paper's networks, batches and number of replications; for an "
            "accelerator. On two CPU cores MNIST would take hours, CIFAR-10 weeks and CIFAR-100 "
            "more than a year."
        ),
    },
)
