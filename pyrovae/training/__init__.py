"""Stochastic variational inference: one step, the loop over epochs, and several processes."""
