"""A prior as files: in a folder and on the Hub, checked when read, and written whole or not at all.

May import from backbone, energies, chains and density.
"""
