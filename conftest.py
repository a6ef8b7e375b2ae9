"""Eight CPU devices for every test, so that meshes are real; shapes must match without rank
promotion.
"""

import jax

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
