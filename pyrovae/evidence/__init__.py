"""log p(x): importance sampling, annealing, and bounds from both sides, each with its error."""

# Random streams of one evaluation beside that of the draws themselves, told apart by the last
# number of their path. The numbers are part of what a seed means: the same seed gives other
# results where one of them changes.
PRIOR_STREAM, PROBE_STREAM, FIT_STREAM, GUIDE_STREAM = 1, 2, 3, 4
PILOT_STREAM, BACKWARD_STREAM, SIMULATION_STREAM = 5, 6, 7
