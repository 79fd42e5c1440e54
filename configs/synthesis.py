"""New training problems from seed problems, by a server, labelled by agreement (rStar-Math, section 3.5).

    python run.py --config=configs/synthesis.py --config.server.base_url=http://localhost:8000/v1 \
        --config.server.model=NAME --workdir=workdirs/synthesis

The key is read from the environment (OPENAI_API_KEY, or what server.api_key_variable names). The result is a problem
file: --config.problems="('workdirs/synthesis/problems.jsonl', …)" for configs/evolve.py.
"""

from ml_collections import ConfigDict

from configs import common, search


def server() -> ConfigDict:
    """Fields of tasks.server.ServerSettings, and the temperature."""
    return ConfigDict(
        {
            "base_url": "",  # with its version: http://localhost:8000/v1
            "model": "",  # its name there
            "endpoint": "chat",  # completions | chat
            "concurrent": 16,
            "requests_per_minute": 0,  # 0: no limit of ours
            "attempts": 10,  # at one request, after growing pauses: about four minutes
            "api_key_variable": "OPENAI_API_KEY",
            "temperature": 0.7,
        }
    )


def get_config(mode=None):
    mode = common.check_mode(mode, default="math7b")
    tiny = mode == "tiny"
    config = common.base("synthesis", mode)
    search.code_steps(config, mode)
    config.server = server()
    config.problems = ("tiny:train",) if tiny else ("convert:math_train", "convert:numina_amc_aime")
    config.limit = 4 if tiny else 0  # seeds a source; 0: all
    config.each = 1 if tiny else 2  # new problems a seed
    config.solutions = 10  # of each new problem
    config.agreeing = 3  # of them that must give the same answer
    config.problem_tokens = 32 if tiny else 512
    config.solution_tokens = 64 if tiny else 2048
    config.sandbox = search.sandbox()
    return config
