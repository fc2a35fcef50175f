"""The conductor: it supervises one job, on the first node of the allocation or on this machine.

The modules of this folder import the standard library and each other, and run on Python 3.6: the Python of a login
node, outside of containers and environments. A job gets a copy of the folder when it is submitted.
"""
