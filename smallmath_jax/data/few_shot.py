"""The prompt that makes a general model write code steps: instructions, two worked examples, the question.

For the bootstrap policy of round 1 (rStar-Math, appendix: instructions and two demonstrations). The order of the
examples is fixed, so that prompts share their prefix and a run can be repeated; the public code shuffles them anew at
every call.
"""

from smallmath_jax.data.prompts import STEP_MARKS, user_text
from smallmath_jax.records import Problem

INSTRUCTIONS = """\
You solve mathematics problems with reasoning and Python. Write a program in small steps; put the reasoning of each \
step into comments. The packages math, sympy, numpy and scipy may be used. Follow this form exactly:
<code> opens the program, <end_of_step> ends each step, and <end_of_code> ends the program. The last step prints the \
answer and begins with the comment "# Now print the final answer". The program's output then stands between <output> \
and <end_of_output>; it is given to you. Last, state the answer between <answer> and <end_of_answer>, in \\boxed{} and \
without units."""

EXAMPLES = (
    (
        "A baker fills 14 trays with 12 rolls each and sells 95 rolls. How many rolls are left?",
        """\
<code>
# Step 1: Count the rolls on all trays
trays = 14
rolls_per_tray = 12
baked = trays * rolls_per_tray
<end_of_step>
# Step 2: Take away those that were sold
sold = 95
left = baked - sold
<end_of_step>
# Now print the final answer
print(left)
<end_of_code>
<output>73<end_of_output>
<answer>There are \\boxed{73} rolls left.
<end_of_answer>""",
    ),
    (
        "The roots of $x^2 - 7x + k = 0$ differ by 3. Find $k$.",
        """\
<code>
# Step 1: By Vieta's formulas the roots add up to 7
from sympy import Eq, solve, symbols
p, q = symbols("p q")
total = Eq(p + q, 7)
<end_of_step>
# Step 2: They differ by 3
difference = Eq(p - q, 3)
roots = solve([total, difference], [p, q])
<end_of_step>
# Step 3: k is their product
k = roots[p] * roots[q]
<end_of_step>
# Now print the final answer
print(k)
<end_of_code>
<output>10<end_of_output>
<answer>The value of k is \\boxed{10}.
<end_of_answer>""",
    ),
)


def few_shot_prompt(problem: Problem, partial: str = "", shots: int = len(EXAMPLES)) -> str:
    """The text a bootstrap model continues: `few_shot_start`, the question, and `partial`, a solution so far."""
    return few_shot_start(shots) + few_shot_question(problem) + partial


def few_shot_start(shots: int = len(EXAMPLES)) -> str:
    """Instructions and the first `shots` worked examples: the same for every problem."""
    if not shots:
        return f"{INSTRUCTIONS}\n\n"
    shown = "\n\n".join(f"Question: {asked}\n{solution}" for asked, solution in EXAMPLES[:shots])
    are = f"are {shots} demonstration examples" if shots > 1 else "is a demonstration example"
    return f"{INSTRUCTIONS}\nThe following {are}.\n\n{shown}\n\nNow! It's your turn.\n"


def few_shot_question(problem: Problem) -> str:
    """The problem as it stands behind the examples.

    Raises ValueError for a problem with pictures, which a text prompt cannot hold.
    """
    if problem.images:
        raise ValueError(
            f"problem {problem.id!r} has pictures, the few-shot prompt is text; leave such problems out of round 1"
        )
    return f"Question: {user_text(problem)}\n"


def first_step(text: str, stops: tuple[str, ...]) -> str:
    """A text up to and with its first stop mark; "" where it has none."""
    found = [(text.index(mark), mark) for mark in stops if mark in text]
    if not found:
        return ""
    place, mark = min(found)
    return text[: place + len(mark)]


def cut_step(text: str, stops: tuple[str, ...], stopped_by: str = "") -> tuple[str, str]:
    """(one step, its stop reason) of what a server wrote: up to and with the first stop mark.

    Most servers take the stop string off, and some do not say which it was (`stopped_by`); then the text tells: an
    answer ends in <end_of_answer>, a print ends the program, anything else ends a step. "length" for a text that was
    cut off: stopped_by = "length".
    """
    step = first_step(text, stops)
    if step:
        return step, "stop"
    if stopped_by in stops:
        return text + stopped_by, "stop"
    if stopped_by == "length":
        return text, "length"
    answer, code, step = (STEP_MARKS[6], STEP_MARKS[2], STEP_MARKS[1])
    if "<answer>" in text or "\\boxed" in text:
        return text + answer, "stop"
    prints = text.rstrip().rpartition("\n")[2].startswith("print(")
    return text + (code if prints else step), "stop"
