"""One step as one graph: the only folder that touches torch's compiler internals."""
