"""Texts of configurations and overrides: what is right, and what the error says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.config.read_yaml import MAX_BYTES

MODEL = "model: {path: m}\n"


@dataclass(frozen=True)
class ConfigCase:
    """One input.

    Attributes:
        name: what it is.
        text: content of the file.
        right: dotted keys and the values they have; or the text of a ConfigError, where FILE is the file's path.
        overrides: overrides of the command line.
        address: where it was reported.
    """

    name: str
    text: str | bytes
    right: Mapping[str, Any] | str
    overrides: tuple[str, ...] = ()
    address: str = ""
    content: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", self.text.encode() if isinstance(self.text, str) else self.text)


def override(name: str, text: str, right: Mapping[str, Any] | str) -> ConfigCase:
    """Return the case of one override of a small file."""
    return ConfigCase(name, MODEL, right, (text,))


def laughs(opening: str, closing: str, item: str) -> str:
    """Return a "billion laughs": nine aliases of a value that has nine aliases, nine times."""
    lines = [f"a0: &a0 {opening}{item}{closing}"]
    for level in range(1, 10):
        members = ", ".join(f"{f'k{i}: ' if opening == '{' else ''}*a{level - 1}" for i in range(9))
        lines.append(f"a{level}: &a{level} {opening}{members}{closing}")
    return MODEL + "task:\n  options:\n" + "".join(f"    {line}\n" for line in lines)


MANY = "more than 20000 values"
DEEP = "nested more than 32 deep"

EMPTY = (
    ConfigCase("a section whose keys are comments", MODEL + "rollout:\n# servers: 1\n", {"rollout.servers": 1}),
    ConfigCase("an empty section inside a section", MODEL + "rollout:\n  sglang:\n", {"rollout.sglang.tensor": 1}),
    ConfigCase("an empty section named ~", MODEL + "run: ~\n", {"run.steps": 60}),
    ConfigCase("an empty section of the user's options", MODEL + "task: {options: }\n", {"task.options": {}}),
    ConfigCase("a section that is all defaults", MODEL + "run: {}\n", {"run.steps": 60}),
    ConfigCase("an override in an empty section", MODEL + "run:\n", {"run.steps": 3}, ("run.steps=3",)),
    ConfigCase("an empty model", "model:\n", "FILE:1: key 'model.path' is missing"),
    ConfigCase("an empty file", "", "key 'model' is missing"),
    ConfigCase("a file of comments", "# model: {path: m}\n", "key 'model' is missing"),
    ConfigCase("an empty key", MODEL + "run: {steps: }\n", "FILE:2: 'run.steps' has no value"),
    ConfigCase("an empty optional key", MODEL + "task: {data: }\n", {"task.data": None}),
    override("an empty override", "run.steps=", "override 'run.steps=': 'run.steps' has no value"),
    override("a key of two dots", "run..steps=1", "override 'run..steps=1' must read section.key=value"),
)

SCALARS = (
    ConfigCase("an impossible date is text", MODEL + "run: {name: 2026-99-99}\n", {"run.name": "2026-99-99"}),
    ConfigCase("a date is text", MODEL + "run: {name: 2026-01-31}\n", {"run.name": "2026-01-31"}),
    override("a date of an override is text", "run.name=2026-99-99", {"run.name": "2026-99-99"}),
    ConfigCase(
        "a time is text",
        MODEL + "task: {options: {a: 2026-01-31 10:20:30}}\n",
        {"task.options.a": "2026-01-31 10:20:30"},
    ),
    override("= alone is text", "run.name==", {"run.name": "="}),
    override("0b_", "run.seed=0b_", "'0b_' is not a YAML integer"),
    override("0x_", "run.seed=0x_", "'0x_' is not a YAML integer"),
    override("a hexadecimal number", "run.seed=0x1f", {"run.seed": 31}),
    override("010 is 8 or 10", "run.seed=010", "YAML versions read 010 differently"),
    override("1:30 is 90 or text", "run.seed=1:30", "YAML versions read 1:30 differently"),
    override("underscores", "run.seed=1_000", {"run.seed": 1000}),
    override("an exponent without a point", "optimizer.lr=1e-4", {"optimizer.lr": 1e-4}),
    override("an exponent in a key of the objective", "objective.delta=1e-1", {"objective.delta": 0.1}),
    override("an address is text", "rollout.urls=[http://10.0.0.1:8000]", {"rollout.urls": ("http://10.0.0.1:8000",)}),
    override("a number of 5000 digits", "run.seed=" + "9" * 5000, "a number has 5000 characters"),
    override("a hexadecimal number of 5000 digits", "run.seed=0x" + "f" * 5000, "a number has 5002 characters"),
    override("5000 sexagesimal digits", "run.seed=1" + ":59" * 5000, "a number has 15001 characters"),
    ConfigCase("a number of 5000 digits in a file", MODEL + f"run: {{seed: {'9' * 5000}}}\n", "FILE:2: a number has"),
    ConfigCase("5000 digits as text", MODEL + f"run: {{seed: '{'9' * 5000}'}}\n", "FILE:2: 'run.seed' is '9999"),
    ConfigCase("!!int of text", MODEL + "run: {seed: !!int many}\n", "FILE:2: 'many' is not a YAML integer"),
    ConfigCase("!!int of nothing", MODEL + "run: {seed: !!int ''}\n", "FILE:2: '' is not a YAML integer"),
    ConfigCase("!!bool of text", MODEL + "alp: {enabled: !!bool maybe}\n", "FILE:2: 'maybe' is not a YAML boolean"),
    ConfigCase("!!float of text", MODEL + "optimizer: {lr: !!float low}\n", "FILE:2: 'low' is not a YAML number"),
    ConfigCase("!!timestamp of text", MODEL + "run: {name: !!timestamp now}\n", {"run.name": "now"}),
    ConfigCase("!!str of a number", MODEL + "run: {name: !!str 12}\n", {"run.name": "12"}),
    ConfigCase("NUL in text", MODEL + 'run: {name: "a\\0b"}\n', "FILE:2: the text has the character U+0000"),
    ConfigCase("half of a surrogate pair", MODEL + 'run: {name: "\\ud800"}\n', "the character U+D800"),
    ConfigCase(
        "a character that does not exist", MODEL + 'run: {name: "\\U00110000"}\n', "FILE: the value is not valid YAML"
    ),
    ConfigCase("a control character", MODEL + "run: {name: a\x07b}\n", "FILE: the value is not valid YAML"),
    override("bytes of the shell that are no text", "run.name=a\udcffb", "the value is not valid YAML"),
)

STRUCTURE = (
    ConfigCase("an unknown tag", MODEL + "run: {name: !mine x}\n", "FILE:2: tag '!mine' is not supported"),
    ConfigCase(
        "a Python object", MODEL + "run: {name: !!python/object/apply:os.getcwd []}\n", "FILE:2: tag '!!python/object"
    ),
    ConfigCase("!!set", MODEL + "run: !!set {steps, seed}\n", "FILE:2: tag '!!set' is not supported"),
    ConfigCase("!!binary", MODEL + "run: {name: !!binary aGk=}\n", "FILE:2: tag '!!binary' is not supported"),
    ConfigCase("!!omap", MODEL + "rollout: {urls: !!omap [a: b]}\n", "FILE:2: tag '!!omap' is not supported"),
    ConfigCase("!!str of a list", MODEL + "rollout: {urls: !!str [a]}\n", "FILE:2: tag 'str' stands before a list"),
    ConfigCase(
        "!!int of a mapping", MODEL + "run: {seed: !!int {a: 1}}\n", "FILE:2: tag 'int' stands before a mapping"
    ),
    ConfigCase("a list as a key", MODEL + "run: {? [a, b] : 1}\n", "FILE:2: a key must be text"),
    ConfigCase(
        "a number as a key", MODEL + "task: {options: {1: a, true: b}}\n", {"task.options": {"1": "a", "true": "b"}}
    ),
    ConfigCase("an alias that contains itself", MODEL + "task: {options: &a {b: *a}}\n", DEEP),
    ConfigCase("a list that contains itself", MODEL + "task: {options: {a: &a [*a]}}\n", DEEP),
    ConfigCase("an alias of nothing", MODEL + "run: {name: *a}\n", "FILE:2: the value is not valid YAML"),
    ConfigCase("an alias", "model: {path: &a m}\nrun: {name: *a}\n", {"run.name": "m"}),
    ConfigCase(
        "merged mappings",
        MODEL + "task: {options: {a: &a {x: 1, y: 2}, b: {<<: *a, x: 3}}}\n",
        {"task.options.b": {"x": 3, "y": 2}},
    ),
    ConfigCase(
        "the first of merged mappings wins",
        MODEL + "task: {options: {<<: [{x: 1}, {x: 2, y: 3}]}}\n",
        {"task.options": {"x": 1, "y": 3}},
    ),
    ConfigCase("merged text", MODEL + "run: {<<: text}\n", "FILE:2: '<<' merges a mapping"),
    ConfigCase("merged with itself", MODEL + "task: {options: &a {<<: *a}}\n", DEEP),
    ConfigCase("maps nested 2000 deep", MODEL + "task: {options: " + "{a: " * 2000 + "}" * 2000 + "}\n", DEEP),
    ConfigCase("lists nested 100000 deep", "[" * 100_000, DEEP),
    ConfigCase("dashes nested 100000 deep", "- " * 100_000, DEEP),
    override("a list of 5000 brackets", "rollout.urls=" + "[" * 5000, DEEP),
    override("a key of 5000 parts", "task.options." + ".".join("a" * 5000) + "=1", "the key has 5002 parts"),
    ConfigCase("a billion laughs of maps", laughs("{", "}", "a: lol"), MANY),
    ConfigCase("a billion laughs of lists", laughs("[", "]", "lol"), MANY),
    ConfigCase(
        "a billion laughs of merges",
        MODEL
        + "task:\n  options:\n    a0: &a0 {x: 1}\n"
        + "".join(f"    a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10)),
        MANY,
    ),
    ConfigCase("20,000 columns", MODEL + "run:\n" + "".join(f"  c{i}: 1\n" for i in range(20_000)), MANY),
    ConfigCase(
        "9,000 unknown keys", MODEL + "run:\n" + "".join(f"  c{i}: 1\n" for i in range(9000)), "and 8990 more problems"
    ),
    ConfigCase(
        "a text of 5000 characters",
        MODEL + f"run: {{name: {'a' * 5000}}}\n",
        "FILE:2: run.name: it has 5000 characters",
    ),
    ConfigCase("a name of 900 kB", MODEL + f"run: {{name: {'a' * 900_000}}}\n", "it has 900000 characters"),
    ConfigCase("a key of 900 kB", MODEL + f"run:\n  ? {'a' * 900_000}\n  : 1\n", "(900004 characters)'; did you mean"),
    ConfigCase(
        "a file of 2 MB", MODEL + f"run: {{name: {'a' * 2_000_000}}}\n", f"a configuration has at most {MAX_BYTES}"
    ),
    ConfigCase("two documents", MODEL + "---\n" + MODEL, "FILE:2: the value is not valid YAML"),
    ConfigCase("a tab as indentation", "model:\n\tpath: m\n", "FILE:2: the value is not valid YAML"),
    ConfigCase("only a scalar", "42\n", "FILE: the top level must be a mapping of sections"),
    ConfigCase("a section that is a number", MODEL + "run: 3\n", "FILE:2: 'run' is 3"),
    ConfigCase("a section that is a list", MODEL + "run: [1]\n", "FILE:2: 'run' is [1]"),
    ConfigCase(
        "a text of 5000 characters as a number",
        MODEL + f"run: {{steps: {'a' * 4000}}}\n",
        "... (4002 characters): Input",
    ),
)

ENCODINGS = (
    ConfigCase("latin-1", MODEL.encode() + "run: {name: é}\n".encode("latin-1"), "FILE:2: byte 0xe9 is not UTF-8"),
    ConfigCase("UTF-16", MODEL.encode("utf-16"), "FILE:1: byte 0xff is not UTF-8"),
    ConfigCase("UTF-16 without a mark", MODEL.encode("utf-16-le"), "FILE: the value is not valid YAML"),
    ConfigCase("a program", b"\x7fELF\x02\x01\x01\0\0\0\0\xf3", "FILE:1: byte 0xf3 is not UTF-8"),
    ConfigCase("UTF-8 with a byte order mark", b"\xef\xbb\xbf" + MODEL.encode(), {"model.path": "m"}),
    ConfigCase(
        "lines of Windows",
        MODEL.replace("\n", "\r\n").encode() + b"run: {stepz: 1}\r\n",
        "FILE:2: unknown key 'run.stepz'",
    ),
    ConfigCase("other scripts", MODEL + "run: {name: прогон}\n", {"run.name": "прогон"}),
)

NUMBERS = (
    *(
        override(f"{key}={value}", f"{key}={value}", f"'{key}' is {value.strip('.')}")
        for key in ("rollout.temperature", "rollout.timeout_s", "optimizer.lr", "optimizer.eps", "optimizer.grad_clip")
        for value in (".inf", ".nan")
    ),
    override("infinite ALP noise", "alp.sigma_init=.inf", "'alp.sigma_init' is inf"),
    override("an exponent beyond float", "optimizer.lr=1e999", "'optimizer.lr' is '1e999'"),
    override("1e11 prompts", "rollout.prompts_per_step=100000000000", "'rollout.prompts_per_step' is 100000000000"),
    override(
        "1e11 prompts as a float", "rollout.prompts_per_step=1.0e+11", "'rollout.prompts_per_step' is 100000000000.0"
    ),
    override(
        "a million prompts of 8", "rollout.prompts_per_step=1000000", "= 8000000 trajectories may be held at once"
    ),
    override("a thousand stale versions", "rollout.max_staleness=1000", {"rollout.max_staleness": 1000}),
    override("1e9 samples", "rollout.samples_per_prompt=1000000000", "'rollout.samples_per_prompt' is 1000000000"),
    override("1e9 servers", "rollout.servers=1000000000", "'rollout.servers' is 1000000000"),
    override("1e12 steps", "run.steps=1000000000000", "run.steps: it is 1e+12; a number is at most 2147483647"),
    override("1e300 seconds", "rollout.timeout_s=1.0e+300", "rollout.timeout_s: it is 1e+300; a number is at most"),
    override("a seed beyond 64 bits", "run.seed=99999999999999999999", "'run.seed' is 99999999999999999999"),
    override("a seed of 40 bits", "run.seed=1099511627776", {"run.seed": 2**40}),
    override("eps above 1", "optimizer.eps=1000.0", "'optimizer.eps' is 1000.0"),
    override("a temperature of 1e-30", "rollout.temperature=1.0e-30", "'rollout.temperature' is 1e-30"),
    override("true as a number", "run.steps=true", "run.steps: it is true, not a number"),
    override("half a step", "run.steps=1.5", "'run.steps' is 1.5"),
)

NAMES = (
    override("a run above its folder", "run.name=..", "run.name: it is '..'; it names a folder inside run.dir"),
    override("a run beside its folder", "run.name=a/../../b", "it names a folder inside run.dir"),
    override("an absolute name", "run.name=/tmp/x", "run.name: it is '/tmp/x'; it names a folder inside run.dir"),
    override("the folder itself", "run.name=.", "run.name: it is '.'; it names a folder inside run.dir"),
    override("a name of nothing", "run.name=''", "'run.name' is '': String should have at least 1 character"),
    override("a name of 300 bytes", "run.name=" + "é" * 150, "has 300 bytes; the name of a file or folder"),
    override("a name in a folder", "run.name=sweep/lr1", {"run.name": "sweep/lr1"}),
    override("a name with dots", "run.name=v1..2", {"run.name": "v1..2"}),
    override("a folder of 300 bytes", "run.dir=runs/" + "a" * 300, "run.dir: 'aaaaaaaaaaaaaaaaaaaa...' has 300 bytes"),
    override("a model of 5000 characters", "model.path=" + "a/" * 2500, "model.path: it has"),
    override("data of 300 bytes", "task.data=" + "a" * 300, "task.data: 'aaaaaaaaaaaaaaaaaaaa...' has 300 bytes"),
    override("the home folder", "run.dir=~/runs", "run.dir: it is ~/runs; ~ is not replaced by the home folder"),
)

CASES = (*EMPTY, *SCALARS, *STRUCTURE, *ENCODINGS, *NUMBERS, *NAMES)
