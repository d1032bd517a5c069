"""log p(x): importance sampling, annealing, and bounds from both sides, each with its error."""
