"""Eight CPU devices for every test, so that meshes are real; shapes match without promotion."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # Of the processes that tests start, too.
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # Compiling for a TPU asks no metadata server,
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # in as many test processes as there are.
# Tests compile much and compute little: more than half of the time goes with code that runs fast.
os.environ['XLA_FLAGS'] = (
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true '
  + os.environ.get('XLA_FLAGS', '')
)

import jax

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

if jax.__version_info__ < (0, 11):  # Later versions know no such flag, nor do compilers for TPUs.
  others = os.environ['XLA_FLAGS']
  os.environ['XLA_FLAGS'] = '--xla_cpu_use_fusion_emitters=false ' + others
  jax.devices()  # Reads the flags.
  os.environ['XLA_FLAGS'] = others
