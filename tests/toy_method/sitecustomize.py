"""Puts the toy method of tests/interface_toys.py among the methods, in each process of a simulation.

Python runs this file at its start when the folder is on PYTHONPATH, beside that of the tests.
"""

import heterosync.methods
from interface_toys import Everything

heterosync.methods.METHODS = (*heterosync.methods.METHODS, Everything)
