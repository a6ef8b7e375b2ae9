"""Loss to gradient without backpropagation: estimates from a few forward passes.

An estimator is an optax transform that ignores the gradient it is given and hands on an estimate
of it, made by `update(_, state, params, value_fn=...)` from values of the function on perturbed
parameters. Everything behind it in a chain treats that like a gradient.
"""
