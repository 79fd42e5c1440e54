"""Stages of a round over the scripted engine of driver_case: no model, no prompts, programs run in this process."""

from types import SimpleNamespace

import driver_case as case
from etils import epath

from configs import evolve
from smallmath_jax.records import Sampling
from smallmath_jax.tasks import evolve_stages, search
from smallmath_jax.tasks.driver import Driver

GO_ON = SimpleNamespace(requested=False, exit_code=0)


def without_prompts(given=lambda module, name, value: setattr(module, name, value)):
    """Replaces what needs a tokenizer and pictures; `given` sets an attribute (monkeypatch.setattr)."""
    prompts = lambda problems, policy, config: (problems, [case.prompt(p.id) for p in problems], {})
    given(search, "prompts_for", prompts)
    given(search, "with_pixels", lambda prompt, problem, policy: prompt)


def config_of(**fields):
    """A tiny config of two rounds for the scripted engine."""
    config = evolve.get_config("tiny")
    config.evolve.update({"rounds": 2, "rollouts": (2, 2), "candidates": (3, 3), "instances": 0})
    config.evolve.update({"guidance": ("terminal", "terminal"), "max_errors": (1, 1)})
    config.evolve.update({"control": False, "more": (4,), "more_from": 2, "more_problems": 0})
    config.evolve.update(fields)
    config.in_flight = 4
    return config


class Bench(evolve_stages.Bench):
    """A Bench whose drivers are scripted; `engine` is a driver_case.ScriptedEngine."""

    def driver(self, policy, judge, version):
        return Driver(
            case.Policy(),
            self.engine,
            self.host,
            grammar="code_steps",
            sampling=Sampling(),
            max_tokens=16,
        )


def make_bench(folder, config=None, stop=GO_ON, engine=None, host=case.HOST):
    engine = engine or case.ScriptedEngine()
    return Bench(config or config_of(), epath.Path(folder), None, host, stop, [], engine)
