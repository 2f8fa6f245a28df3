"""Small programs compiled here, as text, and the arguments that HLO text is written from."""

import jax
import jax.numpy as jnp
import numpy as np

from gspo.report.program import analyse


def compiled(fn, *shapes, **options):
    """Analysis of fn, compiled for float32 arguments of these shapes (an int stands for an int32 scalar)."""
    args = [
        jax.ShapeDtypeStruct((), np.int32) if isinstance(s, int) else jax.ShapeDtypeStruct(s, np.float32)
        for s in shapes
    ]
    return analyse(jax.jit(fn).lower(*args).compile().as_text(), **options)


def of(*arguments):
    """The origins of a collective of one array of each argument."""
    return tuple(frozenset({name}) for name in arguments)


def layers(x, w_LDD):
    return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w_LDD)[0]
