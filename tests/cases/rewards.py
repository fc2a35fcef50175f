"""Answers that a verifier must pay or refuse, ground truths that must be read or refused.

A row names the ground truth (a cell of the answer column), the response, whether it is right, and the public report.
"""

from typing import NamedTuple

HF = "https://github.com/huggingface"


class Reward(NamedTuple):
    """One response and its reward."""

    truth: str | float
    response: str
    right: bool
    report: str = ""


SEPARATORS = "https://github.com/AISBench/benchmark/issues/359"
UNITS = "https://github.com/modelscope/evalscope/pull/906"
WORDS = f"{HF}/Math-Verify/issues/16"
THOUGHTS = f"{HF}/trl/pull/4563"
BARE_BOX = "https://github.com/hendrycks/math/issues/23"
MARKDOWN = f"{HF}/Math-Verify/issues/76"
SPELLINGS = "https://github.com/EleutherAI/lm-evaluation-harness/issues/3652"
CHOICES = "https://github.com/NVIDIA-NeMo/Gym/pull/1844"
HEADINGS = "https://github.com/google/tunix/pull/2116"
STOPS = f"{HF}/trl/pull/7039"
SMALL = "https://github.com/usds/justice40-tool/pull/952"
RUN_ON = "https://github.com/sgl-project/sglang/pull/29933"

UNIT_WORDS = [
    "clips",
    "pages",
    "eggs",
    "students",
    "dollars",
    "USD",
    "pounds",
    "hours",
    "days",
    "miles",
    "km",
    "people",
    "cookies",
    "points",
    "years",
    "feet",
]

REWARDS = [
    # Numbers, one value written in many ways.
    Reward("1050", "#### 1,050", True, SEPARATORS),
    Reward("10000", "\\boxed{10{,}000}", True, SEPARATORS),
    Reward("10080", "\\boxed{10,\\!080}", True, SEPARATORS),
    Reward("10000", "\\boxed{10\\,000}", True, SEPARATORS),
    Reward("10\\,000", "#### 10000", True, SEPARATORS),
    Reward("1234567", "#### 1\\,234\\,567", True, SEPARATORS),
    Reward("130 000", "#### 130000", True, SEPARATORS),
    Reward("130000", "#### 130 000", True, SEPARATORS),
    Reward("100000", "#### 1,00,000", True, SEPARATORS),
    Reward("7273", "#### 72,73", False, SEPARATORS),
    Reward("123456", "#### 1,234,56", False),
    Reward("1234", "#### 1.234", False),
    Reward("1050", "#### $1050.", True),
    Reward("1050", "\\boxed{\\$1{,}050.00}", True),
    Reward("-7", "#### 7", False),
    Reward("-7", "#### −7", True),
    Reward("-5", "#### -$5", True),
    Reward("7", "#### +7", True),
    Reward("7", "#### ７", True),
    Reward("1/2", "\\boxed{\\frac{1}{2}}", True),
    Reward("0.5", "\\boxed{\\dfrac12}", True),
    Reward("0.5", "#### ½", True),
    Reward("1.5", "\\boxed{1\\frac{1}{2}}", True),
    Reward("3/2", "#### 1 1/2", True),
    Reward("1/3", "\\boxed{0.\\overline{3}}", True),
    Reward("1/3", "#### 0.333333333333", False),
    Reward("0.1", "#### 0.10000000000000000001", False),
    Reward("0", "#### 0.00000000000000001", False),
    Reward("0.00000000000000001", "#### 0.00000000000000002", False),
    Reward("5", "#### 5/0", False),
    Reward(0.00005, "#### 0.00005", True, SMALL),
    Reward(0.00005, "\\boxed{5\\times10^{-5}}", True, SMALL),
    Reward(1e-7, "#### 0.0000001", True, SMALL),
    Reward(1e16, "#### 10000000000000000", True, SMALL),
    Reward("0.00001", "#### 1e-5", True, SMALL),
    Reward("5e-05", "#### 0.00005", True, SMALL),
    Reward(72.0, "#### 72", True),
    Reward("72", "#### 1e999999999", False),
    Reward("5000000", "#### 5 million dollars", True),
    Reward("5", "#### 5 million dollars", False),
    # Units and remarks beside a number.
    *(Reward("42", f"#### 42 {unit}", True, UNITS) for unit in UNIT_WORDS),
    *(Reward("42", f"\\boxed{{42\\text{{ {unit}}}}}", True, UNITS) for unit in UNIT_WORDS),
    Reward("42 clips", "#### 42", True, UNITS),
    Reward("5 cm", "#### 5 m", False),
    Reward("5 cm", "\\boxed{5\\mathrm{cm}}", True),
    Reward("5 cm", "#### 5 centimeters", True),
    Reward("20", "#### 20%", True),
    Reward("20%", "\\boxed{20\\%}", True),
    Reward("20%", "#### 20", True),
    Reward("0.2", "#### 20%", False),
    Reward("20%", "#### 0.2", False),
    Reward("72", "#### 72 clips were sold altogether.", True),
    Reward("72", "#### 72 (seventy-two)", True),
    Reward("72", "#### She has 72 clips", True),
    Reward("72", "#### Total = 72 clips", True),
    Reward("72", "\\boxed{x = 72}", True),
    Reward("72", "#### = 72", True),
    Reward("72", "#### 40 + 32 = 72", True),
    Reward("72", "#### 72!", True, MARKDOWN),
    Reward("120", "\\boxed{5!}", True),
    Reward("5!", "\\boxed{5}", False),
    Reward("72", "#### 72 🎉", True),
    Reward("72", "#### 72 or 73", False),
    Reward("72", "#### 72 = 73", False),
    Reward("72", "#### 72, not 73", False),
    Reward("72", "#### not 72", False),
    Reward("72", "#### 72 73", False),
    Reward("72", "#### 72 (or seventy-three)", False),
    Reward("72", "#### 72 clips (48 + 24)", False),
    Reward("72", "#### less than 72", False),
    Reward("72", "#### x = 72 or x = 73", False),
    Reward("72", "#### 2x = 72", False),
    Reward("72", "#### 72x", False),
    Reward("5", "\\boxed{5ab}", False),
    Reward("5", "\\boxed{5\\pi}", False),
    Reward("1", "#### 1/ab", False),
    Reward("5", "#### 5 and a half", False),
    # Formulas.
    Reward("x+1", "\\boxed{1+x}", True),
    Reward("\\sqrt{2}", "#### 1.4142136", True),
    Reward("\\sqrt{2}", "#### 1.4142", False),
    Reward("8", "\\boxed{2^3}", True),
    Reward("9", "\\boxed{2^3}", False),
    Reward("2ab", "\\boxed{2}", False),
    Reward("2\\sqrt{2}\\text{ cm}", "\\boxed{2\\sqrt2}", True),
    Reward("\\sqrt{2}", "#### \\sqrt{2} or \\sqrt{3}", False),
    Reward("(0.1, 0.2)", "\\boxed{(0.10000001, 0.2)}", False),
    Reward("\\frac{1}{10^{17}}", "\\boxed{\\frac{1}{10^{18}}}", False),
    Reward("n!", "\\boxed{n}", False),
    Reward("864 \\mbox{ inches}^2", "\\boxed{864 \\text{ inches}^2}", True, SPELLINGS),
    Reward("2516_8", "\\boxed{2516_8}", True, SPELLINGS),
    Reward("1 \\pm \\sqrt{19}", "\\boxed{1-\\sqrt{19}, 1+\\sqrt{19}}", True, SPELLINGS),
    Reward("x \\in [-2,7]", "\\boxed{[-2,7]}", True, SPELLINGS),
    Reward("32348", "\\boxed{\\$32,\\!348}", True, SPELLINGS),
    Reward("13", "\\boxed{\\text{13}}", True, SPELLINGS),
    Reward("12", "\\boxed{12^{\\text{th}}}", True, SPELLINGS),
    Reward("12^{\\text{th}}", "\\boxed{12}", True, SPELLINGS),
    Reward("12", "\\boxed{12\\text{th}}", True, SPELLINGS),
    Reward("4", "\\boxed{4.}", True, SPELLINGS),
    # Words and choices.
    Reward("CAB", "#### ABC", False, WORDS),
    Reward("TTH", "\\boxed{HTT}", False, WORDS),
    Reward("no", "#### on", False, WORDS),
    Reward("LRLR", "\\boxed{RLRL}", False, WORDS),
    Reward("saw", "#### was", False, WORDS),
    Reward("LRLR", "\\boxed{\\text{LRLR}}", True, WORDS),
    Reward("\\text{Evelyn}", "\\boxed{Evelyn}", True),
    Reward("Monday", "#### **monday**.", True),
    Reward("yes", "#### yes or no", False),
    Reward("10:30", "#### 10:30", True),
    Reward("check", "#### check", True),
    Reward("E", "\\boxed{E: option text}", True, CHOICES),
    Reward("D", "\\boxed{(D) 12}", True, CHOICES),
    Reward("D", "#### D) 12", True, CHOICES),
    Reward("(D) 12", "\\boxed{\\textbf{(D)}}", True, CHOICES),
    Reward("E", "\\boxed{\\text{E}}", True, CHOICES),
    Reward("E", "#### Option E", True, CHOICES),
    Reward("D", "\\boxed{(D) 12 (E) 13}", False, CHOICES),
    Reward("A", "\\boxed{A or B}", False, CHOICES),
    Reward("A", "\\boxed{(B) A}", False, CHOICES),
    # Markdown, headings, empty marks and boxes.
    Reward("73", "#### **73**", True, MARKDOWN),
    Reward("73", "**#### 73**", True, MARKDOWN),
    Reward("73", "#### `73`", True, MARKDOWN),
    Reward("42", "#### 42<br>", True, MARKDOWN),
    Reward("42", "#### **Answer:** 42 apples", True, MARKDOWN),
    Reward("42", "#### <b>42</b>", True, MARKDOWN),
    Reward("24", "\\boxed{24}\n\n#### Note:\nx > 0", True, HEADINGS),
    Reward("24", "#### 24\n##### Check", True, HEADINGS),
    Reward("24", "#### Step 1: add 10\nso \\boxed{24}\n#### Verification", True, HEADINGS),
    Reward("5", "#### Final Answer\n5", True, HEADINGS),
    Reward("5", "#### Final Answer: 5", True, HEADINGS),
    Reward("5", "####\n5", True, HEADINGS),
    Reward("72", "\\boxed{72}, as asked in \\boxed{}.", True),
    Reward("72", "####", False),
    Reward("72", "", False),
    Reward("72", "it is 72", False),
    Reward("72", "\\boxed{}", False),
    Reward("72", "\\boxed{72", False),
    Reward("72", "\\boxed{\\frac{}{}} }}{{ \\boxed{\\sqrt[}", False),
    Reward("72", "#### \ud83d \x00", False),
    Reward("72", "#### " + "9" * 5000, False),
    # The last answer counts, with what stands beside it.
    Reward("72", "#### 71\n#### 72", True),
    Reward("72", "\\boxed{72} no, #### 71", False),
    Reward("72", "#### 71, no: \\boxed{72}", True),
    Reward("72", "\\boxed{72} or \\boxed{73}", False),
    Reward("73", "\\boxed{72} or \\boxed{73}", False),
    Reward("72", "\\boxed{72} or 73", False),
    Reward("5", "so \\boxed 5", True, BARE_BOX),
    Reward("5", "$\\boxed {5}$", True, BARE_BOX),
    Reward("have \\boxed{3} cases, in all $\\boxed 6$", "\\boxed{6}", True, BARE_BOX),
    Reward("have \\boxed{3} cases, in all $\\boxed 6$", "\\boxed{3}", False, BARE_BOX),
    Reward("a #### 5 \n trailing words", "#### 5", True),
    # Thoughts, stop tokens and the next question.
    Reward("5", "<think>Maybe \\boxed{5}? Let me check", False, THOUGHTS),
    Reward("5", "<think>\\boxed{5}</think> The answer is 7.", False, THOUGHTS),
    Reward("5", "Maybe \\boxed{5}.</think> The answer is 7.", False, THOUGHTS),
    Reward("7", "<think>\\boxed{5}</think> \\boxed{7}", True, THOUGHTS),
    Reward("5", "[THINK]\\boxed{5}", False, THOUGHTS),
    Reward("5", "<think>a</think> <think>\\boxed{5}", False, THOUGHTS),
    Reward("2", "#### 2<|im_end|>", True, STOPS),
    Reward("2", "#### 2<|im_end|>\n<|endoftext|>", True, STOPS),
    Reward("42", "#### 42\n\nQuestion: 3+4?\n#### 7", True, RUN_ON),
    Reward("7", "#### 42\n\nQuestion: 3+4?\n#### 7", False, RUN_ON),
    Reward("7", "Problem: what is 3+4?\n#### 7", True, RUN_ON),
]


class Refused(NamedTuple):
    """A cell of the answer column that is no ground truth, and what the message says."""

    cell: str
    message: str


# As they stand in a JSONL file.
REFUSED = [
    Refused("NaN", "'answer' is nan, which is no number"),
    Refused("Infinity", "'answer' is inf, which is no number"),
    Refused("-Infinity", "'answer' is -inf, which is no number"),
    Refused("1e999", "'answer' is inf, which is no number"),
    Refused('"nan"', "the ground truth 'nan' in 'answer' is no value"),
    Refused('"inf"', "is no value"),
    Refused('"None"', "is no value"),
    Refused('"so #### "', "holds no final answer"),
    Refused('"so \\\\boxed{}"', "holds no final answer"),
    Refused('"so \\\\boxed{3"', "holds no final answer"),
    Refused('"#### ..."', "holds no final answer"),
    Refused('"?"', "has no letter and no digit"),
    Refused('"\\\\frac{1}{2"', "has braces that do not match"),
    Refused(f'"{"word " * 50}"', "is a text of 50 words; mark its final answer"),
    Refused(f'"{"9" * 3000}"', "has 3,000 characters"),
    Refused("null", "'answer' is None; text is expected"),
    Refused("true", "'answer' is True; text is expected"),
    Refused('["72"]', r"'answer' is \['72'\]; text is expected"),
]

# Cells of the answer column and the kind that they are read as.
KINDS = {
    "1,050": "number",
    "72 clips": "number",
    "-3.5": "number",
    "\\frac{1}{2}": "number",
    "20%": "number",
    "E": "choice",
    "(D) 12": "choice",
    "LRLR": "word",
    "John and Mary": "text",
    "10:30 am": "text",
    "July 4": "text",
    "\\sqrt{2}": "formula",
    "(1, 2)": "formula",
    "2xy": "formula",
    "x": "formula",
    "3, 4": "formula",
    "5!": "formula",
}
