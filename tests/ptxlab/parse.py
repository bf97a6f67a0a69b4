"""PTX text to a flat list of instructions: scopes resolved, device functions inlined."""

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace


class Unsupported(Exception):  # noqa: N818 - a public name, and not an error in the kernel
    """Something in the PTX that ptxlab does not know."""


@dataclass(frozen=True)
class Instruction:
    """One PTX instruction."""

    opcode: str
    operands: tuple[str, ...]
    guard: str = ""  # the predicate of `@p` or `@!p`, as `p` or `!p`
    location: str = ""  # file:line:column of the Triton source

    def __str__(self) -> str:
        """The instruction as in PTX, followed by its place in the source."""
        text = f"@{self.guard} " if self.guard else ""
        text += f"{self.opcode} {', '.join(self.operands)}".rstrip()
        return f"{text} ({self.location})" if self.location else text


@dataclass(frozen=True)
class Label:
    """The target of a branch."""

    name: str


@dataclass
class ParsedKernel:
    """A kernel's entry point: parameters, registers, instructions and labels."""

    name: str
    parameters: list[tuple[str, str]]  # name and type
    threads: int  # in a CTA
    registers: dict[str, str] = field(default_factory=dict)  # name to type
    body: list[Instruction | Label] = field(default_factory=list)


@dataclass(frozen=True)
class _Function:
    """A device function before it is inlined."""

    results: list[tuple[str, str]]
    parameters: list[tuple[str, str]]
    text: str


_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?')
_ENTRY = re.compile(r"\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>.*?)\)(?P<directives>[^{;]*)\{", re.DOTALL)
_FUNCTION = re.compile(
    r"\.func\s*(?:\((?P<results>[^)]*)\))?\s*(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)[^{;]*\{", re.DOTALL
)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s.*?([\w$]+)", re.DOTALL)
_THREADS = re.compile(r"\.(?:req|max)ntid\s+(\d+)\s*(?:,\s*(\d+)\s*)?(?:,\s*(\d+))?")
_STATEMENT = re.compile(
    r"""\s*(?:
        (?P<scope>[{}])
      | \.loc\s+(?P<file>\d+)\s+(?P<line>\d+)\s+(?P<column>\d+)[^\n]*
      | \.pragma[^;]*;
      | \.(?P<space>reg|param)\s+\.(?P<type>(?!align)\w+)\s+(?P<names>[^;]*);
      | (?P<label>[\w$]+):
      | (?:@(?P<guard>!?%?[\w$]+)\s+)?(?P<opcode>[a-z][\w.:]*)(?P<operands>[^;]*);
    )""",
    re.VERBOSE,
)
_NAME = re.compile(r"(?<![\w$.%])%?[A-Za-z_$][\w$]*")
_NUMBERED = re.compile(r"(%?[\w$]+)<(\d+)>")
_CALL = re.compile(r"(?:\((?P<results>[^)]*)\),\s*)?(?P<name>[\w$]+)(?:,\s*\((?P<arguments>[^)]*)\))?", re.DOTALL)


def parse(ptx: str) -> ParsedKernel:
    """Parse the only kernel of a PTX module."""
    text = _COMMENT.sub("", ptx)
    entry = _ENTRY.search(text)
    if not entry:
        raise Unsupported("PTX without an entry")
    threads = _THREADS.search(entry["directives"])
    if threads and any(int(extent or 1) > 1 for extent in threads.groups()[1:]):
        raise Unsupported(f"a CTA of several dimensions: {threads[0]}")
    kernel = ParsedKernel(entry["name"], _parameters(entry["parameters"]), int(threads[1]) if threads else 32)
    functions = {
        match["name"]: _Function(
            _parameters(match["results"] or ""), _parameters(match["parameters"]), _braced(text, match.end())
        )
        for match in _FUNCTION.finditer(text)
    }
    files = {number: os.path.basename(name or folder) for number, folder, name in _FILE.findall(text)}
    reader = _Reader(kernel, functions, files)
    kernel.body = list(reader.read(_braced(text, entry.end()), {}, None))
    return kernel


def _parameters(text: str) -> list[tuple[str, str]]:
    parameters = []
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        match = _PARAMETER.fullmatch(declaration)
        if not match:
            raise Unsupported(f"parameter {declaration}")
        parameters.append((match[2], match[1]))
    return parameters


def _braced(text: str, start: int) -> str:
    """The text from `start` to the brace that closes it."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start : match.start()]
    raise Unsupported("PTX with an open brace")


def _split(operands: str) -> tuple[str, ...]:
    """Split operands at the outermost commas: `{a, b}`, `[c]` and `(d, e)` stay whole."""
    return tuple(part.strip() for part in re.split(r",(?![^{(\[]*[})\]])", operands) if part.strip())


class _Reader:
    """Reads function bodies into one kernel's registers and instructions.

    Names that belong to a scope (`{ .reg .b32 temp; }`) or to an inlined function are made unique. The values that pass
    to a device function and back are `.param` variables, which become registers, too.
    """

    def __init__(self, kernel: ParsedKernel, functions: dict[str, _Function], files: dict[str, str]) -> None:
        self.kernel = kernel
        self.functions = functions
        self.files = files
        self.numbers = itertools.count()
        self.calls: list[str] = []  # the functions being inlined, outermost first

    def read(self, text: str, names: dict[str, str], end: str | None) -> Iterator[Instruction | Label]:
        """Yield the instructions and labels of a body.

        `names` maps its outer names to unique ones. `end` is the label after an inlined function's body, the target of
        its `ret`; the kernel itself has none.
        """
        inlined = end is not None
        number = next(self.numbers)
        scopes = [names]
        position, location = 0, ""
        text = text.rstrip()
        while position < len(text):
            statement = _STATEMENT.match(text, position)
            if not statement:
                raise Unsupported(text[position:].strip().split("\n")[0])
            position = statement.end()
            if statement["scope"] == "{":
                scopes.append(dict(scopes[-1]))
            elif statement["scope"] == "}":
                scopes.pop()
            elif statement["line"]:
                location = f"{self.files.get(statement['file'], '?')}:{statement['line']}:{statement['column']}"
            elif statement["space"]:
                self._declare(statement["names"], statement["type"], scopes[-1], unique=inlined or len(scopes) > 1)
            elif statement["label"]:
                yield Label(f"{statement['label']}.{number}" if inlined else statement["label"])
            elif statement["opcode"]:
                instruction = self._instruction(statement, scopes[-1], location)
                if instruction.opcode.startswith("call"):
                    yield from self._inline(instruction)
                elif inlined and instruction.opcode.split(".")[0] == "ret":
                    yield replace(instruction, opcode="bra", operands=(end or "",))
                elif inlined and instruction.opcode.split(".")[0] == "bra":
                    yield replace(instruction, operands=(f"{instruction.operands[0]}.{number}",))
                else:
                    yield instruction

    def _declare(self, declarations: str, type_: str, scope: dict[str, str], *, unique: bool) -> None:
        for declaration in _split(declarations):
            numbered = _NUMBERED.fullmatch(declaration)
            names = [f"{numbered[1]}{i}" for i in range(int(numbered[2]))] if numbered else [declaration]
            suffix = f".{next(self.numbers)}" if unique else ""
            for name in names:
                scope[name] = name + suffix
                self.kernel.registers[name + suffix] = type_

    def _instruction(self, statement: re.Match[str], scope: dict[str, str], location: str) -> Instruction:
        def rename(text: str) -> str:
            return _NAME.sub(lambda name: scope.get(name[0], name[0]), text)

        opcode = statement["opcode"]
        operands = tuple(rename(operand) for operand in _split(statement["operands"]))
        parts = opcode.split(".")
        if parts[:2] in (["ld", "param"], ["st", "param"]):
            variable = operands[parts[0] == "ld"].strip("[] ")
            if variable in self.kernel.registers:
                operands = (operands[0], variable) if parts[0] == "ld" else (variable, operands[1])
                opcode = f"mov.{parts[-1]}"
        return Instruction(opcode, operands, rename(statement["guard"] or ""), location)

    def _inline(self, call: Instruction) -> Iterator[Instruction | Label]:
        match = _CALL.fullmatch(", ".join(call.operands))
        if call.guard or not match or match["name"] not in self.functions:
            raise Unsupported(str(call))
        if match["name"] in self.calls:
            raise Unsupported(f"recursion: {call}")
        function = self.functions[match["name"]]
        outer = [*_split(match["results"] or ""), *_split(match["arguments"] or "")]
        inner = [name for name, _ in (*function.results, *function.parameters)]
        end = f"return.{next(self.numbers)}"
        self.calls.append(match["name"])
        yield from self.read(function.text, dict(zip(inner, outer, strict=True)), end)
        self.calls.pop()
        yield Label(end)
