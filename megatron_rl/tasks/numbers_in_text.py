"""Numbers in answers: their value as an exact rational, and the unit or remark beside it."""

import re
from dataclasses import dataclass
from fractions import Fraction

_SPACE = r"(?:,|\{,\}|,\\!|\\,|\\;|\\:|\\ |\\!|~|[ \u00a0\u2009\u202f]|'|_)"
_THOUSANDS = re.compile(rf"(?<![0-9.])([0-9]{{1,3}})(({_SPACE})[0-9]{{3}}(?:\3[0-9]{{3}})*)(?![0-9])")
_INDIAN = re.compile(r"(?<![0-9.,])([0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3})(?![0-9])")
_DECIMAL = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_INNER = rf"\s*([+-]?\s*{_DECIMAL})\s*"
_SIGN = r"(?P<sign>[+-]?)\s*(?:[€£¥₹]\s*)?(?P<sign2>[+-]?)\s*"
_NUMBER = re.compile(
    rf"{_SIGN}(?:"
    r"(?:(?P<whole>[0-9]+)\s*)?\\frac\s*(?:\{" + _INNER + r"\}\s*\{" + _INNER + r"\}|\s*([0-9])\s*([0-9]))"
    r"|(?P<mixed>[0-9]+)\s+(?P<top>[0-9]+)\s*/\s*(?P<bottom>[0-9]+)"
    r"|(?P<before>[0-9]*)\.(?P<still>[0-9]*)\\overline\s*\{(?P<repeated>[0-9]+)\}"
    rf"|(?P<decimal>{_DECIMAL})"
    r"(?:[eE](?P<exponent>[+-]?[0-9]+)(?![0-9.])"
    r"|\s*(?:\\times|\\cdot|×|\*|x)\s*10\s*\^\s*\{?\s*(?P<power>[+-]?\s*[0-9]+)\s*\}?"
    rf"|\s*/\s*(?P<divisor>{_DECIMAL}))?"
    r")(?![0-9])"
)
_LARGEST_EXPONENT = 400
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}

# Spellings of measures. Two answers with different measures differ; all other words beside a number are passed over.
_MEASURES = {
    spelling: name
    for name, spellings in {
        "%": "% percent pct",
        "m": "m meter meters",
        "cm": "cm centimeter centimeters",
        "mm": "mm millimeter millimeters",
        "km": "km kilometer kilometers",
        "in": "in inch inches",
        "ft": "ft foot feet",
        "yd": "yd yard yards",
        "mi": "mi mile miles",
        "g": "g gram grams",
        "kg": "kg kilogram kilograms kgs",
        "lb": "lb lbs pound pounds",
        "oz": "oz ounce ounces",
        "l": "l liter liters",
        "ml": "ml milliliter milliliters",
        "s": "s sec secs second seconds",
        "min": "min mins minute minutes",
        "h": "h hr hrs hour hours",
        "day": "day days",
        "week": "week weeks",
        "month": "month months",
        "year": "year years yr yrs",
        "dollar": "dollar dollars usd",
        "cent": "cent cents",
        "euro": "euro euros eur",
    }.items()
    for spelling in spellings.split()
}
_LETTERS_OF_UNITS = frozenset("mgshlLJNWVAKCF")
# Words that change a value or leave it open.
_CHANGING_WORDS = """
    or not nor neither never cannot no half quarter third thirds minus plus negative squared
    cubed factorial choose mod sqrt root pi log ln sin cos tan exp than least most between except versus vs
    instead wrong incorrect twice double triple unknown undefined
"""
_CHANGING = frozenset(_CHANGING_WORDS.split())
_CHANGING_BEFORE = _CHANGING | frozenset(("over", "under", "below", "above", "nearly", "almost", "times"))
_WORD = re.compile(r"[^\W\d_]+")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])\s*(?:\^\s*\{?\s*-?[1-3]\s*\}?|[²³])|\^\s*\{?\s*\\circ\s*\}?|\\circ|\\degree")
_UNIT_AT_END = re.compile(
    r"(?<=[\w})])\s+(?:square |sq\.? |cubic |cu\.? )?(?P<word>"
    + "|".join(sorted((re.escape(word) for word in (*_MEASURES, "units", "unit") if len(word) > 1), key=len)[::-1])
    + r")\s*(?P<power>\^\s*\{?[23]\}?|[²³]|squared|cubed)?\.?$",
    re.IGNORECASE,
)
_BESIDE = re.compile(r"[\w\s.,;:!?'\"’“”()\[\]/%°&@-]*")
_LEAD = re.compile(r"[\w\s.,;:'\"’“”(\[-]*?(?:[:=≈~]|\\approx|\\Rightarrow|⇒|→|=>|->)?\s*")
_ORDINAL = re.compile(r"(?<=[0-9])\s*\^?\s*\{?\s*(?:st|[nr]d|th)\b\s*\}?")
_ARITHMETIC = re.compile(r"[-0-9.+*/^(){}\s×÷]+|[-0-9.+*/^(){}\s]*(?:\\(?:times|div|cdot|frac|left|right)[^A-Za-z]*)+")
_NAMES = re.compile(r"(?:[A-Za-z]|(?:[^\W\d_]{2,}+[ '’:,]*+)++)\s*")


@dataclass(frozen=True, slots=True)
class Amount:
    """A number with what stands beside it.

    Attributes:
        value: the number.
        measure: the measure after it in one spelling, or None.
        bare: nothing but a unit of at most four words stands beside it.
    """

    value: Fraction
    measure: str | None = None
    bare: bool = True

    def equals(self, other: "Amount") -> bool:
        """Return whether both are the same number, exactly, and not of different measures."""
        same = self.measure is None or other.measure is None or self.measure == other.measure
        return same and self.value == other.value


def read_amount(text: str) -> Amount | None:
    """Return the one number of an answer, with its unit or remark; None if there is none or more than one.

    A second number, `or`, `not`, `=` or an operator after it makes the answer something else than this number. What
    stands before it may only be words or a left side: `Total = 72`, `40 + 32 = 72`.

    Args:
        text: the answer without Markdown and math delimiters.
    """
    text = _INDIAN.sub(lambda match: match[0].replace(",", ""), text)
    text = _THOUSANDS.sub(lambda match: match[1] + match[2].replace(match[3], ""), text)
    text = _ORDINAL.sub("", text)
    left, equals, right = text.rpartition("=")
    if equals and not text.endswith(">") and not right.startswith(">"):
        named = not left.strip() or _NAMES.fullmatch(left) is not None
        if not named and (_NUMBER.fullmatch(left.strip()) or not _ARITHMETIC.fullmatch(left)):
            return None
        if not _CHANGING_BEFORE.isdisjoint(_words(left)):
            return None
        text = right
    match = _NUMBER.search(text)
    value = None if match is None else _value(match)
    if match is None or value is None:
        return None
    before, after = text[: match.start()].strip(), _UNIT_POWER.sub(" ", text[match.end() :])
    if not _is_lead(before) or not _is_beside(after):
        return None
    words = _words(after)
    measure = "%" if after.lstrip().startswith("%") else _measure_of(words[0]) if words else None
    if words and words[0] in _SCALES:
        value *= 10 ** _SCALES[words[0]]
    return Amount(value, measure, not before.strip("([") and len(words) <= 4)


def split_unit(formula: str) -> tuple[str, str]:
    """Return a formula without the measure at its end, and the measure in one spelling; "" without one."""
    match = _UNIT_AT_END.search(formula)
    return (formula, "") if match is None else (formula[: match.start()], _measure_of(match["word"].casefold()) or "")


def _value(match: re.Match[str]) -> Fraction | None:
    part = match.groupdict()
    powers = int((part["exponent"] or part["power"] or "0").replace(" ", "")) if _short_exponent(part) else None
    if powers is None or (part["sign"] and part["sign2"]):
        return None
    try:
        value = _unsigned(match, part) * Fraction(10) ** powers
    except ZeroDivisionError:
        return None
    return -value if "-" in (part["sign"], part["sign2"]) else value


def _short_exponent(part: dict[str, str | None]) -> bool:
    digits = (part["exponent"] or part["power"] or "0").strip("+- ")
    return len(digits) < 5 and int(digits) <= _LARGEST_EXPONENT


def _unsigned(match: re.Match[str], part: dict[str, str | None]) -> Fraction:
    if part["decimal"] is not None:
        return Fraction(part["decimal"]) / Fraction(part["divisor"] or 1)
    if part["mixed"] is not None:
        return Fraction(part["mixed"]) + Fraction(int(part["top"] or 0), int(part["bottom"] or 0))
    if part["repeated"] is not None:
        before, still, again = part["before"] or "0", part["still"] or "", part["repeated"]
        period = Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(still))
        return Fraction(f"{before}.{still or 0}") + period
    # The numerator and denominator are groups without a name: braces, or two digits.
    top, bottom = [group for group in match.groups()[3:7] if group is not None]
    return Fraction(part["whole"] or 0) + Fraction(top.replace(" ", "")) / Fraction(bottom.replace(" ", ""))


def _measure_of(word: str) -> str | None:
    return _MEASURES.get(re.sub(r"(met|lit)re", r"\1er", word))


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]


def _is_lead(text: str) -> bool:
    """Return whether text before a number does not change it."""
    if not text:
        return True
    if _LEAD.fullmatch(text) is None or any(character.isdigit() for character in text) or text.endswith("-"):
        return False
    words = _words(text)
    return _CHANGING_BEFORE.isdisjoint(words) and all(len(word) > 1 or word in "ai" for word in words)


def _is_beside(text: str) -> bool:
    """Return whether text after a number is a unit or a remark, with no other number."""
    if not text.strip():
        return True
    if _BESIDE.fullmatch(text) is None or any(character.isdigit() or character == "_" for character in text):
        return False
    words = _WORD.findall(text)
    if not _CHANGING.isdisjoint(word.casefold() for word in words):
        return False
    if any(len(word) == 1 and word not in _LETTERS_OF_UNITS and word not in "aI" for word in words):
        return False
    # Letters right after a number may be a product of variables: 5ab.
    attached = re.match(r"/?\s*([^\W\d_]+)", text) if text[0] == "/" or not text[0].isspace() else None
    return attached is None or len(attached[1]) > 3 or _measure_of(attached[1].casefold()) is not None
