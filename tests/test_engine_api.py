"""What the engine's API promises: stops, refusals, cancelling, trees, values and new weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_case import (
    EOS,
    IMAGE,
    LENGTH,
    OTHER_EOS,
    engine,
    full_hidden,
    full_log_probs,
    keys,
    model,
    prompt,
)
from flax import nnx

from smallmath_jax.models.value_head import add_value_head
from smallmath_jax.records import Sampling
from smallmath_jax.rollout.engine import Limits

TEXT, PICTURE = prompt("api text", 11), prompt("api picture", 5, ((1, 4, 4),))
DRAWN = Sampling()


def _one(made, root, key, limits, sampling=DRAWN):
    (ticket,) = made.submit(root, 1, limits, sampling, keys(key))
    return dict(made.drain())[ticket]


@pytest.fixture(scope="module")
def free():
    """[(key, rollout)] that ended by EOS after a few tokens, of 60 tries from TEXT."""
    made = engine()
    root = made.root(TEXT)
    tickets = made.submit(root, 60, Limits(40), DRAWN, keys(*range(60)))
    done = dict(made.drain())
    found = [(key, done[ticket]) for key, ticket in enumerate(tickets)]
    return [(key, one) for key, one in found if one.stop_reason == "eos" and len(one.token_ids) > 6]


def test_eos_is_a_set_and_is_returned(free):
    last = {int(rollout.token_ids[-1]) for _, rollout in free}
    assert last == {EOS, OTHER_EOS}
    for _, rollout in free:
        assert not np.isin(rollout.token_ids[:-1], (EOS, OTHER_EOS)).any()
        assert len(rollout.log_probs) == len(rollout.token_ids)


def test_eos_at_the_limit_is_eos_and_one_less_is_length(free):
    key, rollout = free[0]
    made = engine()
    root, count = made.root(TEXT), len(rollout.token_ids)
    whole = _one(made, root, key, Limits(count))
    assert whole.stop_reason == "eos"
    np.testing.assert_array_equal(whole.token_ids, rollout.token_ids)
    cut = _one(made, root, key, Limits(count - 1))
    assert cut.stop_reason == "length"
    np.testing.assert_array_equal(cut.token_ids, rollout.token_ids[:-1])


@pytest.mark.parametrize("first,last", [(3, 5), (2, 3), (0, 6)])
def test_a_stop_sequence_ends_a_row_and_stays_in_it(free, first, last):
    key, rollout = free[1]
    made = engine()
    stop = tuple(int(token) for token in rollout.token_ids[first:last])
    found = _one(made, made.root(TEXT), key, Limits(40, ((46, 46, 46), stop)))
    ids = [int(token) for token in rollout.token_ids]
    end = next(at for at in range(len(stop), len(ids)) if tuple(ids[at - len(stop) : at]) == stop)
    assert found.stop_reason == "stop"
    np.testing.assert_array_equal(found.token_ids, ids[:end])
    np.testing.assert_array_equal(found.log_probs, rollout.log_probs[:end])


def test_a_stop_sequence_does_not_match_the_prompt(free):
    key, rollout = free[2]
    made = engine()
    across = (int(TEXT.token_ids[-1]), int(rollout.token_ids[0]))
    found = _one(made, made.root(TEXT), key, Limits(40, (across,)))
    assert len(found.token_ids) > 1


@pytest.mark.parametrize(
    "limits,sampling,words",
    [
        (Limits(LENGTH), DRAWN, "cache_length"),
        (Limits(0), DRAWN, "max_tokens"),
        (Limits(4, ((),)), DRAWN, "stop sequences"),
        (Limits(4, ((1,),) * 17), DRAWN, "stop sequences"),
        (Limits(4, ((1,) * 17,)), DRAWN, "stop sequences"),
        (Limits(4), Sampling(-1.0), "temperature"),
        (Limits(4), Sampling(float("nan")), "temperature"),
        (Limits(4), Sampling(1.0, top_p=0.0), "top_p"),
        (Limits(4), Sampling(1.0, top_k=-1), "top_k"),
    ],
)
def test_submit_refuses_what_cannot_be_served(limits, sampling, words):
    made = engine()
    with pytest.raises(ValueError, match=words):
        made.submit(made.root(TEXT), 1, limits, sampling, keys(0))
    assert made.drain() == [] and made.counters()["waiting"] == 0


def test_what_fits_exactly_is_served():
    made = engine()
    found = _one(made, made.root(TEXT), "exact", Limits(LENGTH - 11), Sampling(20.0))
    np.testing.assert_allclose(found.log_probs, full_log_probs(TEXT, found, 20.0), atol=1e-4)


def test_wrong_prompts_nodes_keys_and_tokens_are_named():
    made = engine()
    root = made.root(TEXT)
    with pytest.raises(ValueError, match="keys must be"):
        made.submit(root, 2, Limits(4), DRAWN, keys(0))
    with pytest.raises(ValueError, match="node 99"):
        made.submit(99, 1, Limits(4), DRAWN, keys(0))
    with pytest.raises(ValueError, match="at least one token"):
        made.append(root, [])
    with pytest.raises(ValueError, match="token 48 is outside"):
        made.append(root, [7, 48])
    with pytest.raises(ValueError, match="images enter by root"):
        made.append(root, [IMAGE])
    with pytest.raises(ValueError, match="max_patches is 32"):
        made.root(prompt("too large", 3, ((1, 8, 8),)))
    with pytest.raises(ValueError, match="ends in an image"):
        made.root(
            dataclasses.replace(
                PICTURE, token_ids=PICTURE.token_ids[:5], positions=PICTURE.positions[:, :5]
            )
        )
    with pytest.raises(ValueError, match="image tokens for"):
        made.root(dataclasses.replace(PICTURE, pixels=PICTURE.pixels[:8]))
    with pytest.raises(ValueError, match="never given out"):
        made.cancel(7)
    with pytest.raises(ValueError, match="value head"):
        made.score(root)


def test_cancel_waiting_running_and_finished():
    made = engine(slots=8)
    root = made.root(TEXT)
    tickets = made.submit(root, 20, Limits(30), Sampling(30.0), keys(*range(20)))
    done = dict(made.step())
    running, waiting = [one for one in tickets[:8] if one not in done], tickets[8:]
    assert made.counters()["running"] == len(running) > 0
    assert made.counters()["waiting"] == len(waiting)
    made.cancel(running[0])
    made.cancel(waiting[3])
    assert made.counters()["running"] == len(running) - 1
    assert made.counters()["waiting"] == len(waiting) - 1
    done |= dict(made.drain())
    assert set(done) == set(tickets) - {running[0], waiting[3]}
    made.cancel(tickets[19])  # handed out long ago: nothing happens
    assert made.counters()["cancelled"] == 2


@pytest.mark.parametrize("start", [TEXT, PICTURE])
def test_a_deep_tree_is_the_uncached_model_on_its_path(start):
    made = engine()
    node, path = made.root(start), np.zeros(0, np.int32)
    rng = np.random.default_rng(0)
    for depth in range(4):
        node = made.append(node, output := rng.integers(7, 47, depth + 1))
        path = np.concatenate([path, output]).astype(np.int32)
        children = made.fork(node, 3, Limits(7), DRAWN, keys(*[(depth, one) for one in range(3)]))
        for _, rollout in children:
            whole = dataclasses.replace(rollout, token_ids=np.append(path, rollout.token_ids))
            expected = full_log_probs(start, whole, 1.0)[len(path) :]
            np.testing.assert_allclose(rollout.log_probs, expected, atol=1e-4)
        node, chosen = children[depth % 3]
        path = np.append(path, chosen.token_ids)
    assert made.counters()["nodes"] == 1 + 4 + 12


@pytest.mark.parametrize("length", [16, 24])
def test_a_path_whose_first_pages_were_evicted_is_the_uncached_model(length):
    """The pages of a path are used in its order, so its first ones are the first to go, and leave later ones behind."""
    made = engine(cache_length=32, pages=4)
    start, other = prompt("evicted", 8), prompt("other", length)
    tokens = np.random.default_rng(0).integers(7, 47, 19).astype(np.int32)
    middle = made.append(made.append(made.root(start), tokens[:8]), tokens[8:16])
    for node in (
        middle,
        made.root(other),
    ):  # four pages: the other takes those of one or two chunks
        made.extend(node, Limits(4), DRAWN, keys("aside")[0])
    rollout = made.extend(made.append(middle, tokens[16:]), Limits(4), DRAWN, keys("end")[0])[1]
    whole = dataclasses.replace(rollout, token_ids=np.append(tokens, rollout.token_ids))
    expected = full_log_probs(start, whole, 1.0)[len(tokens) :]
    np.testing.assert_allclose(rollout.log_probs, expected, atol=1e-4)


def test_fork_keeps_what_else_finishes_for_step():
    made = engine()
    root = made.root(TEXT)
    (other,) = made.submit(root, 1, Limits(2), DRAWN, keys("other"))
    assert len(made.fork(root, 2, Limits(20), DRAWN, keys(1, 2))) == 2
    assert [ticket for ticket, _ in made.step()] == [other]


def test_prune_frees_pages_and_cancels_below():
    made = engine()
    kept, root = made.root(PICTURE), made.root(TEXT)
    child, _ = made.extend(root, Limits(9), DRAWN, keys(0)[0])
    made.extend(child, Limits(4), DRAWN, keys(1)[0])
    made.extend(kept, Limits(4), DRAWN, keys(2)[0])
    made.submit(child, 12, Limits(9), DRAWN, keys(*range(12)))
    made.step()
    made.prune(root)
    counts = made.counters()
    assert counts["running"] == counts["waiting"] == 0
    assert counts["nodes"] == 2 and counts["pages"] == 2  # the picture's 11 tokens
    assert made.drain() == []
    with pytest.raises(ValueError, match=f"node {child}"):
        made.append(child, [7])
    made.prune(kept)
    assert made.counters()["pages"] == 0


def test_new_weights_restart_what_runs_and_mark_it():
    made = engine()
    root = made.root(PICTURE)
    tickets = made.submit(root, 12, Limits(25), DRAWN, keys(*range(12)))
    early = made.step()
    made.set_weights(model(1), 5)
    late = made.drain()
    assert {rollout.version for _, rollout in early} <= {0}
    assert {rollout.version for _, rollout in late} == {5}
    assert sorted(ticket for ticket, _ in early + late) == tickets
    fresh = engine(model(1))
    again = fresh.submit(fresh.root(PICTURE), 12, Limits(25), DRAWN, keys(*range(12)))
    expected = dict(fresh.drain())
    expected = {ticket: expected[other] for ticket, other in zip(tickets, again, strict=True)}
    for ticket, rollout in late:
        np.testing.assert_array_equal(rollout.token_ids, expected[ticket].token_ids)
        np.testing.assert_array_equal(rollout.log_probs, expected[ticket].log_probs)


def test_diverged_weights_leave_nothing_behind():
    bad = nnx.clone(model())
    bad.text.norm[...] = bad.text.norm[...] * jnp.nan
    made = engine(bad)
    root = made.root(TEXT)
    broken = _one(made, root, 0, Limits(10))
    assert np.isnan(broken.log_probs).all()
    made.set_weights(model(), 1)
    found = _one(made, root, 0, Limits(10))
    np.testing.assert_allclose(found.log_probs, full_log_probs(TEXT, found, 1.0), atol=1e-4)


def test_score_is_the_value_head_at_the_last_token():
    judge = add_value_head(model(), jax.random.key(3))
    judge.value_head.bias[...] = jnp.array([0.25])
    made = engine(judge)
    root = made.root(PICTURE)
    nodes = [made.append(root, np.arange(7, 8 + more)) for more in range(6)]
    nodes.append(made.append(nodes[3], [9] * 13))
    for node in [root, *nodes]:
        path = np.concatenate([one.token_ids for one in made._tree.path(node)])
        hidden = full_hidden(PICTURE, path[len(PICTURE.token_ids) :], judge)
        expected = hidden @ np.asarray(judge.value_head.kernel[...])[:, 0] + 0.25
        np.testing.assert_allclose(made.score(node), expected, atol=1e-5)
    assert made.counters()["prefill_calls"] == 8  # 12 pages on their own: siblings came along


def test_counters_count():
    made = engine()
    root = made.root(TEXT)
    tickets = made.submit(root, 5, Limits(6), Sampling(30.0), keys(*range(5)))
    done = dict(made.drain())
    counts = made.counters()
    assert counts["decoded_tokens"] == sum(len(done[ticket].token_ids) for ticket in tickets)
    assert counts["prefilled_tokens"] == counts["unique_tokens"] == 11
    assert 0 < counts["occupancy"] <= 5 / 8
    assert counts["tokens_per_second"] > 0 and counts["nodes"] == 1 and counts["pages"] == 2
    child = made.append(root, [7, 8])  # places 11 and 12, in the page of places 8 to 15
    made.extend(child, Limits(1), DRAWN, keys(0)[0])
    counts = made.counters()
    assert counts["prefilled_tokens"] == 11 + 5 and counts["unique_tokens"] == 11 + 2
