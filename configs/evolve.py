"""Self-evolution in four rounds (rStar-Math, section 3.4): search, select, fine-tune, train a reward model, measure.

    python run.py --config=configs/evolve.py:tiny                             # two CPU cores, nothing to download
    python run.py --config=configs/evolve.py:math7b --workdir=gs://BUCKET/evolve

Round 1 may be searched by a local model or a server: docs/bootstrap.md.
Every stage is skipped when its done.json is there: the same command continues a run. In `:tiny` the first policy is
fine-tuned on noisy solutions of problems that the rounds never see; the rounds themselves see no worked solution.
Published, not reproduced here: MATH 58.8 -> 90.0 (Qwen2.5-Math-7B, 64 trajectories), pass@1 78.4 after round 4.
"""

from ml_collections import ConfigDict

from configs import common, ppm, search
from smallmath_jax.data.few_shot import EXAMPLES
from smallmath_jax.search.settings import (
    EXTRA_ROLLOUTS,
    PRESETS,
    TEST_SEARCHES,
    TEST_TOP_K,
    preset,
)

ROUNDS = ("round1", "round2", "round3", "round4")
BENCHMARKS = (
    *("math500", "math", "aime2024", "amc23", "olympiadbench", "college_math", "gsm8k"),
    "gaokao2023en",
)


def bootstrap(mode: str) -> ConfigDict:
    """Who searches in round 1: a server (`base_url`), a local `model`, or else config.model.

    The first two are asked by few-shot prompts, in text, and their steps are encoded for config.model to learn.
    """
    tiny = mode == "tiny"
    settings = ConfigDict()
    settings.solutions = 2000 if tiny else 0  # noisy ones that config.model is fine-tuned on first
    # An OpenAI-compatible server, with its version: http://localhost:8000/v1
    settings.base_url = ""
    # Its name at the server; without base_url a folder or hub name, run here
    settings.model = ""
    settings.shots = len(EXAMPLES)  # worked examples in the prompt
    settings.max_tokens = 48 if tiny else 2048  # of one step, as that model counts
    settings.endpoint = "completions"  # completions | chat
    settings.concurrent = 16  # requests at a time
    settings.requests_per_minute = 0  # 0: no limit of ours
    settings.attempts = 10  # at one request, after growing pauses: about four minutes
    settings.api_key_variable = "OPENAI_API_KEY"  # the environment variable that holds the key
    settings.temperature = 0.7
    settings.noise = 0.5  # share of them with a wrong number or operator
    settings.problems_seed = 101  # of the embedded problems it learns from
    settings.update(_sft(mode))
    settings.steps = 700 if tiny else 0
    return settings


def _sft(mode: str) -> ConfigDict:
    """An optimiser, packing and length; design section 4, SFT column of seed 003."""
    tiny = mode == "tiny"
    settings = ConfigDict()
    settings.steps = 0  # 0: from epochs
    settings.epochs = 3 if tiny else 2
    settings.worked_steps = 0
    settings.rows = 12 if tiny else 128  # packed rows a step
    settings.row_length = 128 if tiny else 4096
    settings.row_patches = 32 if tiny else 4096
    settings.microbatch_rows = 12 if tiny else 16
    phi = mode == "phi3"
    settings.optimizer = common.optimizer(
        3e-3 if tiny else 5e-6 if phi else 7e-6,
        name="muon" if tiny else "adamw",
        schedule="cosine" if tiny or phi else "linear",
        warmup_steps=20 if tiny else 0,
        weight_decay=0.0 if tiny else 0.1,
        b2=0.99 if tiny else 0.999,
        final_fraction=0.05 if tiny else 0.0,
    )
    return settings


def get_config(mode=None):
    mode = common.check_mode(mode, default="math7b")
    tiny = mode == "tiny"
    config = common.base("evolve", mode)
    search.code_steps(config, mode)
    public = ("convert:numina_competition", "convert:metamath", "convert:math_train")
    config.problems = ("tiny:train",) if tiny else public
    config.data.decontaminate = () if tiny else BENCHMARKS
    config.limit = 0  # problems a source; 0: all (embedded ones: as many as the rounds take)
    config.bootstrap = bootstrap(mode)

    config.evolve = evolve = ConfigDict()
    evolve.rounds = len(ROUNDS)
    evolve.rollouts = tuple(PRESETS[name].rollouts for name in ROUNDS)
    evolve.candidates = (5, 6, 6, 6) if tiny else tuple(PRESETS[name].candidates for name in ROUNDS)
    evolve.guidance = tuple(PRESETS[name].guidance for name in ROUNDS)
    evolve.max_errors = (1,) * 4 if tiny else tuple(PRESETS[name].max_errors for name in ROUNDS)
    # Search what a round left unsolved a second time, with another seed and as many rollouts
    evolve.second_pass = not tiny
    evolve.more = EXTRA_ROLLOUTS  # rollouts that unsolved problems go on to
    evolve.more_from = 4  # the first round that does
    # Trees an unsolved problem gets then: the first goes on, the others are new
    evolve.more_seeds = 1 if tiny else 2
    evolve.more_problems = 60 if tiny else 0  # at most as many of them; 0: all
    # Also search what is unsolved once more, with a new seed and no more rollouts
    evolve.control = tiny
    # Problems a round: unsolved ones, the rest new; 0: all of them, every round
    evolve.per_round = 400 if tiny else 0
    # At most, of a round's problems, those that earlier rounds left unsolved
    evolve.old_share = 0.25
    # Of an embedded problem, that a right program must also be right on
    evolve.instances = 2 if tiny else 0
    evolve.trajectories = 2  # best by mean Q, a problem
    # The ablation of SFT data (section 9.1): step_verified of trees ("mcts"); rejection | random of plain samples
    # ("chains": whole trajectories of the same policy, nothing filtered, as many as a search has rollouts)
    evolve.selection = "step_verified"
    evolve.sampler = "mcts"  # mcts | chains
    # The interpreter's output is not trained on; the public code trains on it
    evolve.mask_output = True
    # A round's policy is fine-tuned from the previous round's, or from the first one ("base", as published)
    evolve.start = "previous" if tiny else "base"
    # Rounds whose pairs a preference model learns from, the last ones; 0: all
    evolve.pair_rounds = 0

    # Reward models (orm, pqm) trained beside a round's own on the same trees, from a round on, only to score the same
    # held-out trajectories (table 8). Nothing else uses one, and each costs what the round's own costs: none by
    # default. In :tiny after the last round alone. Each reads as many tokens as the round's own did.
    evolve.also_train = ("orm",) if tiny else ()
    evolve.also_from = evolve.rounds if tiny else 1

    config.search = search.settings_of(preset("round2"))
    if tiny:
        config.search.max_depth = 12
    config.in_flight = 0
    config.sft = _sft(mode)
    if tiny:
        # On 79 trajectories 2 passes raised sampled pass@1 from 27 to 32 %; 16 at 1.5e-3 lost greedy accuracy, 45 to 27
        config.sft.optimizer.update(
            {"learning_rate": 5e-4, "muon_learning_rate": 0.0033, "warmup_steps": 5}
        )
    config.pairs = ppm.pair_settings(mode)
    config.ppm = ppm.ppm_settings(mode)
    if tiny:
        # A few hundred small trees: every pair counts, and more passes only learn them by heart
        config.pairs.update({"min_margin": 0.0, "per_side": 6})
        config.ppm.pairs = 256
        config.ppm.epochs = 5
        config.ppm.optimizer.learning_rate = 1e-3

    config.eval = common.evaluation(mode)
    config.eval.problems = ("tiny:test",) if tiny else BENCHMARKS
    config.eval.limit = 520 if tiny else 0
    config.eval.samples = 8
    config.eval.final_samples = 16 if tiny else 64  # after the last round, for the scaling curve
    config.eval.search_problems = 100 if tiny else 0  # problems searched after a round; 0: all
    config.eval.final_search_problems = 300 if tiny else 0
    config.eval.sampling.max_tokens = 80 if tiny else 2048
    # Complete searches a problem after the last round, and how many of their answers vote, by PPM score
    config.eval.final_searches = 1 if tiny else TEST_SEARCHES
    config.eval.top_k = TEST_TOP_K
    config.eval.search = search.settings_of(preset("test"))
    if tiny:
        config.eval.search.update({"rollouts": 8, "candidates": 8, "max_depth": 12})
        # Scores of a small PPM lie near 0: less exploration, and the policy's own probability beside it
        config.eval.search.update({"exploration": 0.5, "prior": 2.0})
    config.sandbox = search.sandbox()
    if tiny:
        config.sandbox.modules = ()
    config.export = True
    return config
