"""What the interpreter of the public rStar-Math code shows of a program. It runs inside the sandbox only.

The source of this module is sent there in front of a program (`rstar.observing`), so it imports the standard library
alone. Its manglings are kept: only the last statement's output is shown, several prints get labels ("1: 1"), and a
number is rounded to four decimals. The default search shows standard output as it is.
"""

import ast
import io
import re
from contextlib import redirect_stdout


def observe(code, names):
    """The text shown for `code`; `names` holds its variables. Exceptions become "Type: message"."""
    try:
        code = re.sub(r"^(\s|`)*(?i:python)?\s*", "", code)
        code = re.sub(r"(\s|`)*$", "", code)
        body = ast.parse(code).body
        prints = [index for index, statement in enumerate(body) if _prints(statement)]
        with redirect_stdout(io.StringIO()):
            if len(prints) < 2:
                return str(_last(body, names))
            shown = []
            for start, end in zip([-1] + prints[:-1], prints, strict=True):
                label = re.findall(r"print\((.*?)\)", ast.get_source_segment(code, body[end]))
                label = " ".join(label) + ":" if label else ""
                shown.append(f"{label} {_last(body[start + 1 : end + 1], names)}")
            return "".join(shown)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _prints(statement):
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return isinstance(statement.value.func, ast.Name) and statement.value.func.id == "print"
    if isinstance(statement, (ast.If, ast.While, ast.For, ast.FunctionDef)):
        return any(map(_prints, statement.body))
    return False


def _last(body, names):
    """Runs the statements and returns what the last one gives: its value, or else what it prints."""
    source = lambda part: ast.unparse(ast.Module(part, type_ignores=[]))
    exec(source(body[:-1]), names)
    last, printed = source(body[-1:]), io.StringIO()
    with redirect_stdout(printed):
        try:
            value = eval(last, names)
        except Exception:
            exec(last, names)
            value = None
    return _shorten(printed.getvalue() if value is None else value)


def _shorten(value):
    if isinstance(value, str):
        try:
            rounded = str(round(float(value), 4)) + "\n"
            value = value if len(value) < len(rounded) else rounded
        except (ValueError, OverflowError):
            value = value
    text = str(value)
    return text[:512] + "..." + text[-512:] if len(text) > 1024 else value
