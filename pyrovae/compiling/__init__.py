"""Training steps and other functions of a pair as compiled graphs.

The only folder that touches torch's compiler internals.
"""
