"""A prior as files: in a folder and on the Hub, checked when read, and written whole or not at all; and which
optional packages are there to do so.

May import from backbone, energies, chains and density.
"""
