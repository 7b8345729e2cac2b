"""J. Duda's survey slides, "Improving convergence of stochastic gradient descent".

What they say about second-order methods, tried: saddles, toys, public test problems, a regression
where curvature pays, and MNIST where it does not.
"""

from optgrad.experiments.reproduce import FigureMaker, Reproduction
from optgrad.experiments.reproduce import survey_mnist as images
from optgrad.experiments.reproduce import survey_profile as cutest
from optgrad.experiments.reproduce import survey_regression as small
from optgrad.experiments.reproduce import survey_saddle_network as deep
from optgrad.experiments.reproduce import survey_saddles as saddles

REPRODUCTION = Reproduction(
    name="survey-slides",
    title="Second-order methods: what the survey slides say",
    reference='J. Duda, "Improving convergence of stochastic gradient descent" (slides)',
    figures={
        "saddles": FigureMaker("escape from a saddle", saddles.escape, 40),
        "network": FigureMaker("networks that meet saddles", deep.saddles, 150),
        "toys": FigureMaker("the toy table", saddles.table, 150),
        "profile": FigureMaker("performance profile on CUTEst", cutest.profile, 250),
        "regression": FigureMaker("where curvature pays", small.regression, 100),
        "mnist": FigureMaker("MNIST with equal budgets", images.mnist, 250),
    },
)
