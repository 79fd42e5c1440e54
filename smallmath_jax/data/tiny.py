"""The embedded problems: endless, deterministic, nothing to download.

A problem is a template (data/tiny_templates.py) with numbers, words and, for about a third, a picture drawn by Pillow.
Everything else follows from them: the answer, worked and terse solutions in both grammars, the split, twins and other
instances. `Problem.meta` holds what they are made of, as plain JSON:

    split       train | test | unseen
    quantities  name -> number: the inputs a program begins by assigning, told by the text or the picture
    spelled     name -> sum, for an input that is counted in the picture quadrant by quadrant ("2+3+1+0")
    words, scene  what fills the text's other holes, and the picture's content

A program can be run again on another instance of its problem: `rebind(code, problem, reinstantiate(problem, seed))`.
"""

import ast
import dataclasses
import hashlib
import math
import operator
import random
from collections.abc import Mapping
from functools import cache

from smallmath_jax.data.tiny_pictures import draw_scene, random_scene
from smallmath_jax.data.tiny_templates import TEMPLATES, THINGS, WHO, Template
from smallmath_jax.data.tiny_tokenizer import tiny_tokenizer
from smallmath_jax.records import Problem

__all__ = [
    "WORKED_PREFIX",
    "canonical",
    "is_embedded",
    "program",
    "rebind",
    "reinstantiate",
    "tiny_problems",
    "tiny_tokenizer",
    "worked_solution",
]
SPLITS = ("train", "test", "unseen")
GRAMMARS = ("think_answer", "code_steps")
STYLES = ("worked", "terse")
WORKED_PREFIX = "<think>Steps:\n"  # forces the worked style when put after the generation prompt
LARGEST = 20  # of every step's value: few enough facts to learn in minutes
TEST_SHARE = 0.2  # of the canonical problems

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def tiny_problems(split: str, count: int, seed: int, image_share: float = 1 / 3) -> list[Problem]:
    """`count` problems of a split; more come by asking for more, or for another seed.

    `train` and `test` share their templates and no canonical problem; `unseen` holds templates that training never
    shows, with numbers of the test side. Problem i depends on (split, seed, i, image_share) alone, except that one
    repeated within a call is drawn anew while that helps (small templates run out of problems).
    """
    if split not in SPLITS:
        raise ValueError(f"tiny problems: no split {split!r}; known: {', '.join(SPLITS)}")
    pools = {
        pictured: [
            t for t in TEMPLATES.values() if _belongs(t, split) and bool(t.scene) == pictured
        ]
        for pictured in (False, True)
    }
    problems, known = [], set()
    for index in range(count):
        pictured = random.Random(f"tiny {split} {seed} {index}").random() < image_share
        for attempt in range(8):
            source = random.Random(f"tiny {split} {seed} {index} {attempt}")
            template = source.choice(_by_subject(pools[pictured], source))
            problem = _instance(template, split, source)
            if problem.id not in known:
                break
        known.add(problem.id)
        problems.append(problem)
    return problems


def is_embedded(problem: Problem) -> bool:
    """Whether a problem comes from here. A source may be named "tiny" too; a template of ours with its numbers not."""
    return problem.template in TEMPLATES and "quantities" in problem.meta


def reinstantiate(problem: Problem, seed: int) -> Problem:
    """The same template and words with other numbers (and picture), of the same split.

    Raises ValueError for a problem that does not come from here.
    """
    template = _template_of(problem)
    for attempt in range(100):
        source = random.Random(f"again {problem.id} {seed} {attempt}")
        other = _instance(template, problem.meta["split"], source, problem.meta["words"])
        if other.id != problem.id and other.answer != problem.answer:
            return other
    raise ValueError(f"problem {problem.id} ({template.name}) has no other instance")


def rebind(code: str, problem: Problem, other: Problem) -> str | None:
    """The program with the inputs of `problem` replaced by those of `other`; None when that cannot be done safely.

    An input is bound by name where the program assigns its value to its name (`n=2+3+1+0` is n = 6). For inputs that
    are not, integer literals are bound by value: one that equals one such input takes the new value, one that equals
    several of different new values is ambiguous (None), all others are the program's own constants and stay. A
    program that binds nothing ignores its problem: None.
    """
    old, new = problem.meta["quantities"], other.meta["quantities"]
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return None
    named = {name for node in ast.walk(tree) if (name := _bound_name(node, old))}
    binder = _Binder({name: old[name] for name in old if name not in named}, old, new)
    tree = ast.fix_missing_locations(binder.visit(tree))
    return None if binder.ambiguous or not binder.bound else ast.unparse(tree)


def worked_solution(problem: Problem, grammar_name: str, style: str = "worked") -> str:
    """The solution text (no chat marks) in a grammar, `worked` in steps or `terse`: the answer at once.

    think_answer: <think>Steps:\\n12+7=19\\n19*2=38</think><answer>38</answer>
    code_steps:   <code>\\na=12<end_of_step>\\n...print(t)\\n<end_of_code>\\n<output>38<end_of_output>\\n
                  <answer>\\boxed{38}<end_of_answer>
    """
    if grammar_name not in GRAMMARS or style not in STYLES:
        raise ValueError(
            f"tiny solutions: no grammar {grammar_name!r} in style {style!r}; "
            f"known: {', '.join(GRAMMARS)}; {', '.join(STYLES)}"
        )
    if grammar_name == "code_steps":
        return _code_solution(problem, style)
    lines = _shown_steps(problem) if style == "worked" else []
    think = "Steps:\n" + "\n".join(lines) if lines else "Quick"
    return f"<think>{think}</think><answer>{problem.answer}</answer>"


def canonical(template: Template, quantities: Mapping[str, int], scene: str) -> str:
    """One name for all twins: the computation on the inputs, with the operands of sums and products sorted.

    Wording does not count: 12 + 7 apples and 7 + 12 pens are the same. Of counted pictures the layout counts as well.
    """
    known: dict[str, str] = {name: str(quantities[name]) for name in template.inputs}
    for name, expression, *_ in template.steps:
        known[name] = _canonical_tree(_parsed(expression), known)
    answer = known[_answer_name(template)]
    return f"{scene} {answer}" if template.scene == "squares" else answer


def program(problem: Problem) -> list[str]:
    """The lines of the program that solves a problem: inputs, steps, print. Executable Python."""
    template = _template_of(problem)
    quantities, spelled = problem.meta["quantities"], problem.meta["spelled"]
    lines = [f"{name}={spelled.get(name, quantities[name])}" for name in template.inputs]
    lines += [f"{step[0]}={step[1]}" for step in template.steps]
    if template.fraction:
        above, below = template.fraction
        return [*lines, f'print({above},{below},sep="/")']
    return [*lines, f"print({_answer_name(template)})"]


# Instances.


def _instance(
    template: Template, split: str, source: random.Random, words: Mapping[str, str] | None = None
) -> Problem:
    words = words or {"who": source.choice(WHO), "things": source.choice(THINGS)}
    for _ in range(2000):
        drawn = {name: source.randint(low, high) for name, low, high in template.draw}
        scene, spelled = "", {}
        if template.scene:
            scene, read, spelled = random_scene(template.scene, source)
            drawn |= read
        values = _solve(template, drawn)
        if values is None:
            continue
        quantities = {name: values[name] for name in template.inputs}
        spelled = {name: spelled[name] for name in spelled if name in quantities}
        key = canonical(template, quantities, scene)
        if _is_test(key) != (split == "train"):
            return _problem(template, split, values, scene, spelled, words)
    raise ValueError(
        f"template {template.name}: no {split} problem in 2000 draws; widen its ranges"
    )


def _problem(
    template: Template,
    split: str,
    values: Mapping[str, int],
    scene: str,
    spelled: Mapping[str, str],
    words: Mapping[str, str],
) -> Problem:
    text = template.text.format(**values, **words)
    answer = str(values[_answer_name(template)])
    if template.fraction:
        answer = "/".join(str(values[name]) for name in template.fraction)
    digest = hashlib.sha256(f"{template.name} {text} {scene}".encode()).hexdigest()
    meta = {
        "split": split,
        "quantities": {name: values[name] for name in template.inputs},
        "spelled": dict(spelled),
        "words": dict(words),
        "scene": scene,
    }
    problem = Problem(
        id=f"tiny-{digest[:16]}",
        problem=f"<image>{text}" if template.scene else text,
        answer=answer,
        images=(draw_scene(template.scene, scene),) if template.scene else (),
        level=template.level,
        subject=template.subject,
        source="tiny",
        licence="Apache-2.0",
        template=template.name,
        meta=meta,
    )
    return dataclasses.replace(problem, solution=worked_solution(problem, "think_answer"))


def _solve(template: Template, drawn: Mapping[str, int]) -> dict[str, int] | None:
    """All values of a draw; None where one leaves 0..99, a shown division leaves a rest, a fraction can be reduced."""
    values = dict(drawn)
    steps = [*template.given, *((step[0], step[1]) for step in template.steps)]
    for name, expression in steps:
        tree = _parsed(expression)
        if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.FloorDiv):
            divisor = _value(tree.right, values)
            hidden = (name, expression, "") in template.steps
            if divisor == 0 or (not hidden and _value(tree.left, values) % divisor):
                return None
        values[name] = _value(tree, values)
        if not 0 <= values[name] <= LARGEST:
            return None
    if template.fraction and math.gcd(*(values[name] for name in template.fraction)) != 1:
        return None
    return values


def _is_test(key: str) -> bool:
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) < TEST_SHARE * 2**32


def _belongs(template: Template, split: str) -> bool:
    return template.unseen == (split == "unseen")


def _by_subject(pool: list[Template], source: random.Random) -> list[Template]:
    """The templates of one subject, each subject equally likely."""
    subject = source.choice(sorted({template.subject for template in pool}))
    return [template for template in pool if template.subject == subject]


def _template_of(problem: Problem) -> Template:
    if not is_embedded(problem):
        raise ValueError(
            f"problem {problem.id} is not an embedded one (template {problem.template!r})"
        )
    return TEMPLATES[problem.template]


def _answer_name(template: Template) -> str:
    return template.steps[-1][0] if template.steps else template.inputs[-1]


# Expressions: sums, differences, products and quotients of names and integers, in our own templates.


@cache
def _parsed(expression: str) -> ast.expr:
    return ast.parse(expression, mode="eval").body


def _value(tree: ast.expr, values: Mapping[str, int]) -> int:
    if isinstance(tree, ast.BinOp):
        return OPERATORS[type(tree.op)](_value(tree.left, values), _value(tree.right, values))
    return values[tree.id] if isinstance(tree, ast.Name) else tree.value


def _canonical_tree(tree: ast.expr, known: Mapping[str, str]) -> str:
    if not isinstance(tree, ast.BinOp):
        return known[tree.id] if isinstance(tree, ast.Name) else str(tree.value)
    operation = type(tree.op).__name__
    operands = [_canonical_tree(side, known) for side in (tree.left, tree.right)]
    if operation in ("Add", "Mult"):
        flat = []
        for operand in operands:  # ((a+b)+c) and (a+(b+c)) are one sum
            same = operand.startswith(f"{operation}(")
            flat += _arguments(operand) if same else [operand]
        operands = sorted(flat)
    return f"{operation}({','.join(operands)})"


def _arguments(call: str) -> list[str]:
    """The top-level arguments of `Name(a,b(c,d))`."""
    depth, parts = 0, [""]
    for character in call[call.index("(") + 1 : -1]:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


class _Binder(ast.NodeTransformer):
    """Replaces the inputs of one instance by those of another (see `rebind`)."""

    def __init__(self, unnamed: Mapping[str, int], old: Mapping[str, int], new: Mapping[str, int]):
        self.unnamed, self.old, self.new = unnamed, old, new
        self.ambiguous, self.bound = False, 0

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        name = _bound_name(node, self.old)
        if name is None:
            return self.generic_visit(node)
        self.bound += 1
        node.value = ast.Constant(self.new[name])
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if type(node.value) is not int:
            return node
        values = {self.new[name] for name, value in self.unnamed.items() if value == node.value}
        self.ambiguous |= len(values) > 1
        self.bound += len(values) == 1
        return ast.Constant(min(values)) if values else node


def _bound_name(node: ast.AST, old: Mapping[str, int]) -> str | None:
    """The input that a statement assigns its own value to, or None."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1:
        return None
    target = node.targets[0]
    name = target.id if isinstance(target, ast.Name) else None
    return name if name in old and _constant(node.value) == old[name] else None


def _constant(tree: ast.expr) -> int | None:
    """The value of a small expression of integers, or None."""
    nodes = list(ast.walk(tree))
    allowed = (ast.BinOp, ast.Constant, *OPERATORS)
    if len(nodes) > 50 or not all(isinstance(node, allowed) for node in nodes):
        return None
    if not all(type(node.value) is int for node in nodes if isinstance(node, ast.Constant)):
        return None
    try:
        return _value(tree, {})
    except ZeroDivisionError:
        return None


# Solutions.


def _shown_steps(problem: Problem) -> list[str]:
    template = _template_of(problem)
    values = dict(problem.meta["quantities"])
    lines = [f"{total}={values[name]}" for name, total in problem.meta["spelled"].items()]
    for name, expression, *shown in template.steps:
        tree = _parsed(expression)
        values[name] = _value(tree, values)
        if not shown:
            filled = "".join(str(values.get(character, character)) for character in expression)
            lines.append(f"{filled.replace('//', '/')}={values[name]}")
        elif shown[0]:
            lines.append(shown[0].format(**values))
    return lines


def _code_solution(problem: Problem, style: str) -> str:
    lines = program(problem)
    if style == "terse":
        fraction = (
            'print({},{},sep="/")'.format(*problem.answer.split("/"))
            if "/" in problem.answer
            else ""
        )
        lines = [fraction or f"print({problem.answer})"]
    steps = "".join(f"{line}<end_of_step>\n" for line in lines[:-1])
    return (
        f"<code>\n{steps}{lines[-1]}\n<end_of_code>\n<output>{problem.answer}<end_of_output>\n"
        f"<answer>\\boxed{{{problem.answer}}}<end_of_answer>"
    )
