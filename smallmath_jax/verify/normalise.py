r"""Text to tokens: one reading of spellings, identical for gold and answer.

Delimiters ($ \( \[, \left, sizes, spaces, display environments) vanish, spellings of one thing become one token
(\dfrac and \frac, unicode and LaTeX, ** and ^, `^\circ` and degrees), numbers lose their thousands marks. Two answers
whose tokens agree are equal; everything else is for the parser. No input makes this more than linear.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from smallmath_jax.verify import spelling, units

LIMIT = 2_000  # characters of an answer
TOKENS = 1_200


class Unreadable(ValueError):
    """An answer this grammar does not cover; the message says why."""


class Token(NamedTuple):
    """kind: num | let | fn | word | op | unk. `text` is canonical; `gap` tells white space before the token."""

    kind: str
    text: str
    gap: bool = False


_GROUP = r"(?:,(?:\\!)+\s*|\{,\}\s*|(?:\\!)+,|\\,\s*|\{\\,\})"
_SCAN = re.compile(
    rf"""
    (?P<space>[\s~$]+|\\[,!;:>\ ()\[\]]|\\$|\\(?=\d))
  | (?P<repeat>\d*\.\d*(?:\\(?:overline|bar|dot)\s*(?:\{{\d+\}}|\d)|\(\d+\)))
  | (?P<dots>\d+\.\d{{2,}}\s*(?:\.\.\.|\\[lc]?dots))
  | (?P<grouped>\d{{1,3}}(?:{_GROUP}\d{{3}})+(?!\d)(?:\.\d+)?)
  | (?P<comma>\d{{1,3}}(?:,\d{{3}})+(?!\d)(?:\.\d+)?)
  | (?P<decimal>\d+\{{,\}}\d+)
  | (?P<num>(?:\d+(?:\.\d+|\.(?=[)\]}}]))?|\.\d+)(?:[eE][-+]?\d{{1,6}}(?![A-Za-z\d]))?)
  | (?P<degree>\^\s*(?:\{{\s*\\(?:circ|degree)\s*\}}|\\(?:circ|degree)(?![A-Za-z]))|\\degree(?![A-Za-z]))
  | (?P<prime>'+|\^\s*(?:\{{(?:\s*\\prime)+\s*\}}|\\prime(?![A-Za-z])))
  | (?P<row>\\\\(?:\[[-\d.]{{1,6}}\s*[a-z]{{2}}\])?)
  | (?P<begin>\\(?:begin|end)\s*\{{[A-Za-z]{{1,16}}\*?\}})
  | (?P<escaped>\\[{{}}%$\#&_|])
  | (?P<cmd>\\[A-Za-z]+)
  | (?P<run>[A-Za-z]+)
  | (?P<two><=|>=|!=|<>|\*\*|->|=>|:=|==|\.\.\.)
  | (?P<one>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_PHRASE = re.compile(
    r"^(?:(?:so|thus|therefore|hence),?\s+)?(?:(?:the|our|my)\s+)?(?:final\s+|correct\s+)?"
    r"(?:answer|solution|result|value|option|choice)s?\s*(?:(?:is|are|equals)\b\s*:?|:|=)\s*",
    re.IGNORECASE,
)
_SOLUTION = re.compile(r"^(?:(?:the)?solutions?(?:is|are|setis)):?", re.IGNORECASE)
_PYTHON_LIST = re.compile(r"\[\s*(?:'[^']{0,200}'\s*,?\s*){1,40}\]")
_BASE = re.compile(
    r"[\s,]*(?:\\(?:text|mathrm|mbox)\s*\{\s*)?\(?\s*(?:in\s+)?base[\s}-]*(\d{1,2}|[a-z]{3,7})\s*\)?\s*\}?\)?$",
    re.IGNORECASE,
)
_NEXT_STATEMENT = re.compile(
    r"(?<=[^\s,;&\\])\s*(?:\n|\\q?quad)\s*(?=[A-Za-z](?:_\{?\w\}?)?'?\s*=)"
)
_TURNED = re.compile(r"([\[\]])([^\[\](){}]{1,60},[^\[\](){}]{1,60})([\[\]])")
_SPACED = re.compile(r"([-+]?)(\d{1,3}(?: \d{3})+)(\.\d+)?")
_HALVES = re.compile(r"\b([AaPp])\.\s?[Mm]\b\.?")


def clean(text: str) -> str:
    """An answer without its wrapping: unicode spelt in LaTeX, "the answer is", quotes, markdown and boxes gone."""
    if len(text) > LIMIT:
        raise Unreadable(f"longer than {LIMIT} characters")
    text = spelling.to_latex(text).strip()
    if "####" in text:
        text = text.rpartition("####")[2].strip()
    text = _unwrapped(text)
    if _PYTHON_LIST.fullmatch(text):  # "['3', '-3']", as some collections print several answers
        return ", ".join(part.strip() for part in re.findall(r"'([^']*)'", text)).replace(
            "\\\\", "\\"
        )
    text = text.strip('`"* \n\t')
    for pattern in (_PHRASE, _SOLUTION):
        match = pattern.match(text)
        if match and text[match.end() :].strip(" .$"):
            text = text[match.end() :]
    if "\\begin" not in text:
        text = _NEXT_STATEMENT.sub(", ", text)
    base = _BASE.search(text[-40:]) if "base" in text.lower() else None
    if base and (base.group(1).isdigit() or base.group(1).lower() in spelling.NUMBER_WORDS):
        digits = spelling.NUMBER_WORDS.get(base.group(1).lower(), base.group(1))
        text = f"{text[: len(text) - len(text[-40:]) + base.start()]}_{{{digits}}}"
    turned = _TURNED.fullmatch(text)
    if turned:  # ]a, b[ is how some write (a, b)
        text = (
            turned.group(1).replace("]", "(") + turned.group(2) + turned.group(3).replace("[", ")")
        )
    spaced = _SPACED.fullmatch(text)
    if spaced:
        text = spaced.group(1) + spaced.group(2).replace(" ", "") + (spaced.group(3) or "")
    return _HALVES.sub(lambda match: match.group(1).lower() + "m", text)


_WRAPPINGS = (
    ("$$", "$$"),
    ("$", "$"),
    ("\\[", "\\]"),
    ("\\(", "\\)"),
    ("**", "**"),
    ("`", "`"),
    ('"', '"'),
)


def _unwrapped(text: str) -> str:
    """Without the delimiters of mathematics or emphasis that surround the whole, and its full stop."""
    before = None
    while text != before:
        before = text
        text = text.removeprefix("\\displaystyle").strip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        for opening, closing in _WRAPPINGS:
            inside = text[len(opening) : -len(closing)]
            whole = text.startswith(opening) and text.endswith(closing)
            if whole and len(text) >= 2 * len(opening) and opening not in inside:
                text = inside.strip()
    return text


def tokenise(text: str, commas: str = "outside") -> list[Token]:
    """Tokens of a cleaned answer.

    `commas` says where `1,234` is one number: "outside" brackets, or only "inside" them (the other reading).
    Raises Unreadable for more than 1,200 tokens.
    """
    tokens: list[Token] = []
    _scan(text, tokens, commas, in_text=False)
    tokens = _without_lines(tokens)
    while tokens and tokens[-1].text in (".", ",", ";", ":"):
        tokens.pop()
    while tokens and tokens[0].text in (".", ",", ";", ":", "bullet"):
        del tokens[0]
    return tokens


_LINES = (
    "align",
    "aligned",
    "gather",
    "gathered",
    "equation",
    "split",
    "multline",
    "flalign",
    "displaymath",
    "math",
)


_LINE_MARKS = {f"{side}:{name}" for side in ("beg", "end") for name in _LINES}


def _without_lines(tokens: list[Token]) -> list[Token]:
    """Display environments without their marks; their lines are separate statements."""
    if not any(token.text in _LINE_MARKS for token in tokens):
        return tokens
    kept, depth = [], 0
    for token in tokens:
        if token.kind == "op" and token.text in _LINE_MARKS:
            continue
        depth += token.text.startswith("beg:") - token.text.startswith("end:")
        if depth == 0 and token.text == "&":
            continue
        kept.append(token._replace(text=",") if depth == 0 and token.text == "\\\\" else token)
    return kept


def has_two_readings(text: str) -> bool:
    """Whether some comma may either group digits or separate numbers."""
    return "," in text and re.search(r"\d,\d{3}(?!\d)", text) is not None


def canonical(tokens: list[Token]) -> str:
    """The tokens as one string; adjacent numbers stay apart."""
    parts = []
    for index, token in enumerate(tokens):
        if index and token.kind == "num" and tokens[index - 1].kind == "num":
            parts.append(" ")
        parts.append(token.text)
    return "".join(parts)


_DEPTH = {"(": 1, "[": 1, r"\{": 1, ")": -1, "]": -1, r"\}": -1}


def _scan(text: str, tokens: list[Token], commas: str, in_text: bool) -> None:
    position, gap, depth = 0, False, 0
    while position < len(text):
        match = _SCAN.match(text, position)
        kind, piece = match.lastgroup, match.group()
        position = match.end()
        if len(tokens) > TOKENS:
            raise Unreadable(f"more than {TOKENS} tokens")
        if kind == "space":
            gap = True
            continue
        if kind == "comma" and (depth > 0) == (commas == "outside"):
            piece = re.match(r"\d+", piece).group()
            position, kind = match.start() + len(piece), "num"
        if kind == "cmd":
            position = _command(piece, text, position, tokens, commas, gap)
        elif kind == "run":
            _run(piece, tokens, in_text, gap)
        else:
            depth += _DEPTH.get(piece, 0)
            tokens.append(_simple(kind, piece, gap))
        gap = False


def _simple(kind: str, piece: str, gap: bool) -> Token:
    """A token that needs no context."""
    if kind in ("num", "comma", "grouped"):
        return Token("num", re.sub(r"[^\d.eE+-]", "", piece), gap)
    if kind == "decimal":
        return Token("num", piece.replace("{,}", "."), gap)
    if kind == "repeat":
        return Token("num", _repeating(*re.match(r"(\d*)\.(\d*)\D+(\d+)", piece).groups()), gap)
    if kind == "dots":
        return _ellipsis(piece, gap)
    if kind == "degree":
        return Token("op", "deg", gap)
    if kind == "prime":
        return Token("op", "'" * max(piece.count("'"), piece.count("prime")), gap)
    if kind == "row":
        return Token("op", "\\\\", gap)
    if kind == "begin":
        name = piece[piece.index("{") + 1 : -1].rstrip("*")
        return Token("op", f"{piece[1:4]}:{name}", gap)
    if kind == "escaped":
        return Token("op", spelling.ESCAPED[piece], gap)
    known = len(piece) > 1 or piece in spelling.PUNCTUATION
    return Token("op" if known else "unk", spelling.SYMBOLS.get(piece, piece), gap)


def _repeating(whole: str, head: str, period: str) -> str:
    """`0.1\\overline{6}` as the text of an exact fraction."""
    if len(whole) + len(head) + len(period) > 200:
        raise Unreadable("a repeating decimal of more than 200 digits")
    scale = 10 ** len(head)
    nines = 10 ** len(period) - 1
    return f"{int(whole + head or '0') * nines + int(period)}/{scale * nines}"


def _ellipsis(piece: str, gap: bool) -> Token:
    """`0.333...`: a repeating decimal when its last digits show the period, else unknown."""
    whole, _, decimals = re.match(r"[\d.]*\d", piece).group().partition(".")
    for length in range(1, 7):
        times = 3 if length == 1 else 2
        period = decimals[-length:]
        if len(decimals) >= times * length and decimals.endswith(period * times):
            return Token("num", _repeating(whole, decimals, period), gap)
    return Token("unk", piece, gap)


@lru_cache(maxsize=4096)
def _known_command(name: str) -> tuple[str, str]:
    """The longest known command that starts `name`, and the letters after it (`\\pih` is \\pi h)."""
    for end in range(len(name), 1, -1):
        if name[:end] in spelling.COMMANDS:
            return name[:end], name[end:]
    return name, ""


def _command(
    piece: str, text: str, position: int, tokens: list[Token], commas: str, gap: bool
) -> int:
    """Appends the tokens of a command (and of its argument, where that is text); returns where to go on."""
    name, rest = _known_command(piece[1:])
    position -= len(rest)  # letters that belong to no command are read again, as letters
    kind, value = spelling.COMMANDS.get(name, ("unk", name))
    if kind == "skip":
        if name in ("left", "right", "middle"):
            return _delimiter(name, text, position, tokens, gap)
        return position
    if kind == "skip_argument":
        return _argument(text, position)[1]
    if kind == "text":
        content, position = _argument(text, position)
        start = len(tokens)
        _scan(content, tokens, commas, in_text=True)
        if len(tokens) > start and gap:
            tokens[start] = tokens[start]._replace(gap=True)
        return position
    tokens.append(Token(kind, value, gap))
    return position


_DELIMITER = re.compile(r"\s*(\\[{}|]|\\[A-Za-z]+|.)", re.DOTALL)


def _delimiter(side: str, text: str, position: int, tokens: list[Token], gap: bool) -> int:
    """The delimiter of \\left, \\right or \\middle: bars become open or close, dots vanish."""
    match = _DELIMITER.match(text, position)
    if match is None or match.group(1) == ".":
        return match.end() if match else position
    mark = match.group(1)
    if mark in ("|", "\\|", "\\vert", "\\Vert"):
        norm = "V" if mark in ("\\|", "\\Vert") else "v"
        name = {"left": f"l{norm}ert", "right": f"r{norm}ert", "middle": "mid"}[side]
        tokens.append(Token("op", name, gap))
        return match.end()
    return position  # an ordinary bracket: read as one


def _argument(text: str, position: int) -> tuple[str, int]:
    """The {..} or single character that follows a command: (content, end)."""
    while position < len(text) and text[position].isspace():
        position += 1
    if position >= len(text) or text[position] != "{":
        return text[position : position + 1], position + 1
    depth, index = 0, position
    while index < len(text):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[position + 1 : index], index + 1
        index += 2 if text[index] == "\\" else 1
    return text[position + 1 :], len(text)


_CONNECTED = re.compile(r"(or|and)([A-Za-z])")


def _run(run: str, tokens: list[Token], in_text: bool, gap: bool) -> None:
    """A run of letters: a function, constant or word it names, else variables side by side."""
    lower = run.lower()
    previous = tokens[-1].text if tokens else ""
    known = spelling.NAMES.get(run) or (spelling.NAMES.get(lower) if len(run) > 2 else None)
    if (
        (run == "min" and in_text)
        or run in ("min", "sec")
        and tokens
        and (tokens[-1].kind in ("num", "word") or previous == "/")
    ):
        tokens.append(Token("word", run, gap))  # minutes, seconds
    elif known:
        tokens.append(Token(*known, gap))
    elif len(run) == 1:
        tokens.append(Token("word" if in_text else "let", run, gap))
    elif (
        lower in ("or", "and")
        or lower in spelling.WORDS
        or run in units.SHORT
        or lower in units.SHORT
    ):
        tokens.append(Token("word", lower, gap))
    elif tokens and not in_text and _CONNECTED.fullmatch(run) and previous not in "+-*/^_=(":
        word, letter = _CONNECTED.fullmatch(run).groups()  # "x=6orx=-6", printed without spaces
        tokens += [Token("word", word, gap), Token("let", letter, True)]
    elif not in_text and (split := _function_prefix(run)):
        tokens += [Token("fn", split, gap), *(Token("let", c) for c in run[len(split) :])]
    elif in_text or (len(run) > 3 and not run.isupper()):
        tokens.append(Token("word", run, gap))
    else:
        tokens += [Token("let", letter, gap and index == 0) for index, letter in enumerate(run)]


def _function_prefix(run: str) -> str:
    """`sin` of `sinx`, `ln` of `lnx`; at most two letters may follow."""
    for name in (
        "arcsin",
        "arccos",
        "arctan",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "ln",
    ):
        if run.startswith(name) and 0 < len(run) - len(name) <= 2:
            return name
    return ""
