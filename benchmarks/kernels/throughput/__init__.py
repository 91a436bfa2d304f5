"""Throughput of the operator, its derivatives and the whole step on the layers of named models.

Against the plain chain of torch ops (eager, compiled, by autograd) and KFAC's inverses and eigenbases.
"""
