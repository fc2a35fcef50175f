r"""The place of the final answer in a text: after `####` or in a box, outside of thoughts and of later questions.

Responses and ground truths are read by the same rules:

- A thought (`<think>` ... `</think>`) is not read. One that never ends reaches to the end of the text.
- The later of the last mark `####` and the last box counts. A mark has exactly four hashes.
- The answer of a mark is the rest of its line; after a bare mark or a label (`#### Final Answer`), the next line.
- A heading (`#### Note: ...`, `#### Step 2`), an empty mark and an empty box are no answers.
- Boxes with only `or`, `and` or a comma between them are one answer.
- A question that begins after the first answer, as base models write it, and all that follows are not read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

MARK = "####"
LONGEST_ANSWER = 2000  # characters; a longer answer is wrong, a longer ground truth is refused
# Tags between which models think. The last has one pair of characters in every model of its family.
_THOUGHT_TAGS = (
    (r"<(?:think|thinking|thought|reasoning)>", r"</(?:think|thinking|thought|reasoning)>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"<seed:think>", r"</seed:think>"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"◁think▷", r"◁/think▷"),
)
_OPENS = re.compile("|".join(begin for begin, _ in _THOUGHT_TAGS))
_CLOSES = re.compile("|".join(end for _, end in _THOUGHT_TAGS))
_OPENS_AT_END = re.compile(f"(?:{_OPENS.pattern})\\s*\\Z")
_THOUGHT = re.compile(f"(?:{_OPENS.pattern}).*?(?:{_CLOSES.pattern})", re.DOTALL)

_MARKS = re.compile(r"(?<!#)####(?!#)")
_BOXES = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])[ \t]*")
_BARE_BOX = re.compile(r"(?:(?!\\\)|\\\])[^$\n])*")  # what a box without braces reaches to
_BETWEEN_BOXES = re.compile(r"[\s$.;]*(?:\\text\{)?\s*(,|or|and|,\s*or|,\s*and)?\s*\}?[\s$]*")
_OTHER_VALUE = re.compile(r"[\s$*]*\bor\b[^\n]*[0-9\\][^\n]*")
_WIDEST_GAP = 40  # characters between boxes that belong together
_BRACES = re.compile(r"\\?[{}]")
_FILLED = re.compile(r"\S")
_PLACEHOLDERS = frozenset(("", "...", "…", "\\ldots", "\\dots", "answer", "your answer", "final answer"))

_DECORATION = "*_`~ \t#"
_LABEL = re.compile(
    r"(?:so\s+|therefore,?\s+|thus,?\s+)?(?:the\s+|my\s+)?(?:final\s+|correct\s+)?(?:answer|result)\b"
    r"(?:\s+is\b)?[\s*_`]*[:=]?[\s*_`]*",
    re.IGNORECASE,
)
_HEADING = re.compile(
    r"(?:notes?|check(?:ing)?|verif\w+|explanations?|reason(?:ing)?|solution|steps?|conclusion|summary|remarks?|method|"
    r"approach|calculations?|computations?|given|problem|question|details|analysis|work|working|key|part|case|proof|"
    r"interpretation|alternative|another|using|understanding|breakdown)\b",
    re.IGNORECASE,
)
_NEXT_QUESTION = re.compile(
    r"^[ \t#*>]*(?:question|problem|q|human|user|instruction|exercise)[ \t]*\d*[ \t*]*[:：]"
    r"|<\|(?:im_start|user|start_header_id)\|>|\[INST\]|<start_of_turn>",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Found:
    """An answer in a text.

    Attributes:
        start: position of its mark or box.
        end: position after it.
        text: the answer; None if its box is never closed.
    """

    start: int
    end: int
    text: str | None


def response_answer(text: str, *, thinking: bool = False, truth: str = "") -> str | None:
    """Return the final answer of a response, "" if it is empty or cut off, None if there is no mark and no box.

    Args:
        text: the response, without end-of-turn tokens.
        thinking: the prompt ended inside a thought.
        truth: the ground truth; an answer that equals it is never taken for a heading.
    """
    text = without_thoughts(text, thinking=thinking)
    found = sorted([*_marked(text), *_boxed(text)], key=lambda answer: answer.start)
    if not found:
        return None
    real = [answer for answer in found if answer.text is None or not _is_idle(answer.text, truth)]
    real = _before_next_question(text, real)
    return (real[-1].text or "") if real else ""


def ground_truth(text: str) -> str | None:
    """Return the final answer in a text of the answer column: marked, or boxed, or the whole text.

    None if the text marks an answer that is empty or cut off.
    """
    answer = response_answer(text)
    return text.strip() or None if answer is None else answer or None


def count_boxes(text: str) -> int:
    """Return how many different boxes that are closed and not empty a text has."""
    return len({answer.text for answer in _boxed(text) if answer.text})


def without_thoughts(text: str, *, thinking: bool = False) -> str:
    """Return the text without its thoughts.

    Args:
        text: a response.
        thinking: the prompt ended inside a thought, so the text begins in it.
    """
    if _CLOSES.search(text) is None:
        begun = _OPENS.search(text)
        return "" if thinking else text if begun is None else text[: begun.start()]
    text = _THOUGHT.sub(" ", text) if not thinking else text
    closed = list(_CLOSES.finditer(text))
    text = text[closed[-1].end() :] if closed else text
    return without_thoughts(text)


def ends_in_thought(prompt: str) -> bool:
    """Return whether a prompt ends with the tag that opens a thought."""
    return _OPENS_AT_END.search(prompt) is not None


def is_thought_tag(token: str) -> bool:
    """Return whether the text of a token opens or closes a thought."""
    return _OPENS.fullmatch(token) is not None or _CLOSES.fullmatch(token) is not None


def without_label(text: str) -> str:
    """Return an answer without `Final answer:` or its like in front."""
    return _LABEL.sub("", text, count=1) if _LABEL.match(text) else text


def _marked(text: str) -> Iterator[Found]:
    for mark in _MARKS.finditer(text):
        line, end = _line_at(text, mark.end())
        if not line:
            begin = _FILLED.search(text, end)
            if begin is not None and not text.startswith(MARK, begin.start()):
                line, end = _line_at(text, begin.start())
        yield Found(mark.start(), end, line)


def _line_at(text: str, at: int) -> tuple[str, int]:
    """Return the rest of a line without decoration and label, and where it ends."""
    end = text.find("\n", at)
    end = len(text) if end < 0 else end
    line = text[at:end].strip()
    if len(line) > LONGEST_ANSWER:
        return line, end
    bare = without_label(line.strip(_DECORATION))
    return bare.strip() if bare.strip(_DECORATION) else "", end


def _boxed(text: str) -> list[Found]:
    """Return the boxes of a text, those that belong together joined."""
    boxes: list[Found] = []
    matches = list(_BOXES.finditer(text))
    closing = _closing_braces(text) if matches else {}
    for match in matches:
        box = _box_at(text, match, closing)
        last = boxes[-1] if boxes else None
        near = last is not None and box.start - last.end <= _WIDEST_GAP
        between = _BETWEEN_BOXES.fullmatch(text, last.end, box.start) if last is not None and near else None
        if last is not None and last.text and box.text and between is not None and between[1]:
            boxes[-1] = Found(last.start, box.end, f"{last.text} {between[1]} {box.text}")
        else:
            boxes.append(box)
    for at, box in enumerate(boxes):
        other = _OTHER_VALUE.match(text, box.end)
        if other is not None and box.text:
            boxes[at] = Found(box.start, other.end(), f"{box.text} {other[0].strip()}")
    return boxes


def _closing_braces(text: str) -> dict[int, int]:
    """Return the position of the closing brace of every opening one that is closed."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for brace in _BRACES.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closing[opened.pop()] = brace.start()
    return closing


def _box_at(text: str, match: re.Match[str], closing: dict[int, int]) -> Found:
    begin = match.end()
    if text[begin : begin + 1] != "{":
        bare = _BARE_BOX.match(text, begin)
        assert bare is not None
        return Found(match.start(), bare.end(), bare[0].strip())
    if begin not in closing:
        return Found(match.start(), len(text), None)
    return Found(match.start(), closing[begin] + 1, text[begin + 1 : closing[begin]].strip())


def _is_idle(answer: str, truth: str) -> bool:
    """Return whether an answer is a placeholder or a heading and not the truth itself."""
    bare = answer.strip(_DECORATION).casefold()
    if truth and bare == truth.strip().casefold():
        return False
    return bare in _PLACEHOLDERS or bare.endswith(":") or _HEADING.match(bare) is not None


def _before_next_question(text: str, found: list[Found]) -> list[Found]:
    if not found:
        return found
    question = _NEXT_QUESTION.search(text, found[0].end)
    return found if question is None else [answer for answer in found if answer.start < question.start()]
