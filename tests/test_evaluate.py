"""Evaluations: resumed where they stopped, never mixed with another policy's; what they count and what they refuse."""

import io
from types import SimpleNamespace

import engine_case
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import common
from configs import evaluate as evaluate_config
from smallmath_jax.data.images import ImageSettings
from smallmath_jax.data.tokens import load_tokens
from smallmath_jax.models.tree import bits_digest
from smallmath_jax.records import Problem, read_parts, write_part, write_text
from smallmath_jax.report import metrics, pages
from smallmath_jax.rollout.engine import Rollout
from smallmath_jax.tasks import evaluate
from smallmath_jax.tasks.checks import check

TOKENS = load_tokens("tiny")
IMAGES = ImageSettings(min_pixels=56 * 56, max_pixels=56 * 56)
POLICY = SimpleNamespace(
    tokens=TOKENS,
    images=IMAGES,
    config=SimpleNamespace(vision=SimpleNamespace(patch_values=1176)),
)
PROBLEMS = [Problem(f"p{n}", f"{n} + 1?", str(n + 1), meta={"set": "sums"}) for n in range(5)]


class Killed(Exception):
    """Stands for a kill."""


class Engine:
    """Has what an evaluation calls of an engine: `answer(problem id, sample)` is what it says."""

    slots, version = 1, 0

    def __init__(self, answer, weights="w", most=99):
        self.answer, self.weights, self.most = answer, weights, most
        self.asked, self.waiting, self.tickets = [], {}, 0

    def weights_digest(self):
        return self.weights

    def root(self, prompt):
        if len(self.asked) == self.most:
            raise Killed
        self.asked.append(prompt.problem_id)
        return len(self.asked) - 1

    def submit(self, node, n, limits, sampling, keys):
        first, self.tickets = self.tickets, self.tickets + n
        self.waiting |= {first + sample: (self.asked[node], sample) for sample in range(n)}
        return list(range(first, self.tickets))

    def step(self):
        out = []
        for ticket, case in self.waiting.items():
            ids = TOKENS.tokenizer.encode(self.answer(*case), add_special_tokens=False)
            out.append((ticket, Rollout(np.array(ids), np.zeros(len(ids)), "eos", 0)))
        self.waiting = {}
        return out

    def prune(self, node):
        pass


def tagged(answer):
    return f"<think>x</think><answer>{answer}</answer>"


def right(problem, sample):
    return tagged(int(problem[1:]) + 1)


def config_of(samples=0, **changes):
    config = common.base("evaluate", "tiny")
    config.eval = common.evaluation("tiny")
    config.eval.update({"samples": samples, "headline": "sampled" if samples else "greedy"})
    config.eval.update(changes)
    return config


def measured(engine, folder, config=None, problems=PROBLEMS, **options):
    config = config or config_of()
    return evaluate.evaluate(POLICY, engine, problems, config, folder, **options)


def test_killed_between_parts_it_continues_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "PART_ROWS", 2)
    whole = measured(Engine(right), tmp_path / "whole")
    with pytest.raises(Killed):
        measured(Engine(right, most=3), tmp_path / "broken")
    again = Engine(right)
    assert measured(again, tmp_path / "broken") == whole and whole["accuracy"] == 1
    assert again.asked == ["p2", "p3", "p4"]  # the part of p0 and p1 was published
    rows = [list(read_parts(tmp_path / name / "completions")) for name in ("whole", "broken")]
    assert rows[0] == rows[1] and len(rows[0]) == 5
    third = Engine(right)
    assert measured(third, tmp_path / "broken") == whole and not third.asked


@pytest.mark.parametrize("other", ["weights", "prefix", "settings", "problems", "unnamed"])
def test_what_another_policy_left_is_dropped_and_told(tmp_path, monkeypatch, capsys, other):
    monkeypatch.setattr(evaluate, "PART_ROWS", 2)
    with pytest.raises(Killed):
        measured(Engine(lambda *_: tagged("0"), most=3), tmp_path, source="run, step 100")
    if other == "unnamed":
        (tmp_path / "policy.json").unlink()
    options = {
        "prefix": {"prefix": "<think>"},
        "settings": {"config": config_of(sampling={"max_tokens": 30})},
        "problems": {"problems": [*PROBLEMS[1:], Problem("p0", "Now 1?", "1")]},
    }.get(other, {})
    answer = (lambda *case: right(*case)[7:]) if other == "prefix" else right
    engine = Engine(answer, weights="v" if other == "weights" else "w")
    capsys.readouterr()
    found = measured(engine, tmp_path, source="run, step 200", **options)
    assert sorted(engine.asked) == ["p0", "p1", "p2", "p3", "p4"] and found["accuracy"] == 1
    assert len(list(read_parts(tmp_path / "completions"))) == 5
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "dropped" in line]
    if other == "weights":
        assert "another policy (was run, step 100, now run, step 200); the 1 old parts" in told


def test_a_digest_names_weights_to_the_bit():
    tree = {"a": jnp.arange(6.0), "b": jnp.ones(3, jnp.bfloat16), "c": jnp.array([True, False])}
    nearly = {**tree, "a": tree["a"].at[2].set(np.nextafter(np.float32(2), np.float32(3)))}
    assert bits_digest(tree) == bits_digest(
        {name: leaf + 0 if name != "c" else leaf for name, leaf in tree.items()}
    )
    assert bits_digest(tree) != bits_digest(nearly)
    assert bits_digest(tree) != bits_digest({**tree, "c": ~tree["c"] | True})
    engine = engine_case.engine()
    first = engine.weights_digest()
    engine.set_weights(engine_case.model(1), 1)
    second = engine.weights_digest()
    engine.set_weights(engine_case.model(0), 2)
    assert second != first == engine.weights_digest()


def test_lenient_verdicts_stand_beside_strict_ones(tmp_path):
    says = {"p0": tagged(1), "p1": "so the answer is 2", "p2": "so the answer is 7"}
    result = measured(Engine(lambda name, _: says[name]), tmp_path, problems=PROBLEMS[:3])
    rows = {row["problem_id"]: row for row in read_parts(tmp_path / "completions")}
    verdicts = {
        name: (row["verdict"], row["extra"]["lenient_verdict"]) for name, row in rows.items()
    }
    assert verdicts == {
        "p0": ("correct", "correct"),
        "p1": ("no_answer", "correct"),
        "p2": ("no_answer", "wrong"),
    }
    assert result["accuracy"] == pytest.approx(1 / 3)
    assert result["lenient"]["accuracy"] == pytest.approx(2 / 3)
    other = measured(
        Engine(lambda name, _: says[name]), tmp_path / "b", config_of(lenient=False), PROBLEMS[:3]
    )
    assert "lenient" not in other


def test_a_vote_counts_answers_by_value(tmp_path):
    half = [Problem("p", "1 / 2?", "1/2", meta={"set": "halves"})]
    answers = ["3", "1/2", "0.5", "3", "\\frac{1}{2}"]
    config = config_of(samples=5, k=(1, 5), greedy=False)
    result = measured(Engine(lambda _, n: tagged(answers[n])), tmp_path, config, half)
    assert result["sampled"]["maj_at_k"]["5"]["accuracy"] == 1


def encoded(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), (0, 120, 0)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_picture_is_written_once_a_group_with_its_media_type(tmp_path, kind):
    problem = Problem("p0", "<image>?", "1", images=(encoded(kind),), meta={"set": "pictures"})
    config = config_of(samples=3, greedy=False)
    result = measured(Engine(right), tmp_path, config, [problem])
    rows = list(read_parts(tmp_path / "completions"))
    assert [row["images"] for row in rows[1:]] == [["in sample 0"]] * 2
    assert rows[0]["images"][0].startswith(f"data:image/{kind.lower()};base64,")
    assert result["sampled"]["by_picture"]["with a picture"]["n"] == 1
    pages.write_report(tmp_path)
    page = (tmp_path / "report" / "index.html").read_text()
    assert f'src="{rows[0]["images"][0]}"' in page and "cannot be shown" not in page


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"samples": 4, "k": (1, 8)}, "eval.k is .1, 8.*eval.samples = 4"),
        ({"samples": 4, "k": (0,)}, "1 <= k"),
        ({"samples": 0, "headline": "sampled"}, "headline is 'sampled'"),
        ({"samples": 4, "greedy": False, "headline": "greedy"}, "headline is 'greedy'"),
        ({"samples": 0, "greedy": False, "headline": "greedy"}, "headline is 'greedy'"),
    ],
)
def test_what_an_evaluation_could_not_report_is_refused_at_the_start(changes, said):
    config = evaluate_config.get_config("tiny")
    config.eval.update(changes)
    with pytest.raises(ValueError, match=said):
        check(config)


def finished(folder, share):
    rows = [
        {"problem_id": f"p{n}", "sample": 0, "prompt": "?", "text": "!", "token_ids": [1],
         "logprobs": [0.0], "stop_reason": "eos", "answer": "1", "gold": "1", "level": 1,
         "verdict": "correct" if n < share else "wrong", "subject": "s", "images": [],
         "extra": {"decoding": "greedy", "set": "s"}}
        for n in range(4)
    ]  # fmt: skip
    write_part(folder / "completions", "0.jsonl", rows)
    write_text(folder / "result.json", evaluate.to_json(metrics.summarise(rows)))


def test_compared_runs_of_one_name_stand_side_by_side(tmp_path):
    for place, folder in enumerate(("a/eval-math", "b/eval-math", "own")):
        finished(tmp_path / folder, place + 1)
    others = [str(tmp_path / "a" / "eval-math"), f"{tmp_path}/b/eval-math/"]
    evaluate.check_compared(others)
    record = pages.write_report(tmp_path / "own", compare=[*others, others[0]])
    found = {name: result["accuracy"] for name, result in record["evaluations"].items()}
    assert found == {
        "evaluation": 0.75,
        "a/eval-math: evaluation": 0.25,
        "b/eval-math: evaluation": 0.5,
    }
    one = pages.write_report(tmp_path / "own", compare=others[:1])
    assert set(one["evaluations"]) == {"evaluation", "eval-math: evaluation"}
    with pytest.raises(ValueError, match="config.compare: .*c has no finished evaluation"):
        evaluate.check_compared([*others, str(tmp_path / "c")])
