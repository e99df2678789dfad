"""Drawing from one conditional: noise levels, Langevin steps, the Metropolis test, noise by sample, kernels and their
twin.

May import from backbone and energies.
"""
