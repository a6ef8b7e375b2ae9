"""Official packages' optimizers, by their own argument names and with their quirks.

For reproducing published runs; `memjax.transforms` holds the methods as intended. Each docstring
names every quirk that it reproduces and every one that it leaves out.
"""

from memjax.compat.galore_torch import galore_adamw

__all__ = ['galore_adamw']
