"""The twelve words that a report needs; docs/glossary.md has the same sentences."""

GLOSSARY = {
    "nat": "The unit of log-probabilities to base e; 1 nat is 1.443 bits. All numbers are nats per "
    "datum, sums over its dimensions.",
    "log p(x)": "The log-probability, or log-density, that the model gives to a datum, its latents "
    "integrated out. Higher is better; densities of other units cannot be compared.",
    "ELBO": "The evidence lower bound, E_q[ln p(x, z) − ln q(z|x)]: what is trained. It is "
    "log p(x) less KL(q(z|x) ‖ p(z|x)), and so never above it.",
    "rate": "KL(q(z|x) ‖ p(z)): how many nats the guide's code of a datum takes beyond the prior.",
    "distortion": "−E_q[ln p(x|z)]: how many nats the datum still takes where its code is known. "
    "The ELBO is −rate − distortion.",
    "K": "The number of draws from the guide by which log p(x) is estimated for each datum. The "
    "estimate is a lower bound on average, and rises with K.",
    "ESS": "The effective sample size: how many equal weights would be as precise as the K "
    "importance weights of a datum. Of order 1, a single draw carries the sum.",
    "k-hat": "The Pareto shape of the largest importance weights. Above 0.7 the estimate of log "
    "p(x) is too low by more than its error says.",
    "± Monte Carlo, ± over data": "Two kinds of standard error: of the draws, were the data "
    "the same, and of the data, were others of the same kind taken.",
    "amortization gap": "What the ELBO gains where the guide's posterior is refined for each "
    "datum: what one network for all data costs. It is negative where the guide is richer than the "
    "normal of independent coordinates that is fitted.",
    "active unit": "A latent dimension whose posterior mean varies over the data, by a variance of "
    "more than 0.01. If there is none, the posterior has collapsed to the prior.",
    "aggregate posterior": "The mean of q(z|x) over the data. Where it differs from the prior, "
    "samples of the model are of another kind than its reconstructions.",
}
