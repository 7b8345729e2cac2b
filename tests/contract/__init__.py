"""The contract: what every registered method does, whatever family it is of.

A method is run through every property by being registered. `problem` builds the extra arguments
that its record says it needs, `upstream` lists the baselines' own failures.
"""
