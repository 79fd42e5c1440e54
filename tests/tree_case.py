"""Search trees for the tests of their pages: a large one, and one whose every text is hostile."""

import random

from smallmath_jax.records import Node, Tree

CODE = """
# Step {depth}: let t be the total of what is left
t = {a} + {b}  # {tag}
print(f"so far {{t}}")
<end_of_step>"""

HOSTILE = (
    "</script><script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 2'>",
    "<svg/onload=window.ran=3>",
    "<!--<script>window.ran = 4",
    "]]></style><iframe srcdoc='<script>parent.ran = 5</script>'>",
    "\" autofocus onfocus='window.ran = 6' x=\"",
    "javascript:window.ran=7",
    "\u202ereversed\u202c\u2066isolated\u2069\u200f\u061c hidden\u200b\ufeff \u2028\u2029 \x00\x1b[31m",
    "\\u003c/script\\u003e ${window.ran=8} `{{constructor.constructor('window.ran=9')()}}`",
    "\ud800 lone",
)


def node(tag, text="", kind="open", visits=1, value=0.0, **fields):
    ids = list(range(max(4, len(text) // 4)))
    defaults = {"written": max(1, len(ids) - 2), "log_prob": -0.3 * len(ids)}
    return Node(
        tag=tag,
        text=text,
        token_ids=ids,
        kind=kind,
        visit_count=visits,
        value_sum=value,
        **(defaults | fields),
    )


def large_tree(count=2000, depth=16, children=8, seed=0, **fields):
    """A tree grown and backed up as by a search: `children` siblings an expansion, the deepest right answer chosen."""
    draw = random.Random(seed)
    grown = {"0": {"kind": "root", "visits": 0, "value": 0.0, "log_prob": 0.0, "written": 0}}
    frontier, chosen = ["0"], ""
    while len(grown) < count:
        up = frontier.pop(draw.randrange(max(0, len(frontier) - 12), len(frontier)))
        for place in range(1, min(children, count - len(grown)) + 1):
            tag = f"{up}.{place}"
            grown[tag] = _child(tag, depth, draw)
            if grown[tag]["kind"] == "open":
                frontier.append(tag)
            elif grown[tag]["kind"] == "answer":
                _back_up(grown, tag)
                right = grown[tag]["verdict"] == "correct"
                chosen = tag if right and tag.count(".") >= chosen.count(".") else chosen
    nodes = [node(tag, **values) for tag, values in grown.items()]
    values = {"problem_id": "set/deep-1", "problem": "Find the total. $x^2$", "gold": "42"}
    values |= {"rollouts": 64, "wasted": 3, "tokens": 98765, "stopped": "rollouts", "seed": seed}
    values |= {"level": 5, "subject": "Counting & Probability", "chosen": chosen}
    return Tree(nodes=nodes, **(values | fields))


def _back_up(grown, tag):
    """One visit and the answer's reward for every node above it."""
    reward = grown[tag]["value"]
    while tag := tag.rpartition(".")[0]:
        grown[tag]["visits"] += 1
        grown[tag]["value"] += reward


def _child(tag, depth, draw):
    level = tag.count(".")
    text = CODE.format(depth=level, a=draw.randrange(99), b=draw.randrange(99), tag=tag)
    score = draw.uniform(-1, 1)
    if level == depth or draw.random() < 0.06:
        right = draw.random() < 0.5
        boxed = f"\n<answer>The total is \\boxed{{{42 if right else 41}}}.\n<end_of_answer>"
        values = {"text": boxed, "kind": "answer", "visits": 1, "value": 1.0 if right else -1.0}
        verdict = "correct" if right else "wrong"
        return values | {"answer": "42" if right else "41", "verdict": verdict, "score": score}
    values = {"text": text, "score": score, "visits": 1}
    if draw.random() < 0.08:
        error = "NameError: name 'y' is not defined"
        values |= {"kind": "error", "value": -1.0, "status": "error", "error": error, "errors": 1}
        return values
    output = f"so far {draw.randrange(99)}"
    return values | {"kind": "open", "value": score, "status": "ok", "output": output}


def hostile_tree():
    """Every text field of tree and nodes holds markup that wants to run, or marks that reorder text."""
    nodes = [node("0", kind="root", visits=3)]
    for place, text in enumerate(HOSTILE, 1):
        fields = {"answer": text, "verdict": text, "status": text, "output": text, "error": text}
        nodes.append(node(f"0.{place}", text, "answer", 1, 1.0, score=float("nan"), **fields))
    nodes.append(node("0.99", HOSTILE[0], HOSTILE[1], log_prob=float("-inf")))
    every = " ".join(HOSTILE)
    return Tree(
        problem_id=every,
        problem=every,
        gold=every,
        nodes=nodes,
        chosen="0.1",
        rollouts=3,
        stopped=every,
        subject=every,
        source=every,
        template=every,
        images=(
            every,
            "data:text/html,<script>window.ran=10</script>",
            'data:image/png;base64,"><script>',
        ),
        extra={every: every},
    )
