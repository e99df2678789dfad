"""What is learned: energy networks f_i, one per layer, and the labels that are bound to them.

May import from backbone.
"""
