"""What holds for every test: compiled programs of this process are not kept on disk.

Tests start runs in this process, and those keep their programs between starts; a program compiled for a TPU that is not
there can be written to such a cache and not be read again.
"""

import jax

jax.config.update("jax_enable_compilation_cache", False)
