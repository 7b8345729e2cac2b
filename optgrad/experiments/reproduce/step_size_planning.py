"""H. Yao, "Learning to Accelerate by the Methods of Step-size Planning", 2022.

The paper's figures on its convex problem and on Rosenbrock's function, with what it says about
them; and what it has not: other starts and learning rates, rotated quadratics, noise, a network.
"""

from optgrad.experiments.reproduce import FigureMaker, Reproduction
from optgrad.experiments.reproduce import planning_convex as convex
from optgrad.experiments.reproduce import planning_mnist as network
from optgrad.experiments.reproduce import planning_noise as stochastic
from optgrad.experiments.reproduce import planning_quadratics as beyond
from optgrad.experiments.reproduce import planning_repeated as repeated
from optgrad.experiments.reproduce import planning_rivals as others
from optgrad.experiments.reproduce import planning_rosenbrock as rosenbrock

REPRODUCTION = Reproduction(
    name="step-size-planning",
    title="Step-size planning: figures and claims",
    reference='H. Yao, "Learning to Accelerate by the Methods of Step-size Planning", 2022',
    figures={
        "fig3": FigureMaker("convex problem: errors and path", convex.convergence, 12),
        "fig4": FigureMaker("convex problem: step sizes", convex.step_sizes, 1),
        "fig5": FigureMaker("Rosenbrock: single planning", rosenbrock.single, 15),
        "fig6": FigureMaker("Rosenbrock: paths", rosenbrock.traces, 1),
        "fig7": FigureMaker("Rosenbrock: repeated planning", repeated.convergence, 8),
        "fig8": FigureMaker("Rosenbrock: its step sizes", repeated.step_sizes, 1),
        "fig9": FigureMaker("Rosenbrock: heavy ball, RMSprop, Adam", others.rivals, 10),
        "starts": FigureMaker("40 starts, 12 rates, verified or not", repeated.robustness, 12),
        "quadratics": FigureMaker("rotated quadratics, d = 5, 20, 100", beyond.quadratics, 60),
        "noise": FigureMaker("least squares with minibatch noise", stochastic.noise, 80),
        "mnist": FigureMaker("a network on MNIST", network.mnist, 80),
    },
)
