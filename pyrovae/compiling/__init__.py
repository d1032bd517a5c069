"""Functions of a pair as compiled graphs; no other folder touches torch's compiler internals."""
