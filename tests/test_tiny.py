"""Embedded problems and tokenizer: answers, programs, splits, twins, pictures, other instances, save and load."""

import contextlib
import dataclasses
import io
import json
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from smallmath_jax.data import tiny
from smallmath_jax.data.tiny_pictures import draw_scene
from smallmath_jax.data.tiny_templates import SUBJECTS, TEMPLATES
from smallmath_jax.data.tiny_tokenizer import learn_merges

QWEN_ADDED = (  # tokenizer_config.json of Qwen2.5-VL-3B-Instruct, ids 151643 to 151664
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()


def run(code):
    """What a program prints, run by Python itself."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue().strip()


def code_of(text):
    """The program of a code_steps solution, cut out by its marks."""
    body = re.fullmatch(r"<code>\n(.*)\n<end_of_code>\n<output>.*", text, re.S).group(1)
    return body.replace("<end_of_step>", "")


@pytest.fixture(scope="module")
def problems():
    return {split: tiny.tiny_problems(split, 400, seed=5) for split in tiny.SPLITS}


def by_template(problems):
    found = {}
    for problem in [p for rows in problems.values() for p in rows]:
        found.setdefault(problem.template, problem)
    return found


def test_every_template_is_drawn_and_its_program_prints_the_answer(problems):
    assert set(by_template(problems)) == set(TEMPLATES)
    for rows in problems.values():
        for problem in rows:
            for style in tiny.STYLES:
                text = tiny.worked_solution(problem, "code_steps", style)
                assert run(code_of(text)) == problem.answer, problem
                assert f"<output>{problem.answer}<end_of_output>" in text
                assert text.endswith(f"<answer>\\boxed{{{problem.answer}}}<end_of_answer>")


def test_every_shown_step_is_true_and_leads_to_the_answer(problems):
    for problem in [p for rows in problems.values() for p in rows]:
        text = tiny.worked_solution(problem, "think_answer")
        steps, answer = re.fullmatch(
            r"<think>Steps:\n(.*)</think><answer>(.*)</answer>", text, re.S
        ).groups()
        assert text.startswith(tiny.WORKED_PREFIX) and text == problem.solution
        assert answer == problem.answer
        for line in steps.split("\n"):
            left, right = line.split("=")
            assert eval(re.sub(r"(\d+)", r"Fraction(\1)", left)) == Fraction(right), text
        last = steps.split("=")[-1]
        assert last == answer or answer.endswith(f"/{last}")
        terse = tiny.worked_solution(problem, "think_answer", "terse")
        assert terse == f"<think>Quick</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    "name, numbers, expected",
    [  # worked by hand
        ("share", {"a": 20, "n": 2, "k": 8, "m": 4}, "9"),
        ("solve_both", {"k": 5, "a": 13, "j": 3, "b": 17}, "2"),
        ("half_area", {"p": 14, "w": 5}, "10"),
        ("remainder_both", {"a": 8, "b": 4, "c": 12, "k": 7}, "2"),
        ("same_color", {"a": 4, "b": 3}, "9"),
        ("multiple", {"k": 9, "a": 78}, "72"),
        ("function", {"k": 7, "a": 3, "m": 4, "c": 10}, "21"),
        ("pairs", {"n": 5}, "10"),
    ],
)
def test_templates_compute_what_they_say(problems, name, numbers, expected):
    problem = by_template(problems)[name]
    changed = {**problem.meta, "quantities": numbers, "spelled": {}}
    assert run("\n".join(tiny.program(dataclasses.replace(problem, meta=changed)))) == expected


def test_subjects_levels_and_pictures_are_balanced():
    rows = tiny.tiny_problems("train", 1000, seed=1)
    subjects = Counter(problem.subject for problem in rows)
    levels = Counter(problem.level for problem in rows)
    assert set(subjects) == set(SUBJECTS) and set(levels) == {1, 2, 3, 4, 5}
    assert min(subjects.values()) > 70 and min(levels.values()) > 80
    assert 0.28 < np.mean([bool(problem.images) for problem in rows]) < 0.38
    text_only = tiny.tiny_problems("train", 50, seed=1, image_share=0)
    assert not any(problem.images for problem in text_only)
    assert {t.scene for t in TEMPLATES.values()} == {None, "squares", "rectangle", "bars", "point"}


def test_problems_depend_on_the_seed_alone():
    first, again = (tiny.tiny_problems("train", 40, seed=3) for _ in range(2))
    assert first == again
    assert first[:10] == tiny.tiny_problems("train", 10, seed=3)
    assert {p.id for p in first} != {p.id for p in tiny.tiny_problems("train", 40, seed=4)}


def test_metadata_survives_json(problems):
    for problem in by_template(problems).values():
        again = dataclasses.replace(problem, meta=json.loads(json.dumps(problem.meta)))
        for grammar in tiny.GRAMMARS:
            assert tiny.worked_solution(again, grammar) == tiny.worked_solution(problem, grammar)


def key_of(problem):
    return tiny.canonical(
        TEMPLATES[problem.template], problem.meta["quantities"], problem.meta["scene"]
    )


def test_splits_share_no_canonical_problem(problems):
    keys = {split: {key_of(problem) for problem in rows} for split, rows in problems.items()}
    assert not keys["train"] & (keys["test"] | keys["unseen"])
    shown = {problem.template for problem in [*problems["train"], *problems["test"]]}
    hidden = {problem.template for problem in problems["unseen"]}
    assert not shown & hidden
    assert len(hidden) >= 5 and len({TEMPLATES[name].subject for name in hidden}) == 5


def test_twins_are_one_canonical_problem():
    name = lambda template, **numbers: tiny.canonical(TEMPLATES[template], numbers, "")
    assert (
        name("buy", a=12, b=7)
        == name("buy", a=7, b=12)
        == name("solve_less", k=1, a=1, b=1).replace("FloorDiv(Add(1,1),1)", "Add(12,7)")
    )
    assert name("triangle", a=5, b=6, c=7) == name("triangle", a=7, b=5, c=6)
    assert name("lose", a=30, b=7) != name("lose", a=31, b=7)
    assert name("lose", a=30, b=7) == name("solve_sum", a=7, b=30)
    assert name("area", w=3, h=8) == name("outfits", a=8, b=3)
    assert name("solve_both", k=5, a=13, j=3, b=17) != name("solve_both", k=5, a=13, j=4, b=17)


def test_reinstantiated_problems_have_the_same_form(problems):
    for problem in by_template(problems).values():
        other = tiny.reinstantiate(problem, seed=1)
        assert other == tiny.reinstantiate(problem, seed=1)
        assert other.id != problem.id and other.answer != problem.answer
        assert other.template == problem.template and other.meta["split"] == problem.meta["split"]
        assert other.meta["words"] == problem.meta["words"]
        strip = lambda text: re.sub(r"\d+", "#", text)
        assert strip(other.problem) == strip(problem.problem)
        assert bool(other.images) == bool(problem.images)
        assert run("\n".join(tiny.program(other))) == other.answer


def test_programs_are_rebound_to_other_instances(problems):
    for problem in by_template(problems).values():
        other = tiny.reinstantiate(problem, seed=2)
        code = "\n".join(tiny.program(problem))
        assert run(tiny.rebind(code, problem, other)) == other.answer, code


def test_a_program_right_by_luck_is_found_out():
    problem = next(p for p in tiny.tiny_problems("train", 200, 0) if p.template == "bags_lose")
    numbers = {"n": 4, "k": 5, "c": 7}  # 4 * 5 - 7 = 13
    problem = dataclasses.replace(
        problem, answer="13", meta={**problem.meta, "quantities": numbers}
    )
    other = dataclasses.replace(
        problem, answer="38", meta={**problem.meta, "quantities": {"n": 6, "k": 7, "c": 4}}
    )
    honest = "bags=4\nper=5\nprint(bags*per-7)"
    lucky = "n=4\nk=5\nprint(n+k+4)"
    assert run(honest) == run(lucky) == "13"
    assert run(tiny.rebind(honest, problem, other)) == "38"
    assert run(tiny.rebind(lucky, problem, other)) != "38"
    own = "n=4\nk=5\nc=7\nprint(n*k-c+4-2*2)"  # the program's own 4 is no input
    assert run(own) == "13" and run(tiny.rebind(own, problem, other)) == "38"
    assert tiny.rebind("print(13)", problem, other) is None  # reads nothing of the problem
    assert tiny.rebind("print(", problem, other) is None
    assert tiny.rebind("n=2**99999999", problem, other) is None  # never computed
    twice = dataclasses.replace(
        problem, meta={**problem.meta, "quantities": {"n": 4, "k": 4, "c": 3}}
    )
    assert tiny.rebind("print(4*4-3)", twice, other) is None  # which 4 is which
    assert run(tiny.rebind("n=4\nk=4\nc=3\nprint(n*k-c)", twice, other)) == "38"


def test_foreign_problems_and_unknown_names_are_refused(problems):
    foreign = dataclasses.replace(problems["train"][0], template=None)
    with pytest.raises(ValueError, match="not an embedded one"):
        tiny.reinstantiate(foreign, 0)
    with pytest.raises(ValueError, match="known: train, test, unseen"):
        tiny.tiny_problems("dev", 1, 0)
    with pytest.raises(ValueError, match="known: think_answer"):
        tiny.worked_solution(problems["train"][0], "prose")


def pixels_of(kind, scene):
    with Image.open(io.BytesIO(draw_scene(kind, scene))) as image:
        assert image.mode == "RGB" and image.size == (56, 56)
        return np.asarray(image).astype(int)


def test_pictures_show_what_their_scene_says(problems):
    """Counted and measured from the pixels."""
    scene = "r..b" + "...." + ".bb." + "r..."
    red, blue = ((pixels_of("squares", scene) == color).all(-1) for color in tiny_colors())
    patches = lambda mask: (mask.reshape(4, 14, 4, 14).sum((1, 3)) > 0).reshape(-1)
    assert (
        "".join(
            "r" if r else "b" if b else "."
            for r, b in zip(patches(red), patches(blue), strict=True)
        )
        == scene
    )

    bars = (pixels_of("bars", "3 9 1 5") != 255).any(-1)
    assert [(bars[:, 14 * i + 5].sum() - 1) / 5 for i in range(4)] == [3, 9, 1, 5]

    point = (pixels_of("point", "6 2") == tiny_colors()[0]).all(-1)
    rows, columns = np.nonzero(point)
    assert ((columns.mean() - 3) / 7, (52 - rows.mean()) / 7) == (6, 2)

    number = (pixels_of("rectangle", "12 4") == 0).all(-1)
    alone = (pixels_of("rectangle", "2 4") == 0).all(-1)
    assert number[44:54, 14:27].sum() > alone[44:54, 14:27].sum() > 0
    assert (number[16:26, 42:48] == alone[16:26, 42:48]).all()  # the height's label
    for problem in problems["train"]:
        if problem.template == "squares":
            assert problem.answer == str(16 - problem.meta["scene"].count("."))


def tiny_colors():
    return np.array([220, 30, 30]), np.array([30, 60, 220])


def test_merges_follow_byte_pair_encoding():
    # Sennrich et al. (2016): e s, es t, then l o; ties by name
    words = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
    assert learn_merges(words, 4) == [("e", "s"), ("es", "t"), ("l", "o"), ("lo", "w")]
    assert learn_merges({"aa": 1}, 9) == [("a", "a")]


def test_tokenizer_is_qwens_in_small(problems):
    tokenizer = tiny.tiny_tokenizer()
    size = len(tokenizer)
    assert tokenizer.convert_ids_to_tokens(range(size - 22, size)) == QWEN_ADDED
    assert size <= 700 and (tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert tokenizer.tokenize("12+345") == ["12", "+", "34", "5"]
    for text in ("Crème brûlée 漢字 \t\n\n  x", "<|im_start|>user\nhi<|im_end|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    words = {
        word
        for t in TEMPLATES.values()
        for word in re.findall(r"[a-zA-Z]{3,}", re.sub(r"{.*?}", "", t.text))
    }
    for word in words - {"What", "How", "Find", "Each", "Solve", "Let"}:
        assert len(tokenizer.tokenize(" " + word)) == 1, word
    for first in ("What", "How", "Find", "Each", "Solve", "Let", "<think", "</", "answer"):
        assert len(tokenizer.tokenize(first)) == 1, first


def test_prompts_and_solutions_are_short(problems):
    tokenizer = tiny.tiny_tokenizer()
    length = lambda text: len(tokenizer(text)["input_ids"])
    for problem in [p for rows in problems.values() for p in rows]:
        images = [{"type": "image"}] if problem.images else []
        words = {"type": "text", "text": problem.problem.removeprefix("<image>")}
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": [*images, words]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        assert chat.endswith("<|im_start|>assistant\n") and chat.count("<|image_pad|>") == len(
            images
        )
        assert length(chat) + 3 * len(images) <= 40
        assert length(problem.solution) <= 48
        prefix, rest = tiny.WORKED_PREFIX, problem.solution.removeprefix(tiny.WORKED_PREFIX)
        assert length(prefix) + length(rest) == length(
            problem.solution
        )  # forcing it splits no token


def test_tokenizer_saves_and_loads(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tiny.tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<think>Steps:\n12+7=19</think><answer>19</answer><|im_end|>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    turn = [{"role": "user", "content": "Solve x+1=2."}]
    rendered = loaded.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nSolve x+1=2.<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
