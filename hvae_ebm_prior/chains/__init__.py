"""Drawing from one conditional: noise levels, Langevin steps, the Metropolis test, noise by sample, the fused kernel.

May import from backbone and energies.
"""
