"""What optimizers cost: time, memory and compilation of a step, and of runs in a sweep.

``trees`` has the parameters, ``programs`` a method's step on them, compiled and counted, ``timing``
the interleaved clock; ``step``, ``compilation`` and ``sweep`` are the commands of
``optgrad bench``, and ``output`` writes what they found.
"""
