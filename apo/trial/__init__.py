"""The one place that knows what a trial must not disturb.

A trial writes θ′ into the weights, runs the model forward and backward there, and takes the weights back. Afterwards
everything that isn't the optimizer's is as if no trial had been made: the weights to the bit; ``.grad`` of every
parameter, whoever optimizes it; buffers; train and eval flags; what modules keep in attributes; random states; what
torch keeps that depends on the weights (autocast's casts, parametrizations).
"""

from apo.trial.autocast import CallersAutocast, forget_casts, without_autocast
from apo.trial.closures import WrittenMeanwhile, leaves_of_backwards
from apo.trial.contents import UNCHANGING
from apo.trial.copies import copies_of, write
from apo.trial.lookahead import Lookahead
from apo.trial.plain_objects import attributes_of, is_plain_object, put_attributes_back
from apo.trial.random_state import (
    generator_state,
    is_generator,
    random_state,
    restore_generator,
    restore_random_state,
)
from apo.trial.restoring import surely
from apo.trial.undisturbed import Undisturbed
from apo.trial.walk import modules_of, parameters_of

__all__ = [
    "UNCHANGING",
    "CallersAutocast",
    "Lookahead",
    "Undisturbed",
    "WrittenMeanwhile",
    "attributes_of",
    "copies_of",
    "forget_casts",
    "generator_state",
    "is_generator",
    "is_plain_object",
    "leaves_of_backwards",
    "modules_of",
    "parameters_of",
    "put_attributes_back",
    "random_state",
    "restore_generator",
    "restore_random_state",
    "surely",
    "without_autocast",
    "write",
]
