"""What a self-evolution run writes for its report, with the numbers that rStar-Math published (arXiv 2501.04519)."""

from smallmath_jax.report.evolution import round_fields
from smallmath_jax.report.metrics import wilson


def share(percents, n=500):
    return {"accuracy": percents / 100, "n": n, "ci": list(wilson(percents / 100 * n, n))}


COVERAGE = {
    1: (96.61, 67.36, 20.99),
    2: (97.88, 67.40, 56.04),
    3: (98.15, 88.69, 62.16),
    4: (98.15, 94.53, 80.58),
}
PASS_AT_1 = (58.8, 69.6, 73.6, 75.8, 78.4)
SEARCH = (None, 75.2, 86.6, 87.0, 89.4)
SOLVED = (None, 60.17, 66.60, 77.86, 90.25)
SETS = {
    0: (58.8, 0.0, 22.5),
    1: (75.2, 10.0, 57.5),
    2: (86.6, 43.3, 75.0),
    3: (87.0, 46.7, 80.0),
    4: (89.4, 50.0, 87.5),
}


def evolution():
    rounds = []
    for number in range(5):
        found = {"round": number, "policy": "Qwen2.5-Math-7B"}
        found |= round_fields("accuracy", share(PASS_AT_1[number]))
        found |= round_fields("search_accuracy", share(SEARCH[number]) if number else None)
        found |= {"solved": SOLVED[number] / 100 if number else None, "coverage_by_level": None}
        found["search_tokens_by_set"] = {"MATH-500": 5453, "AIME 2024": 15693} if number else None
        found["search_by_set"] = {
            name: share(percents, n)
            for (name, n), percents in zip(
                (("MATH-500", 500), ("AIME 2024", 30), ("AMC 2023", 40)), SETS[number], strict=True
            )
        }
        if number:
            found["coverage_by_level"] = {
                name: percents / 100
                for name, percents in zip(
                    ("GSM", "MATH", "Olympiad"), COVERAGE[number], strict=True
                )
            }
            found |= {"rollouts": (8, 16, 16, 128)[number - 1], "pairs": 1234 * number}
        rounds.append(found)
    steps = [
        {"tag": "0.1", "text": "# Solve the equation with SymPy\nsolve(e)", "score": -0.517},
        {"tag": "0.2", "text": "# Look for a simpler way", "score": 0.620},
        {"tag": "0.2.1", "text": "# Search the integers", "score": 0.835},
    ]
    example = {
        "problem_id": "aime/1",
        "problem": "How many integers <n> are there?",
        "gold": "7",
        "answer": "7",
        "prefix": [],
        "left": steps[:1],
        "taken": steps[1:],
        "page": "../trees/aime-1.html#0.1",
    }
    scaling = {
        method: [
            {"trajectories": k, "tokens": 5453.0 * k} | share(start + gain * place)
            for place, k in enumerate((1, 4, 16, 64))
        ]
        for method, start, gain in (
            ("tree search + PPM", 84, 2),
            ("best of N + ORM", 79, 1.2),
            ("majority", 78, 1),
        )
    }
    return {
        "rounds": rounds,
        "scaling": scaling,
        "stopping": [
            {
                "units": "complete searches",
                "stop": "decided",
                "choice": "majority",
                "tokens": 300_000.0,
            }
            | {"tokens_saved": 0.31, "units_taken": 44.2, "full_accuracy": 0.894}
            | share(89.2)
        ],
        "backtracking": {
            "trees": 500,
            "count": 61,
            "by_round": {"3": {"trees": 250, "count": 20}, "4": {"trees": 250, "count": 41}},
            "examples": [example],
        },
        "theorems": {
            "theorem": {"n": 40, "mean_score": 0.61, "ci": [0.5, 0.7], "mean_q": 0.7},
            "other": {"n": 900, "mean_score": -0.05, "ci": [-0.1, 0.0], "mean_q": 0.1},
            "by_theorem": {"Vieta's formulas": {"n": 12, "mean_score": 0.7}},
            "examples": [steps[1] | {"theorem": "Vieta's formulas"}],
        },
        "reward_models": {
            "1.5B": {"pass@1": 0.512, "+ ORM": 0.73, "+ PPM": 0.878},
            "7B": {"pass@1": share(78.4), "+ ORM": share(82.6), "+ PPM": share(89.4)},
            "72B": {"pass@1": 0.826, "+ ORM": 0.858, "+ PPM": None},
        },
    }
