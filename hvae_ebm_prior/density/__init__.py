"""The density that backbone, noise levels and energies make, how it is drawn from, and how several are composed.

May import from backbone, energies and chains.
"""
