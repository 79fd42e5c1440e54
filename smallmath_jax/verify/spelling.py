r"""Tables of spellings: unicode, LaTeX commands, function names, words. Data only, but for `to_latex`."""

import re
import unicodedata

_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho varrho sigma "
    "tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar"
).split()
_FUNCTIONS = (
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth sech csch ln log lg exp "
    "max min gcd lcm arg det Re Im deg dim ker rank"
).split()
_ALIASES = {
    "cosec": "csc", "cotg": "cot", "ctg": "cot", "tg": "tan", "arctg": "arctan", "asin": "arcsin", "acos": "arccos",
    "atan": "arctan", "arsinh": "arcsinh", "asinh": "arcsinh", "acosh": "arccosh", "arcosh": "arccosh",
    "atanh": "arctanh", "artanh": "arctanh", "arcsinh": "arcsinh", "arccosh": "arccosh", "arctanh": "arctanh",
}  # fmt: skip
_SKIPPED = (
    "left right middle big Big bigg Bigg bigl bigr bigm Bigl Bigr Bigm biggl biggr Biggl Biggr quad qquad displaystyle "
    "textstyle scriptstyle limits nolimits boxed fbox ensuremath rm bf it tt sf large Large small normalsize noindent "
    "mathstrut strut nonumber notag mathbf boldsymbol bm vec overrightarrow mathcal mathit mathnormal mathsf mathtt "
    "mathop mathord mathbin mathrel centering thinspace negthinspace medspace thickspace enspace par newline hfill "
    "cancel pmb smash mathclose mathopen mathinner mathpunct"
).split()
_TEXT = "text mbox textbf textit textrm textsf texttt textnormal textup emph mathrm operatorname hbox underline".split()
_OPERATORS = {
    "frac": "dfrac tfrac cfrac sfrac nicefrac", "binom": "dbinom tbinom", "sqrt": "", "overline": "bar widebar",
    "hat": "widehat", "tilde": "widetilde", "dot": "", "*": "cdot times ast", "/": "div slash", "pm": "", "mp": "",
    "<=": "le leq leqslant leqq", ">=": "ge geq geqslant geqq", "<": "lt", ">": "gt", "!=": "ne neq",
    "=": "equiv coloneqq", "approx": "simeq thickapprox", "sim": "cong", "in": "", "notin": "", "cup": "bigcup",
    "cap": "bigcap", "setminus": "backslash smallsetminus", "subset": "", "subseteq": "", "lfloor": "", "rfloor": "",
    "lceil": "", "rceil": "", "langle": "", "rangle": "", "lvert": "", "rvert": "", "lVert": "", "rVert": "",
    "|": "vert", "norm": "Vert", "mid": "", ":": "colon", "infty": "", "emptyset": "varnothing", "circ": "",
    "%": "percent", "deg": "degree", "(": "lparen", ")": "rparen", "[": "lbrack", "]": "rbrack", "{{": "lbrace",
    "}}": "rbrace", "...": "dots ldots cdots dotsc dotsb dotsm dotso vdots ddots", "to": "rightarrow longrightarrow",
    "implies": "Rightarrow Longrightarrow implies", "iff": "Leftrightarrow Longleftrightarrow leftrightarrow",
    "sum": "", "prod": "", "int": "iint iiint oint", "lim": "", "partial": "", "nabla": "", "angle": "measuredangle",
    "triangle": "", "perp": "", "parallel": "", "choose": "", "mod": "bmod", "pmod": "", "land": "wedge",
    "lor": "vee", "neg": "lnot", "forall": "", "exists": "", "$": "pounds euro", "'": "prime", "otimes": "",
    "oplus": "", "bullet": "", "star": "", "top": "", "bot": "", "propto": "", "sup": "", "inf": "", "mathbb": "Bbb",
    "mathfrak": "", "overset": "", "underset": "", "stackrel": "", "underbrace": "", "xrightarrow": "", "mho": "",
    "therefore": "", "because": "", "square": "Box", "checkmark": "",
}  # fmt: skip


def _commands() -> dict[str, tuple[str, str]]:
    """Command name -> (kind, canonical text)."""
    table = {name: ("let", name) for name in (*_GREEK, "pi", "imath", "jmath")}
    table |= {
        "varpi": ("let", "pi"),
        "varepsilon": ("let", "epsilon"),
        "vartheta": ("let", "theta"),
    }
    table |= {"varphi": ("let", "phi"), "varrho": ("let", "rho"), "imath": ("let", "i")}
    table |= {name: ("fn", name) for name in _FUNCTIONS if name not in ("deg",)}
    table |= {alias: ("fn", name) for alias, name in _ALIASES.items()}
    for name, aliases in _OPERATORS.items():
        table |= {
            alias: ("op", name) for alias in (*aliases.split(), *([name] if name.isalpha() else []))
        }
    table |= {name: ("skip", "") for name in _SKIPPED}
    table |= {name: ("text", "") for name in _TEXT}
    table |= {name: ("skip_argument", "") for name in ("hspace", "vspace", "phantom", "hphantom", "vphantom", "tag",
                                                       "label", "color", "textcolor")}  # fmt: skip
    return table


COMMANDS = _commands()
ESCAPED = {
    r"\{": "{{",
    r"\}": "}}",
    r"\%": "%",
    r"\$": "$",
    r"\#": "#",
    r"\&": "and",
    r"\_": "_",
    r"\|": "norm",
}
SYMBOLS = {"**": "^", "<>": "!=", "==": "=", ":=": "=", "->": "to", "=>": "implies", "…": "..."}
PUNCTUATION = "+-*/^_=<>()[]{}|,;:!&.%"  # single characters that mean something
NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
    )
}

# Runs of plain letters that name something: run -> (kind, canonical text).
NAMES = (
    {name: ("fn", name) for name in _FUNCTIONS if name not in ("deg", "Re", "Im", "dim", "ker", "rank", "lg", "arg")}
    | {alias: ("fn", name) for alias, name in _ALIASES.items()}
    | {name: ("let", name) for name in _GREEK if len(name) > 3}
    | {
        "pi": ("let", "pi"), "tau": ("let", "tau"), "phi": ("let", "phi"), "rho": ("let", "rho"),
        "sqrt": ("op", "sqrt"), "frac": ("op", "frac"), "abs": ("fn", "abs"), "floor": ("fn", "floor"),
        "ceil": ("fn", "ceil"), "ceiling": ("fn", "ceil"), "cbrt": ("fn", "cbrt"), "binomial": ("fn", "binom"),
        "infinity": ("op", "infty"), "infty": ("op", "infty"), "inf": ("op", "infty"), "oo": ("op", "infty"),
        "degree": ("op", "deg"), "degrees": ("op", "deg"), "percent": ("op", "%"), "percentage": ("op", "%"),
        "union": ("op", "cup"), "plus": ("op", "+"), "minus": ("op", "-"),
        "emptyset": ("op", "emptyset"),
    }
)  # fmt: skip

# Short words that are not products of variables; units are added by `units`.
WORDS = set(
    "am pm no yes all any not is are the of in to by at on for if when where with from than then true false none "
    "odd even east west north south only both each per one two six ten day week hour year base sq cu such that real "
    "max min out but".split()
)

# Whole answers that say the same: canonical text (lower case, letters only) -> its name.
SENTENCES = {
    **dict.fromkeys(
        ["nosolution", "nosolutions", "norealsolution", "norealsolutions", "emptyset", "theemptyset", "nullset"],
        "emptyset",
    ),
    **dict.fromkeys(
        ["allrealnumbers", "allreals", "realnumbers", "allrealnumber", "thesetofallrealnumbers", "thereals",
         "setofallrealnumbers", "therealnumbers", "everyrealnumber", "anyrealnumber"],
        "reals",
    ),
    **dict.fromkeys(["dne", "doesnotexist", "undefined", "notdefined"], "undefined"),
    **dict.fromkeys(["positiveinfinity", "plusinfinity"], "infty"),
}  # fmt: skip

_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "‒": "-", "﹣": "-", "×": r"\times ", "✕": r"\times ",
    "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": r"\div ", "∕": "/", "⁄": "/", "±": r"\pm ", "∓": r"\mp ",
    "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≅": r"\cong ",
    "≡": "=", "∞": r"\infty ", "∪": r"\cup ", "⋃": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∉": r"\notin ",
    "∅": r"\emptyset ", "⊂": r"\subset ", "⊆": r"\subseteq ", "∖": r"\setminus ", "°": r"\degree ", "º": r"\degree ",
    "′": "'", "″": "''", "’": "'", "‘": "'", "“": '"', "”": '"', "∠": r"\angle ", "△": r"\triangle ", "∣": "|",
    "⟨": r"\langle ", "⟩": r"\rangle ", "〈": r"\langle ", "〉": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
    "⌈": r"\lceil ", "⌉": r"\rceil ", "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ", "∂": r"\partial ", "→": r"\to ",
    "⇒": r"\implies ", "⟹": r"\implies ", "⇔": r"\iff ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "€": r"\$", "£": r"\$", "¥": r"\$", "₹": r"\$", "％": r"\%",
    "。": ".", "、": ",", "…": "...", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2002": " ", "\u2003": " ",
    "\u2061": "", "\u2062": "", "\u200b": "", "\u200c": "", "\u200d": "", "\u2060": "", "\ufeff": "", "\u00ad": "",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}", "⅖": r"\frac{2}{5}", "⅗": r"\frac{3}{5}", "⅘": r"\frac{4}{5}", "⅙": r"\frac{1}{6}",
    "⅚": r"\frac{5}{6}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}", "⅞": r"\frac{7}{8}",
    "√": r"\sqrt ", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "ϕ": r"\phi ", "ϵ": r"\epsilon ", "ℓ": r"\ell ",
    "\x0b": " ", "\x0c": " ",
}  # fmt: skip
_LETTERS = "αβγδεζηθικλμνξ ρστυφχψω"
_NAMES_OF_LETTERS = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi - rho sigma tau upsilon phi chi psi omega"
).split()
_CHARACTERS |= {
    letter: f"\\{name} "
    for letter, name in zip(_LETTERS, _NAMES_OF_LETTERS, strict=True)
    if letter != " "
}
_CHARACTERS |= {
    "π": r"\pi ",
    "ς": r"\sigma ",
    "µ": r"\mu ",
    "Γ": r"\Gamma ",
    "Δ": r"\Delta ",
    "Θ": r"\Theta ",
}
_CHARACTERS |= {
    "Λ": r"\Lambda ",
    "Ξ": r"\Xi ",
    "Π": r"\Pi ",
    "Σ": r"\Sigma ",
    "Φ": r"\Phi ",
    "Ψ": r"\Psi ",
}
_CHARACTERS |= {"Ω": r"\Omega ", "∆": r"\Delta "}
_CHARACTERS |= {
    chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if chr(code) != "％"
}
_CHARACTERS |= {chr(code): "\ufffd" for code in range(32) if chr(code) not in "\t\n\r\x0b\x0c"}
_TABLE = str.maketrans(_CHARACTERS)

_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣ", "0123456789+-=()nix", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₓₙₖₘᵢⱼ", "0123456789+-=()aexnkmij", strict=True))
_RAISED_RUN = re.compile(f"[{''.join(_RAISED)}]+")
_LOWERED_RUN = re.compile(f"[{''.join(_LOWERED)}]+")
_ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?|\([^()]{1,200}\))")
_MATH_LETTERS = re.compile("[\U0001d400-\U0001d7ff\u2100-\u214f]")


def to_latex(text: str) -> str:
    """Unicode mathematics in LaTeX's spelling. ASCII passes through; control characters become unreadable."""
    if text.isascii() and text.isprintable():
        return text
    text = _RAISED_RUN.sub(lambda run: "^{" + "".join(_RAISED[c] for c in run.group()) + "}", text)
    text = _LOWERED_RUN.sub(
        lambda run: "_{" + "".join(_LOWERED[c] for c in run.group()) + "}", text
    )
    text = _ROOT.sub(lambda match: "\\sqrt{" + match.group(1) + "}", text)
    text = text.translate(_TABLE)
    return _MATH_LETTERS.sub(lambda match: unicodedata.normalize("NFKC", match.group()), text)
