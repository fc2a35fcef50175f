"""Answers: what kind of thing a final answer is, and whether two are equal.

| kind    | example              | compared                                                        |
|---------|----------------------|-----------------------------------------------------------------|
| number  | `1,050`, `\\frac{1}{2}`, `72 clips` | exactly, as a rational number                    |
| choice  | `E`, `(D) 12`        | by its letter                                                   |
| word    | `LRLR`, `Monday`     | letter by letter; case and outer punctuation do not matter       |
| text    | `10:30 am`           | as words                                                        |
| formula | `\\sqrt{2}`, `(1, 2)` | by math-verify in the grader's process                          |

The kind of the ground truth decides how a response is read.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

from megatron_rl.tasks.final_answer import LONGEST_ANSWER, without_label
from megatron_rl.tasks.numbers_in_text import Amount, read_amount, split_unit

Kind = Literal["number", "choice", "word", "text", "formula"]
MOST_WORDS = 40

_CHARACTERS = str.maketrans(
    {
        **{"−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "＋": "+", "／": "/", "．": ".", "，": ",", "＝": "="},
        **{"\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "\ufeff": "", "’": "'", "％": "%"},
        **{"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅛": " 1/8", "✓": "", "✔": ""},
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
    }
)
_SYMBOLS = re.compile("[\u2600-\u27bf\ufe0f\U0001f300-\U0001faff]")
_TAG = re.compile(r"</?(?:br|b|i|p|em|u|strong|span|div|code|center|answer|mark|pre|font)\b[^<>]*/?>", re.IGNORECASE)
_CONTROL = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]>|</s>|<end_of_turn>|<eos>")
_BOLD = re.compile(r"(?<![\w*])(\*\*|__|\*|`+)(?=\S)([^*`\n]+?)\1(?![\w*])")
_LEFT_OVER = re.compile(r"^[*`\s]+|[*`]+[\s.]*$|(?<=\w)\*\*(?=\s+[A-Za-z])|`")
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|texttt|textsf|textrm|mathrm|mathbf|mathit|mathsf|operatorname|mbox|hbox|bf|rm|emph)"
    r"\s*\{([^{}]*)\}"
)
_ALIASES = (
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle|textstyle|bigl?|bigr?|Bigl?|Bigr?)(?![A-Za-z])\s*"), ""),
    (re.compile(r"\\(?:quad|qquad)(?![A-Za-z])"), " "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\?\$|\\\(|\\\)|\\\[|\\\]|\\pounds|\\checkmark"), ""),
)
_CHOICE = re.compile(
    r"(?:option|choice)?\s*"
    r"(?:[(\[]\s*(?P<bracketed>[A-Za-z])\s*[)\]]\s*[.:-]?|(?P<letter>[A-Za-z])\s*(?:[.:)]|$))\s*(?P<option>.*)",
    re.IGNORECASE | re.DOTALL,
)
_OTHER_CHOICE = re.compile(r"[(\[]\s*[A-Z]\s*[)\]]|\b(?:or|not|and)\b|^[A-Z]\b|\b[A-Z][):]")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_LETTERS = re.compile(r"[^\W\d_]+")
_PROSE = re.compile(r"[^\W\d_]{2,}")
_FUNCTION_NAMES = """
    sqrt sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp lim min max gcd lcm mod pi or
    and frac cdot times infty in cup cap pm alpha beta theta circ begin end pmatrix bmatrix matrix vmatrix
    cases array det text left right cm mm km kg ft mi deg degrees binom lfloor
"""
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_SEVERAL = re.compile(r"\b(?:or|and)\b|[,;{}&]|\\pm|\\cup|\\mp")
_HEDGES = re.compile(r"\b(?:not|nor|neither|isn't|never|maybe|instead)\b|\\neq?(?![A-Za-z])|≠")
_NOT_A_VALUE = re.compile(r"[+-]?\s*(?:nan|inf|infinity)|null|<na>|nat", re.IGNORECASE)
_EXCLAIMED = re.compile(r"([^\W\d_]{3,})!+$")
_HUGE_POWER = re.compile(r"[eE][+-]?[0-9]{4}|\^\s*\{?\s*[+-]?[0-9]{5}")


class FormulaGrader(Protocol):
    """What compares two formulas."""

    def equal(self, gold: str, answer: str) -> bool:
        """Return whether two formulas are equal."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A ground truth that was read.

    Attributes:
        kind: see the module.
        text: the answer without Markdown, math delimiters and a full stop.
        amount: the number of kind number.
        letter: the letter of kind choice.
    """

    kind: Kind
    text: str
    amount: Amount | None = None
    letter: str = ""


class UnreadableAnswerError(ValueError):
    """A ground truth that no response could equal; the message is the second half of a sentence."""


@lru_cache(maxsize=1 << 16)
def read_answer(truth: str) -> Answer:
    """Return what a ground truth is.

    Raises UnreadableAnswerError for one that no response could equal: NaN, infinity or a missing value, no letter
    or digit at all, braces that do not match, or more than 2,000 characters or 40 words.
    """
    if len(truth) > LONGEST_ANSWER:
        raise UnreadableAnswerError(f"has {len(truth):,} characters, and an answer has at most {LONGEST_ANSWER:,}")
    text = _EXCLAIMED.sub(r"\1", plain_answer(truth))
    if _NOT_A_VALUE.fullmatch(text) or truth.strip() == "None":
        raise UnreadableAnswerError("is no value")
    if not any(character.isalnum() for character in text):
        raise UnreadableAnswerError("has no letter and no digit")
    if text.replace("\\{", "").count("{") != text.replace("\\}", "").count("}"):
        raise UnreadableAnswerError("has braces that do not match")
    amount = None if "!" in text else read_amount(text)
    if amount is not None and amount.bare:
        return Answer("number", text, amount)
    choice = _read_choice(text, capital=True)
    if choice:
        return Answer("choice", text, letter=choice)
    kind = _kind_of_words(text)
    if kind != "formula" and len(text.split()) > MOST_WORDS:
        raise UnreadableAnswerError(
            f"is a text of {len(text.split())} words; mark its final answer by '####' or \\boxed{{}}"
        )
    return Answer(kind, text)


def same_answer(gold: Answer, response: str, grader: FormulaGrader) -> bool:
    """Return whether the final answer of a response equals the ground truth.

    Args:
        gold: the ground truth.
        response: the final answer of the response, as written.
        grader: compares formulas; it is not called for other kinds unless the response is a formula.
    """
    if len(response) > LONGEST_ANSWER:
        return False
    text = plain_answer(response)
    if not text:
        return False
    if gold.amount is not None:
        given = read_amount(text)
        if given is not None and (gold.amount.equals(given) or "!" not in text):
            return gold.amount.equals(given)
        return _is_formula_for_number(text) and grader.equal(gold.text, text)
    if gold.kind == "choice":
        return _read_choice(text) == gold.letter
    if gold.kind in ("word", "text"):
        return _words_of(text) == _words_of(gold.text)
    if _squeezed(text) == _squeezed(gold.text):
        return True
    if not _may_equal_formula(gold.text, text):
        return False
    (bare_gold, unit), (bare, other) = split_unit(gold.text), split_unit(text)
    return (not unit or not other or unit == other) and grader.equal(bare_gold, bare)


def plain_answer(text: str) -> str:
    """Return an answer without Markdown, HTML, math delimiters, text commands, a label and a full stop."""
    text = text.translate(_CHARACTERS).strip()
    if not text.isascii():
        text = _SYMBOLS.sub("", text)
    if "<" in text:
        text = _CONTROL.sub(" ", _TAG.sub(" ", text))
    if "*" in text or "`" in text or "_" in text:
        text = _BOLD.sub(r"\2", text.strip())
        text = _LEFT_OVER.sub("", text)
    if "\\" in text or "$" in text:
        text = _without_latex(text)
    text = " ".join(without_label(text.strip()).split())
    return text.strip(" .,;:?\"'") if text[-1:] in "?.,;:\"' " or text[:1] in "\"':" else text


def _without_latex(text: str) -> str:
    for pattern, replacement in _ALIASES:
        text = pattern.sub(replacement, text)
    for _ in range(4):  # commands may be nested
        text, count = _WRAPPED.subn(r" \1 ", text)
        if not count:
            break
    text = text.strip()
    while text.startswith("{") and text.endswith("}") and text.count("{") == 1:
        text = text[1:-1].strip()
    return text


def _read_choice(text: str, *, capital: bool = False) -> str:
    """Return the letter of a choice, with or without the text of its option; "" if the text is no single choice.

    Args:
        text: a plain answer.
        capital: the letter must be a capital one, as in a ground truth, where `x` is a variable.
    """
    match = _CHOICE.fullmatch(text)
    if match is None or _OTHER_CHOICE.search(match["option"]):
        return ""
    letter = match["bracketed"] or match["letter"]
    return "" if capital and not letter.isupper() else letter.upper()


def _kind_of_words(text: str) -> Kind:
    """Return whether a text that is no number and no choice is a word, a text or a formula."""
    if "\\" in text or re.search(r"[=<>^+*/{}|≤≥∞√π]", text) or text.casefold() in _FUNCTIONS:
        return "formula"
    if re.fullmatch(r"[^\W\d_]{2,}", text):
        return "word"
    words = [word for word in _PROSE.findall(text) if word.casefold() not in _FUNCTIONS]
    separate = re.search(r"(?:^|\s)[^\W\d_]{2,}(?:[\s,.;:]|$)", text) is not None
    if words and (separate or any(len(word) > 2 or word.isupper() for word in words)):
        return "text"
    return "text" if re.fullmatch(r"[0-9]{1,2}:[0-9]{2}(?:\s*[ap]\.?m\.?)?", text, re.IGNORECASE) else "formula"


def _words_of(text: str) -> str:
    return " ".join(text.casefold().replace("{", " ").replace("}", " ").split()).strip(" .,;:!?\"'()[]")


def _squeezed(text: str) -> str:
    return re.sub(r"\s+|\\[!,;: ]", "", text)


def _has_prose(text: str) -> bool:
    bare = _COMMAND.sub(" ", text)
    return any(word.casefold() not in _FUNCTIONS for word in _PROSE.findall(bare) if not _is_product(word))


def _is_product(word: str) -> bool:
    """Return whether letters side by side may be variables that are multiplied."""
    return len(word) == 2 and word.islower()


def _is_formula_for_number(text: str) -> bool:
    """Return whether a text may be a formula whose value is one number."""
    if "=" in text or _HUGE_POWER.search(text) or _HEDGES.search(text) or re.search(r"\b(?:or|and)\b|[,;]", text):
        return False
    if re.search(r"(?<![_^{\w.])[0-9.]+\s+[0-9]", text):
        return False
    if "\\" not in text and not any(character.isdigit() for character in text):
        return False
    words = _LETTERS.findall(_COMMAND.sub(" ", text))
    return all(word.casefold() in _FUNCTIONS or word in ("e", "i") for word in words)


def _may_equal_formula(gold: str, text: str) -> bool:
    """Return whether math-verify may compare a text with a formula: its letters are not words."""
    if _HUGE_POWER.search(text) or (_HEDGES.search(text) and not _HEDGES.search(gold)):
        return False
    if re.search(r"\b(?:or|and)\b", text) and not _SEVERAL.search(gold):
        return False
    return not _has_prose(text) or _has_prose(gold)
