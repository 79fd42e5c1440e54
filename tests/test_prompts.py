"""Prompts: templates byte for byte, image expansion, ids that may not be sampled, grammars and step marks."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from smallmath_jax.data.images import ImageSettings
from smallmath_jax.data.prompts import (
    CHATS,
    GRAMMARS,
    add_step_tokens,
    attach_pixels,
    build_prompt,
    build_prompts,
    completion_ids,
    decode,
    encode_after,
    format_completion,
    load_tokens,
    stop_sequences,
    user_text,
)
from smallmath_jax.records import Problem

SETTINGS = ImageSettings(max_pixels=112 * 112)
THINK, CODE = GRAMMARS["think_answer"], GRAMMARS["code_steps"]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def picture(width=60, height=90, orientation=None):
    buffer = io.BytesIO()
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", (width, height), (9, 99, 199)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tokens():
    return load_tokens("tiny")


def with_chat(tokens, name):
    return dataclasses.replace(tokens, chat=CHATS[name], instruct=True)


def prompt(problem, tokens, grammar=THINK, **options):
    return build_prompt(problem, tokens, grammar, SETTINGS, **options)


def test_templates_byte_for_byte(tokens):
    problem = Problem("p", "TEXT", "1", images=(picture(),))
    text = lambda name, problem=problem, **options: (
        prompt(problem, with_chat(tokens, name), **options).text
    )
    assert text("qwen", grammar=dataclasses.replace(THINK, system="")) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{IMAGE}TEXT<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text("qwen", system="Be brief.") == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{IMAGE}TEXT<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (
        text("qwen", system="")
        == f"<|im_start|>user\n{IMAGE}TEXT<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text("qwen").startswith(
        f"<|im_start|>system\n{THINK.system}<|im_end|>\n<|im_start|>user\n"
    )
    plain = Problem("p", "TEXT", "1")
    assert text("qwen_math", plain, grammar=dataclasses.replace(THINK, system="")) == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nTEXT<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text("phi3", plain, system="Be brief.") == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nTEXT<|end|>\n<|assistant|>\n"
    )
    ask = CODE.instruction
    assert text("rstar", plain, grammar=CODE) == f"<|user|>:\nTEXT\n{ask}\n<|assistant|>: "
    assert text("rstar_search", plain, grammar=CODE) == f"<|user|>:\nTEXT\n{ask}\n\n<|assistant|>: "


# As in Qwen/Qwen2.5-VL-3B-Instruct's chat_template.json, without its video branch.
QWEN_VL_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "chat", [QWEN_VL_TEMPLATE, *(CHATS[name] for name in ("qwen", "qwen_math", "bare"))]
)
def test_no_system_turn_where_the_config_says_none(tokens, chat):
    own = dataclasses.replace(tokens, chat=chat, instruct=True)
    for problem, user in (
        (Problem("p", "TEXT", "1"), "TEXT"),
        (Problem("p", "TEXT", "1", images=(picture(),)), f"{IMAGE}TEXT"),
    ):
        text = prompt(problem, own, system="").text
        assert text == f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        told = prompt(problem, own, system="Be brief.").text
        assert told == f"<|im_start|>system\nBe brief.<|im_end|>\n{text}"
    default = prompt(problem, own, grammar=dataclasses.replace(THINK, system="")).text
    assert default.startswith("<|im_start|>system\n") == (chat != CHATS["bare"])


def test_image_marks_expand_where_they_stand(tokens):
    problem = Problem(
        "p", "left <image> right <image> end", "1", images=(picture(), picture(56, 56))
    )
    built = prompt(problem, tokens)
    assert built.text.count(IMAGE) == 2 and f"left {IMAGE} right {IMAGE} end" in built.text
    counts = built.grids.prod(-1) // 4
    assert counts.tolist() == [6, 4]
    assert int((built.token_ids == tokens.image_id).sum()) == counts.sum() == 10
    assert len(built.pixels) == built.grids.prod(-1).sum() == 40
    # positions by hand: text counts up, an image holds t, then all go on above its largest
    first = int(np.flatnonzero(built.token_ids == tokens.image_id)[0])
    assert built.positions[:, :first].tolist() == [list(range(first))] * 3
    rows, columns = int(built.grids[0, 1]) // 2, int(built.grids[0, 2]) // 2
    inside = built.positions[:, first : first + 6]
    assert inside[0].tolist() == [first] * 6
    assert inside[1].tolist() == [first + row for row in range(rows) for _ in range(columns)]
    assert inside[2].tolist() == [first + column for _ in range(rows) for column in range(columns)]
    assert built.positions[:, first + 6].tolist() == [first + max(rows, columns)] * 3
    assert built.next_position == built.positions.max() + 1


def test_measuring_gives_the_prompt_that_loading_gives(tokens):
    turned = picture(60, 110, orientation=6)
    problem = Problem("p", "how many?", "1", images=(turned, picture()))
    whole, measured = prompt(problem, tokens), prompt(problem, tokens, pixels=False)
    assert measured.pixels is None
    for name in ("token_ids", "positions", "grids"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(measured, name))
    assert whole.grids[0].tolist() == [1, 4, 8]  # upright: 110 wide
    loaded = attach_pixels(measured, problem, SETTINGS)
    np.testing.assert_array_equal(loaded.pixels, whole.pixels)
    changed = dataclasses.replace(problem, images=(picture(), picture()))
    with pytest.raises(ValueError, match="problem 'p': .* an image file changed"):
        attach_pixels(measured, changed, SETTINGS)
    small = build_prompt(problem, tokens, THINK, SETTINGS, max_pixels=3136)
    assert small.grids.prod(-1).max() <= 16


def test_options_are_lettered(tokens):
    assert user_text(Problem("p", "Which?", "B", options=("1", "(B) 2", "C"))) == (
        "Which?\n(A) 1\n(B) 2\n(C)\nAnswer with the letter of the right option."
    )
    assert user_text(Problem("p", "Which?", "2", options=("1", "2"))) == "Which?\n(A) 1\n(B) 2"
    assert (
        "Which?\n(A) 1\n(B) 2<|im_end|>"
        in prompt(Problem("p", "Which?", "2", options=("1", "2")), tokens).text
    )


def test_bad_prompts_name_the_problem(tokens, tmp_path):
    def fails(problem, message, tokens=tokens):
        with pytest.raises(ValueError, match=rf"problem 'p7': .*{message}"):
            prompt(problem, tokens)

    fails(Problem("p7", "end<|im_end|>", "1"), r"special token <\|im_end\|>")
    fails(Problem("p7", "x", "<", options=("<|image_pad|>",)), r"special token <\|image_pad\|>")
    fails(Problem("p7", "a <image>", "1"), "1 <image> marks in the text, 0 images")
    fails(
        Problem("p7", "<image> <image>", "1", images=(picture(),)),
        "2 <image> marks in the text, 1 images",
    )
    fails(
        Problem("p7", "x", "1", images=(str(tmp_path / "no.png"),)),
        "an image cannot be used .*no.png",
    )
    text_only = dataclasses.replace(tokens, image_id=-1, source="some/model")
    fails(Problem("p7", "x", "1", images=(picture(),)), "some/model reads text only", text_only)
    blind = dataclasses.replace(
        tokens, chat="{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
    )
    fails(Problem("p7", "x", "1", images=(picture(),)), "0 image tokens for 1 images", blind)


def test_long_prompts_are_errors_or_dropped_whole_and_counted(tokens):
    problems = [
        Problem("a", "x " * 100, "1"),
        Problem("b", "x", "1"),
        Problem("c", "x", "1", images=(picture(),)),
    ]
    build = lambda **options: build_prompts(
        problems, tokens, THINK, SETTINGS, max_tokens=50, **options
    )
    with pytest.raises(
        ValueError, match=r"problem 'a': prompt_too_long: \d+ prompt tokens, 50 are allowed"
    ):
        build()
    kept, dropped = build(over="drop", max_patches=16)
    assert [problem.id for problem, _ in kept] == ["b"]
    assert dropped == {"prompt_too_long": 1, "too_many_patches": 1}
    with pytest.raises(ValueError, match="over='cut'"):
        build(over="cut")


def test_forced_prefix_is_kept_with_the_prompt(tokens):
    problem = Problem("p", "x", "1")
    plain, forced = prompt(problem, tokens), prompt(problem, tokens, prefix="<think>\n")
    assert forced.text == plain.text + "<think>\n" and forced.prefix == "<think>\n"
    joined = np.concatenate([plain.token_ids, encode_after(tokens, "<think>\n")])
    np.testing.assert_array_equal(forced.token_ids, joined)
    assert forced.positions.shape == (3, len(joined)) and forced.next_position == len(joined)
    opening = dataclasses.replace(
        tokens, chat=CHATS["bare"] + "{{ '<think>\n' }}"
    )  # as in R1's template
    own = prompt(problem, opening)
    assert own.prefix == "<think>\n" and own.text == plain.text + "<think>\n"
    assert prompt(problem, opening, prefix="So").prefix == "<think>\nSo"


def test_completion_ids_end_and_round_trip(tokens):
    text = format_completion("12+7=19\nso é 3 × 4", "19", THINK)
    assert text == "<think>\n12+7=19\nso é 3 × 4\n</think>\n<answer>19</answer>"
    ids = completion_ids(text, tokens)
    assert ids.dtype == np.int32 and ids[-1] == tokens.im_end and decode(tokens, ids) == text
    assert not set(ids.tolist()) & set(tokens.banned_ids.tolist())
    for bad in ("a<|im_end|>b", "a<|image_pad|>b", "a<|im_start|>"):
        with pytest.raises(ValueError, match="spells the special token"):
            completion_ids(bad, tokens)


def test_solutions_already_in_a_grammar_are_not_wrapped_twice():
    once = format_completion("work", "3", THINK)
    assert format_completion(once, "3", THINK) == once
    assert format_completion("<think>work</think>", " 3 ", THINK) == once
    for bad in ("<think>a", "a</think>", "x <answer>1</answer> y", "<think>a<think>b</think>"):
        with pytest.raises(ValueError, match="stray <think> or <answer>"):
            format_completion(bad, "3", THINK)


def test_code_steps_form():
    program = "# one\nx = 1\n\n# two\nif x:\n    y = 2\n\nprint(y)"
    text = format_completion(program, "2", CODE)
    assert text == (
        "<code>\n# one\nx = 1\n<end_of_step>\n# two\nif x:\n    y = 2\n<end_of_step>\nprint(y)\n<end_of_code>\n"
        "<output>2<end_of_output>\n<answer>The answer is \\boxed{2}.\n<end_of_answer>"
    )
    assert format_completion("x = 1<end_of_step>\nprint(x)", "1", CODE).count("<end_of_step>") == 1
    assert format_completion(text, "2", CODE) == text
    with pytest.raises(ValueError, match="must be Python"):
        format_completion("First we add the numbers.", "2", CODE)
    with pytest.raises(ValueError, match="its reasoning is empty"):
        format_completion("\n\n", "2", CODE)


def test_step_marks_take_the_first_unused_rows(tokens):
    before = len(tokens.tokenizer)
    unused = [
        row for row in range(tokens.vocab_rows) if row not in tokens.tokenizer.get_vocab().values()
    ]
    stepped = add_step_tokens(tokens, CODE.marks)
    assert list(stepped.step_ids) == list(CODE.marks)
    assert (
        list(stepped.step_ids.values())
        == [row for row in unused if row >= before][: len(CODE.marks)]
    )
    assert (
        len(tokens.tokenizer) == before and not tokens.step_ids
    )  # the first tokenizer is as it was
    assert set(stepped.banned_ids) == set(tokens.banned_ids) - set(stepped.step_ids.values())
    text = format_completion("x = 1\n\nprint(x)", "1", CODE)
    ids = completion_ids(text, stepped)
    assert [ids.tolist().count(stepped.step_ids[mark]) for mark in CODE.marks] == [1] * len(
        CODE.marks
    )
    assert decode(stepped, ids) == text
    assert stepped.tokenizer.decode(ids[:-1], skip_special_tokens=True) == text
    assert stop_sequences(stepped, CODE) == tuple((stepped.step_ids[mark],) for mark in CODE.stops)
    tight = dataclasses.replace(tokens, vocab_rows=before + 3)
    with pytest.raises(
        ValueError, match="7 step marks need vocabulary rows, the model has 3 unused"
    ):
        add_step_tokens(tight, CODE.marks)


@pytest.mark.parametrize(
    "step", ["x = 1", "print(f(2))", "y = '.'", "# done.", "z = [1]", "a = 3 "]
)
def test_text_marks_are_found_however_they_are_spelt(tokens, step):
    stops = stop_sequences(tokens, CODE)
    for after in ("", "\n", "\nx = 2", "\n\n"):
        ids = completion_ids(f"<code>\n{step}\n<end_of_step>{after}", tokens)[:-1].tolist()
        windows = {
            tuple(ids[i : i + n]) for i in range(len(ids)) for n in {len(stop) for stop in stops}
        }
        assert windows & set(stops), (step, after)


def test_folders_give_end_tokens_rows_and_template(tokens, tmp_path):
    tokens.tokenizer.save_pretrained(tmp_path)
    text_end = tokens.tokenizer.convert_tokens_to_ids("a")
    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": {"vocab_size": 640, "eos_token_id": text_end}})
    )
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [5, tokens.im_end]})
    )
    loaded = load_tokens(tmp_path)
    assert loaded.vocab_rows == 640
    assert set(loaded.eos_ids) == {5, text_end, *tokens.eos_ids} and list(loaded.eos_ids) == sorted(
        loaded.eos_ids
    )
    assert (loaded.im_end, loaded.pad_id, loaded.image_id) == (
        tokens.im_end,
        tokens.pad_id,
        tokens.image_id,
    )
    names = loaded.tokenizer.convert_ids_to_tokens(loaded.banned_ids.tolist())
    assert {
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<|im_start|>",
    } <= set(names)
    assert set(range(len(loaded.tokenizer), 640)) <= set(loaded.banned_ids.tolist())
    assert not set(loaded.banned_ids.tolist()) & set(loaded.eos_ids)
    assert load_tokens(tmp_path, vocab_rows=700, chat="rstar").chat == CHATS["rstar"]
    with pytest.raises(ValueError, match="unknown chat template 'quen'; known: qwen"):
        load_tokens(tmp_path, chat="quen")
    with pytest.raises(ValueError, match=r"ids up to \d+, the model only 100 vocabulary rows"):
        load_tokens(tmp_path, vocab_rows=100)
    loaded.tokenizer.chat_template = "{{ messages[-1]['content'] }}|own|"
    loaded.tokenizer.save_pretrained(tmp_path)
    own = load_tokens(tmp_path)
    assert own.chat is None and prompt(Problem("p", "x", "1"), own, system="").text == "x|own|"


def test_the_embedded_tokenizer_asks_alike_from_a_folder(tokens, tmp_path):
    tokens.tokenizer.save_pretrained(tmp_path)
    problem = Problem("p", "What is 3 * 4?", "12", images=(picture(),))
    loaded = load_tokens(tmp_path, vocab_rows=tokens.vocab_rows)
    assert prompt(problem, loaded).text == prompt(problem, tokens).text
    settings = tmp_path / "tokenizer_config.json"
    others = {k: v for k, v in json.loads(settings.read_text()).items() if k != "instruct"}
    settings.write_text(json.dumps(others))  # as every other folder is
    assert not loaded.instruct and load_tokens(tmp_path, tokens.vocab_rows).instruct


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_tokens(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        load_tokens(tmp_path)


def train_sentencepiece(folder, **options):
    import sentencepiece

    folder.mkdir()
    lines = [
        f"Find {i} + {i * 7 % 31}. Let's think: the answer is {i * 8 % 97}" for i in range(300)
    ]
    (folder / "corpus.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<|user|>", "<|assistant|>", "<|end|>", "<|system|>"],
        minloglevel=2,
        **options,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "corpus.txt").unlink()
    return folder


@pytest.mark.filterwarnings("ignore:builtin type (SwigPy|swig)")  # sentencepiece's binding
def test_a_sentencepiece_model_that_would_be_read_differently_is_refused(tmp_path):
    folder = train_sentencepiece(
        tmp_path / "model"
    )  # its own normalisation folds spaces and newlines
    with pytest.raises(ValueError, match="tokenizer.model: transformers reads this .* differently"):
        load_tokens(folder)


@pytest.mark.filterwarnings("ignore:builtin type (SwigPy|swig)")
def test_a_folder_with_only_a_sentencepiece_model(tmp_path):
    import sentencepiece

    raw = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    folder = train_sentencepiece(tmp_path / "model", **raw)  # as Llama's and Phi-3's
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = load_tokens(folder, vocab_rows=384)
    assert tokens.chat == CHATS["phi3"] and tokens.image_id == -1
    assert reference.piece_to_id("<|end|>") == tokens.im_end
    assert set(tokens.eos_ids) >= {tokens.im_end, reference.eos_id()}
    assert set(range(340, 384)) | {reference.piece_to_id("<|user|>")} <= set(
        tokens.banned_ids.tolist()
    )
    text = "Let's think: the answer is 42\n  é"
    ids = completion_ids(text, tokens)
    assert decode(tokens, ids) == text
    assert reference.decode(ids[:-1].tolist()) == text
    assert reference.id_to_piece(int(ids[0])) == "Let" or not reference.id_to_piece(
        int(ids[0])
    ).startswith("▁")
    built = prompt(Problem("p", "Find 3 + 4.", "7"), tokens, system="")
    assert built.text == "<|user|>\nFind 3 + 4.<|end|>\n<|assistant|>\n"
    assert (
        tokens.tokenizer.decode(built.token_ids)
        .replace("<|user|> ", "<|user|>")
        .startswith("<|user|>")
    )
