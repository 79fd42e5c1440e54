"""One problem by tree search, and what of a self-evolution's workdir is taken: its last finished round."""

import dataclasses
import pathlib
import re
import sys

import chain_case
import numpy as np
import pytest
from PIL import Image

from smallmath_jax.data.tokens import load_tokens
from smallmath_jax.models import weights
from smallmath_jax.models.lora import merge_lora
from smallmath_jax.models.tree import map_named
from smallmath_jax.models.value_head import add_value_head
from smallmath_jax.tasks import export, solve
from smallmath_jax.tasks.policy import (
    add_lora,
    judge_checkpoints,
    load_policy,
    make_mesh,
    newest_checkpoints,
)
from smallmath_jax.tasks.search import load_judge, make_judge

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from configs import evolve as evolve_config  # noqa: E402
from configs import export as export_config  # noqa: E402
from configs import ppm as ppm_config  # noqa: E402
from configs import solve as solve_config  # noqa: E402

QUESTION = "What is 3+4?"


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """A self-evolution's workdir: of its rounds 9 and 10 are finished, 11 is not; the policy of 10 knows a program."""
    import jax

    root = tmp_path_factory.mktemp("evolve")
    config = evolve_config.get_config("tiny")
    chain_case.write_config(root, config)
    chain = chain_case.chained(load_policy(config, make_mesh(config)))
    for number in (9, 10, 11):
        folder = root / f"round_{number}"
        for stage in ("sft", "ppm"):
            (folder / stage / "checkpoints" / "1").mkdir(parents=True)  # empty: it cannot be read
        (folder / "evaluate").mkdir()
        if number < 11:
            (folder / "evaluate" / "done.json").write_text("{}")
    last = root / "round_10"
    for stage, model in (
        ("sft", chain.model),
        ("ppm", add_value_head(chain.model, jax.random.key(2))),
    ):
        (last / stage / "checkpoints" / "1").rmdir()
        chain_case.save(last / stage, model)
    return root


def config_of(root, **fields):
    config = solve_config.get_config("tiny")
    config.method, config.init_from, config.problem = "mcts", str(root), QUESTION
    config.search.rollouts = 2
    config.sandbox.workers = 1
    config.update(fields)
    return config


def solved(root, workdir, capsys, **fields):
    solve.run(config_of(root, **fields), str(workdir))
    return capsys.readouterr().out


def test_a_problem_is_searched_and_its_tree_shown(rounds, tmp_path, capsys):
    told = solved(rounds, tmp_path, capsys)
    program, ending = told.splitlines()[:2]
    (number,) = re.fullmatch(r"<code>print\(3\+([45])\)<end_of_code>", program).groups()
    sum_, boxed = re.fullmatch(
        r"<output>(.)<end_of_output><answer>\\boxed\{([78])\}<end_of_answer>", ending
    ).groups()
    assert int(sum_) == 3 + int(number) and f"\nanswer: {boxed}\n" in told
    agreeing, of = re.search(r"^(\d+) of (\d+) answers agree \(2 rollouts, ", told, re.M).groups()
    assert 1 <= int(agreeing) <= int(of) <= 2
    page = pathlib.Path(re.search(r"^tree: (.*)$", told, re.M)[1])
    assert page.parent == tmp_path / "report" / "trees" and page.suffix == ".html"
    text = page.read_text()
    assert QUESTION in text and "print(3+4)" in text


def test_a_judge_guides_the_search(rounds, tmp_path, capsys, monkeypatch):
    trees = []
    page = lambda tree, path: trees.append(tree)
    monkeypatch.setattr(solve, "write_tree_page", page)
    Image.new("RGB", (56, 56), (200, 30, 30)).save(tmp_path / "red.png")
    image = str(tmp_path / "red.png")
    solved(rounds, tmp_path, capsys, image=image, judge=str(rounds))
    (tree,) = trees
    scores = [node.score for node in tree.nodes if node.kind in ("open", "answer")]
    assert len(scores) > 2 and all(-1 < score < 1 for score in scores) and len(set(scores)) > 1
    assert tree.images == (image,) and not any(node.verdict for node in tree.nodes)


def test_a_judge_trained_with_adapters_is_read_with_them_merged(rounds, tmp_path):
    import jax
    import jax.numpy as jnp

    config = config_of(rounds)
    config.prompt.grammar = "code_steps"
    mesh = make_mesh(config)
    policy = load_policy(config, mesh)
    adapted = solve_config.get_config("tiny")
    adapted.lora.rank = 2
    adapted.ppm = {"loss": "ppm", "tanh_in_loss": False}
    model = add_value_head(add_lora(policy.model, adapted, mesh), jax.random.key(3))
    model = map_named(
        lambda name, leaf: jnp.ones_like(leaf) if name.endswith("lora_b") else leaf, model
    )
    chain_case.save(tmp_path, model)
    chain_case.write_config(tmp_path, adapted)
    judge = load_judge(str(tmp_path), policy, config, mesh)
    merged = dataclasses.replace(policy, model=merge_lora(model))
    plain = dataclasses.replace(policy, model=add_value_head(policy.model, jax.random.key(3)))
    digests = [
        make_judge(one, config, judge.scale).engine.weights_digest() for one in (merged, plain)
    ]
    assert judge.engine.weights_digest() == digests[0] != digests[1]


def test_a_policy_is_no_judge_and_a_judge_no_policy(rounds):
    config = config_of(rounds)
    config.prompt.grammar = "code_steps"
    mesh = make_mesh(config)
    policy = load_policy(config, mesh)
    with pytest.raises(ValueError, match="round_10/sft: a policy, and no preference model"):
        load_judge(str(rounds / "round_10" / "sft"), policy, config, mesh)
    config.init_from = str(rounds / "round_10" / "ppm")
    with pytest.raises(ValueError, match="round_10/ppm: a preference model, and no policy"):
        load_policy(config, mesh)


def test_the_choice_is_that_of_the_measured_vote(rounds):
    from test_evolve import leaf_tree

    tree = leaf_tree(("2", 0.3, -9.0, 0, 0), ("1", 0.25, -1.0, 1, 0), ("1", 0.2, -0.5, 1, 0))
    assert tree.chosen == "0.1" and solve.settled(tree).chosen in ("0.2", "0.3")
    assert "answer: 1\n2 of 3 answers agree (4 rollouts" in solve.told(solve.settled(tree))
    empty = leaf_tree(("2", 0.3, -9.0, 0, 0))
    empty = empty.__class__("p", "", "", empty.nodes[:1], rollouts=3)
    assert solve.told(solve.settled(empty)).startswith("answer: none found (3 rollouts")


def test_one_answer_of_code_steps_is_the_programs_own(rounds, tmp_path, capsys):
    told = solved(rounds, tmp_path, capsys, method="sample")
    ((sum_, output),) = re.findall(
        r"print\(3\+(\d)\)<end_of_code>\n<output>(.*)<end_of_output>", told
    )
    assert int(output) == 3 + int(sum_) and re.search(r"^answer: [78]$", told, re.M)


def test_the_last_finished_round_is_taken(rounds, tmp_path):
    assert newest_checkpoints(str(rounds)) == rounds / "round_10" / "sft" / "checkpoints"
    assert judge_checkpoints(str(rounds)) == rounds / "round_10" / "ppm" / "checkpoints"
    stage = rounds / "round_9" / "ppm"
    assert judge_checkpoints(str(stage)) == stage / "checkpoints"
    config = ppm_config.get_config("tiny")
    chain_case.write_config(tmp_path, config)
    with pytest.raises(FileNotFoundError, match="has the run saved one yet"):
        judge_checkpoints(str(tmp_path))


def test_an_export_keeps_the_tokens_of_the_steps(rounds, tmp_path):
    config = export_config.get_config("tiny")
    config.init_from, config.out = str(rounds), str(tmp_path / "out")
    export.run(config, str(tmp_path / "export"))
    assert config.prompt.grammar == "code_steps"
    exported = weights.import_folder(tmp_path / "out")[0]
    config = evolve_config.get_config("tiny")
    source = load_policy(config, make_mesh(config))
    assert (
        load_tokens(tmp_path / "out").tokenizer.get_vocab() == source.tokens.tokenizer.get_vocab()
    )
    expected = np.asarray(chain_case.chained(source).model.text.embed[...])
    np.testing.assert_array_equal(np.asarray(exported.text.embed[...]), expected)


def test_what_cannot_be_solved_is_told_in_one_line(rounds, tmp_path):
    def refused(match, error=ValueError, **fields):
        with pytest.raises(error, match=match):
            solve.run(config_of(rounds, **fields), str(tmp_path))

    refused("'mtcs'; known: sample, mcts", method="mtcs")
    refused("no config.json of a run", FileNotFoundError, init_from=str(tmp_path / "none"))
    refused("no config.json of a run", FileNotFoundError, judge=str(tmp_path / "none"))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "qwen2"}')
    refused("a Hugging Face folder and not a run's workdir", init_from=str(tmp_path / "hf"))
    refused("a Hugging Face folder and not a run's workdir", judge=str(tmp_path / "hf"))
    started = tmp_path / "started"
    chain_case.write_config(started, evolve_config.get_config("tiny"))
    (started / "round_1" / "sft" / "checkpoints" / "3").mkdir(parents=True)
    (started / "bootstrap").mkdir()
    message = "no round of this self-evolution is finished yet; its first policy is .*bootstrap"
    refused(message, FileNotFoundError, init_from=str(started))
    refused(message, FileNotFoundError, judge=str(started))
    thinks = solve_config.get_config("tiny")
    thinks.prompt.grammar = "think_answer"
    chain_case.write_config(tmp_path / "thinks", thinks)
    (tmp_path / "thinks" / "checkpoints" / "3").mkdir(parents=True)
    refused("of think_answer; give a policy", init_from=str(tmp_path / "thinks"))
    refused("trains no preference model", judge=str(tmp_path / "thinks"))
