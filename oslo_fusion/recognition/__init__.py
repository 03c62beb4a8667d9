"""Recognition by structure, for every room: what an activation computes, and how a small module is wired.

Nothing here knows a model by name. A module's copy is run on random numbers; what its children received and returned says
how they are wired, and what an elementwise module returns says which formula it is.
"""
