"""The programs a config runs, as abstract functions: what `parallel.compile` compiles for a machine that is absent."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from smallmath_jax.data.prompts import load_tokens
from smallmath_jax.models import weights
from smallmath_jax.models.config import ModelConfig
from smallmath_jax.models.qwen_vl import QwenVL, abstract_model
from smallmath_jax.parallel import rules
from smallmath_jax.parallel.compile import Program, abstract, gib_per_chip
from smallmath_jax.parallel.mesh import batch_shards
from smallmath_jax.parallel.published import PUBLISHED
from smallmath_jax.parallel.topologies import Topology
from smallmath_jax.tasks.policy import compute_dtype, tiny_model_config, trainable
from smallmath_jax.tasks.training import make_compute
from smallmath_jax.train import step as steps
from smallmath_jax.train.optim import make_optimizer
