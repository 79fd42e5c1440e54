"""Steps: what counts as an answer, a program, a failure; each fault of the public code, and its absence by default."""

import pytest
from search_case import VECTORS, answer, candidate, run_snippet, searched, step

from smallmath_jax.search import rstar, steps
from smallmath_jax.search.interpreter import observe
from smallmath_jax.search.settings import SearchSettings, rstar_settings
from smallmath_jax.search.steps import CodeResult
from smallmath_jax.search.tree import LiveNode
from smallmath_jax.verify.sandbox.protocol import STATUSES, Result

ROOT = LiveNode()
SETTINGS = SearchSettings()


def shown(code):
    """What a program's output becomes: in compat, and by default."""
    policy = {"": [[f"<code>\n#@A\n{code}\n", "<end_of_code>"]], "A": [answer("B", 3)]}
    texts = []
    for settings in (rstar_settings(rollouts=1), SearchSettings(rollouts=1)):
        node = searched(policy, settings).nodes[1]
        texts.append(
            (node.text.partition("<output>")[2].removesuffix("<end_of_output>"), node.kind)
        )
    return texts


@pytest.mark.parametrize(
    ("code", "public", "ours"),
    [
        ("print('standard error: 0.3')", "error", "open"),  # the word is no failure
        ("print(1/0)", "error", "error"),
        ("import sys\nprint('ok')\nprint('a warning', file=sys.stderr)", "open", "open"),
    ],
)
def test_a_failure_is_a_status_and_no_word(code, public, ours):
    assert [kind for _, kind in shown(code)] == [public, ours]


@pytest.mark.parametrize(
    ("code", "public", "ours"),
    [
        ("print(1.23456789)", "1.2346", "1.23456789"),  # rounded to four decimals
        ("print(2/3)", "0.6667", "0.6666666666666666"),
        ("print(1)\nprint(2)", "1: 1\n2: 2", "1\n2"),  # labelled prints
        ("print(1)\nx = 2", "", "1"),  # only the last statement is heard
        ("print('e', end='')\nprint('f')", "'e', end='': e'f': f", "ef"),
        ("print('x' * 2000)", "x" * 512 + "..." + "x" * 511, "x" * 512 + "..." + "x" * 512),
    ],
)
def test_output_is_shown_as_it_was_printed(code, public, ours):
    assert [text for text, _ in shown(code)] == [public, ours]


def test_a_failure_is_wrapped_once():
    (public, _), (ours, _) = shown("print(1/0)")
    assert public == "<output>ZeroDivisionError: division by zero<end_of_output>"
    assert ours == "ZeroDivisionError: division by zero"


def test_an_answer_behind_the_first_sentence_is_found():
    text = "\n<answer>First part.\nThe answer is \\boxed{5}.\n<end_of_answer>"
    assert rstar.read_step(text).answer == "<answer>First part"
    assert steps.read_step(candidate(text[:-15], "<end_of_answer>")).answer == "5"


def test_the_word_boxed_in_code_is_no_answer():
    text = "\nx = 3 # boxed\n"
    assert rstar.read_step(text).kind == "answer"
    assert steps.read_step(candidate(text, "<end_of_step>")) == ("open", None, True)


def test_nothing_leaks_between_executions():
    policy = {
        "": [step("A", "<code>\nleaked = 42"), step("B", "<code>\nother = 1")],
        "A": [step("C", "print(leaked)", "<end_of_code>")],
        "B": [step("D", "print(leaked)", "<end_of_code>")],
    }
    shared = {}

    async def one_process(snippets):
        return [run_snippet(prefix, code, shared) for prefix, code in snippets]

    policy |= {"A/C": [], "B/D": []}
    compat = rstar_settings(rollouts=6, max_errors=1)
    found = (
        searched(
            policy, compat, run_code=one_process
        ),  # a compat search as the public code runs it
        searched(policy, compat),  # the same, every program in a process of its own
        searched(policy, SearchSettings(rollouts=6)),
    )
    kinds = [{node.text[3]: node.kind for node in tree.nodes[1:]} for tree in found]
    shown = [{node.text[3]: node.text for node in tree.nodes[1:]}["D"] for tree in found]
    clean = dict.fromkeys("ABC", "open") | {"D": "error"}
    assert kinds == [dict.fromkeys("ABCD", "open"), clean, clean]
    assert "42" in shown[0] and "NameError" in shown[1] and "42" not in shown[2]


def test_code_beside_its_marks_is_kept():
    for text, public, ours in [
        ("<code>x=1\ny=2\n<end_of_step>", "# ========\ny=2", "x=1\ny=2\n"),
        ("<code>\nz=1<end_of_code>", "# ========", "\nz=1"),
        ("\ny=2\n<end_of_step>", "y=2", "\ny=2\n"),
        (
            "\ny=2\n<end_of_code>\n<output>5<end_of_output>",
            "y=2\n\n<output>5<end_of_output>",
            "\ny=2\n",
        ),
    ]:
        if "<output>" not in text:
            assert rstar.extract_program(text) == public
        assert steps.code_of(text) == ours


def test_programs_hold_their_block_and_leave_failed_steps_out():
    def child(parent, text, status="ok"):
        return LiveNode(parent=parent, text=text, status=status, tag=parent.tag + ".1", kind="open")

    first = child(ROOT, "<code>\na = 1\n<end_of_step>")
    broken = child(first, "\nb = 1/0\n<end_of_step>", "error")
    assert steps.program(broken, "\nprint(a)\n<end_of_code>") == ("\na = 1\n", "\nprint(a)\n")
    assert "1/0" in rstar.program(broken, "\nprint(a)\n<end_of_code>")[1]
    ended = child(first, "\nprint(a)\n<end_of_code>\n<output>1<end_of_output>")
    assert steps.program(ended, "<code>\nprint(2)\n<end_of_step>") == ("", "\nprint(2)\n")
    assert steps.program(ROOT, "plain text") == ("", "plain text")


def test_a_policy_that_may_fail_twice_can_mend_its_step():
    policy = {
        "": [step("A", "x = 3")],
        "A": [step("B", "print(y)", "<end_of_code>")],
        "A/B": [["<code>\n#@C\nprint(3)\n", "<end_of_code>"]],
        "A/B/C": [answer("D", 3)],
    }
    tree = searched(policy, SearchSettings(max_errors=2))
    assert [node.errors for node in tree.nodes] == [0, 0, 1, 0, 0]
    assert tree.nodes[2].text.endswith("<output>NameError: name 'y' is not defined<end_of_output>")
    assert tree.nodes[-1].verdict == "correct"


def test_output_cannot_forge_marks():
    text = shown("print('1<end_of_output>\\n<answer>\\\\boxed{3}<end_of_answer>')")[1][0]
    assert text == "1< end_of_output>\n< answer>\\boxed{3}< end_of_answer>"
    assert shown("print('a < b <x>')")[1][0] == "a < b <x>"


def test_steps_that_lead_nowhere_are_invalid():
    read = lambda text, mark="", reason="": (
        steps.read_step(candidate(text, mark, reason=reason)).kind
    )
    assert read("x = 1", reason="length") == "invalid"  # ran into the limit
    assert read("\\boxed{3", reason="eos") == "invalid"
    assert read("so \\boxed{3}.", reason="eos") == "answer"
    assert read("so \\boxed{3} and", reason="length") == "invalid"
    assert read("\n<answer>\\boxed{}\n", "<end_of_answer>") == "invalid"
    assert read("\n<answer>7\n", "<end_of_answer>") == "answer"
    assert read("", "<end_of_step>") == "open"


def test_candidates_are_kept_once_and_answers_one_or_some():
    given = [
        candidate("a", "<end_of_step>"),
        candidate("a", "<end_of_step>"),
        candidate("a", "<end_of_code>"),
        candidate(" a", "<end_of_step>"),
    ]
    kept = steps.filter_candidates(given, SETTINGS)
    assert ([one.text for one in kept.candidates], kept.duplicates, kept.dropped) == (
        ["a<end_of_step>", "a<end_of_code>"],
        2,
        0,
    )
    answers = [candidate(*answer("x", value)) for value in (3, 3, 4, 5)] + given
    assert len(steps.filter_candidates(answers, SETTINGS).candidates) == 1
    several = steps.filter_candidates(answers, SearchSettings(answers_kept=2))
    assert [steps.read_step(one).answer for one in several.candidates] == ["3", "4"]
    assert (several.duplicates, several.dropped) == (3, 3)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("```python\nprint(1)\n```", "1\n"),
        ("1 + 1", "2"),
        ("x = 1", ""),
        ("", ""),
        ("for i in range(2):\n    print(i)\nprint(9)", "i: 0\n1\n9: 9\n"),
        ("if True:\n    if True:\n        print(5)", "5\n"),
        ("print(0.5)", "0.5\n"),
        ("print(3)", "3\n"),
        ("print(100000.00001)", "100000.0\n"),
        ("'3.14159'", "3.1416\n"),
        ("3.14159", "3.14159"),
        ("x = (", "SyntaxError: '(' was never closed (<unknown>, line 1)"),
        ("print(1)\nprint(2)\nx = 1/0", "1: 1\n2: 2\n"),
        ("print(undefined)", "NameError: name 'undefined' is not defined"),
        ("print('nan')", "nan\n"),
    ],
)
def test_what_the_public_interpreter_shows(code, expected):
    assert observe(code, {}) == expected
    assert run_snippet("", rstar.observing(code)).stdout == expected + "\n"


def test_a_killed_program_is_a_failure_in_both():
    async def killed(snippets):
        return [CodeResult("killed") for _ in snippets]

    policy = {"": VECTORS["error_text_double_wrap"]["input"]["policy"][""]}
    ours = searched(policy, SearchSettings(), run_code=killed)
    assert (ours.nodes[1].kind, ours.nodes[1].status) == ("error", "killed")
    assert ours.nodes[1].text.endswith("<output>killed<end_of_output>")
    public = searched(policy, rstar_settings(), run_code=killed)
    assert public.nodes[1].kind == "error" and "TimeoutError" in public.nodes[1].text


def test_the_sandbox_itself_gives_what_is_asked_of_it():
    assert {"status", "stdout", "stderr_tail"} <= set(Result.__dataclass_fields__)
    assert steps.OK in STATUSES
