"""The losses, one a file: its formula, its function and its module.

It imports nothing: ``dml_cuda`` lists the modules and ``dml_cuda.functional`` the functions. So ``reference``
and ``miners``, which the losses need, can import ``_formula`` and ``_pair`` from here.
"""
