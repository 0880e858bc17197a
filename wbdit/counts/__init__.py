"""Counts, not rounded values: a denoiser whose answer is a distribution over each gene's counts.

The diffusion runs over values ``v = (ln(1 + count) - center) / scale``. At a noised value ``x = alpha v + sigma noise``
the denoiser gives the logarithm of each gene's expected count, and Bayes' rule the rest::

    p(count | x)  proportional to  prior(count | mean) exp(-(x - alpha v(count))^2 / (2 sigma^2))

What a gene's own noised value says of its count is known exactly and need not be learned; what the other genes, the
labels and the library size say of it is the network's part. The prior is a negative binomial at the start, and learns
its shape. The mean of ``v`` under this distribution is the estimate of x_0 that a sampler goes by (score interpolation,
Dieleman et al. 2022), and sampling ends by drawing the counts from it, at a noise level that drowns the sequencing's:
the discrete decoder (L_0) of the variational bound (Ho et al. 2020, section 3.3).
"""
