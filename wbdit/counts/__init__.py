"""A denoiser that predicts a distribution over each gene's integer counts.

The diffusion runs over values ``v = (ln(1 + count) - center) / scale``. The denoiser sees noised values
``x = alpha v + sigma noise`` and predicts the logarithm of each gene's expected count. Bayes' rule then gives the
distribution of the count::

    p(count | x)  proportional to  prior(count | mean) exp(-(x - alpha v(count))^2 / (2 sigma^2))

The exponential is the likelihood of the gene's own noised value; it is exact and needs no learning. The network learns
the mean, from the other genes, the labels and the library size. The prior starts as a negative binomial, and its shape
is learned.

Samplers use the mean of ``v`` under this distribution as their estimate of x_0 (score interpolation, Dieleman et al.
2022). Sampling ends by drawing the counts from the distribution, at a timestep with more noise than sequencing adds:
the discrete decoder (L_0) of the variational bound (Ho et al. 2020, section 3.3).
"""
