"""Chat templates, rendered as transformers renders them, but metered: they come with the model and are not trusted.

Jinja's sandbox keeps a template from reaching Python. It does not keep it from running for ever or filling memory, so
here each loop step, call, filter and growing operation reports to a meter, which ends the rendering. Knows no tokenizer.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from threading import Lock
from typing import Any, NoReturn, TypeVar

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ..errors import RequestError

OUTPUT_LIMIT = 16 << 20  # characters of a rendered chat
SOURCE_LIMIT = 1 << 20  # characters of a template
VALUE_LIMIT = 64 << 20  # characters of one value, a list's item counting for 64
TOTAL_LIMIT = 1 << 30  # characters of all values that one rendering makes
BUDGET_S = 2.0  # processor time of one rendering

# What makes more of its arguments than their sum: methods, filters and functions alike.
GROWING = {
    *("batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace"),
    *("rjust", "round", "slice", "to_bytes", "tojson", "translate", "wordwrap", "zfill"),
}
WIDE_PERCENT = re.compile(r"%[^%a-zA-Z]*(\*|\d{5})")
WIDE_FORMAT = re.compile(r"\{[^{}]*(\{|:[^{}]*\d{5})")

# What a template can raise by being wrong for a conversation, jinja's own errors aside.
MISTAKES = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError, ValueError)

INSTEAD = "prompt with plain text or token ids"
Value = TypeVar("Value")


class Template:
    """A compiled chat template. Raises `RequestError` where it is not Jinja; thread-safe."""

    def __init__(self, source: str) -> None:
        self._one_at_a_time = Lock()
        self._environment = Metered()
        self.walks_parts = False
        if len(source) > SOURCE_LIMIT:
            raise RequestError(f"the model's chat template is longer than {SOURCE_LIMIT} characters; {INSTEAD}")
        try:
            tree = self._environment.parse(source)
            self.walks_parts = any(names_content(loop.iter) for loop in tree.find_all(nodes.For))
            tree = Metering().visit(tree)
            tree.set_environment(self._environment)
            code = self._environment.compile(tree)
            self._template = jinja2.Template.from_code(self._environment, code, self._environment.make_globals(None))
        except (jinja2.TemplateError, *MISTAKES) as error:
            raise RequestError(f"the model's chat template cannot be compiled: {shown(error)}; {INSTEAD}") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for `variables`, at most `OUTPUT_LIMIT` characters in `BUDGET_S` of processor time, or `RequestError`."""
        pieces, length = [], 0
        with self._one_at_a_time:
            self._environment.start()
            try:
                for piece in self._template.generate(variables):
                    length += len(piece)
                    if length > OUTPUT_LIMIT:
                        refuse(f"its text is longer than {OUTPUT_LIMIT} characters")
                    pieces.append(piece)
            except (jinja2.TemplateError, *MISTAKES) as error:
                raise RequestError(f"the chat template refuses these messages: {shown(error)}") from error
        return "".join(pieces)


class Metered(ImmutableSandboxedEnvironment):
    """The sandbox with a meter: `start` resets it, and whatever goes over its limits raises."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Generation, jinja2.ext.loopcontrols])
        del self.filters["urlize"], self.globals["lipsum"]
        self.filters["tojson"] = tojson
        self.filters.update({name: self._metered(name, function) for name, function in self.filters.items()})
        for verb in (self._tick, self._made, self._concat):
            self.filters[verb.__name__] = unfolded(verb)
        self.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, dict=Dict(), namespace=Names)
        self.start()

    def start(self) -> None:
        """Begin a rendering."""
        self._total, self._ends = 0, time.thread_time() + BUDGET_S

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call in the template."""
        self._tick()
        name, subject = getattr(function, "__name__", ""), getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if name in GROWING:
            grows(name, "" if subject is None else subject, args, kwargs)
        return self._made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator in the template that can make more than it takes."""
        self._tick()
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "+" and not numbers:
            within(weight(left) + weight(right))
        elif operator == "%" and isinstance(left, str):
            grows("format", left, (right,), {})
        elif numbers and operator in "**" and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            within(VALUE_LIMIT + 1 if bits > 4096 else 0)
        elif operator == "*" and not numbers:
            within(size(left) * size(right))
        return self._made(super().call_binop(context, operator, left, right))

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 0 if getattr(function, "jinja_pass_arg", None) is None else 1

        @functools.wraps(function)  # keeps jinja's mark of a first argument that is not the value
        def metered(*args: Any, **kwargs: Any) -> Any:
            self._tick()
            subject = args[first] if len(args) > first else ""
            if name in GROWING:
                grows(name, subject, args[first + 1 :], kwargs)
            else:
                within(weight(subject))
            return self._made(function(*args, **kwargs))

        return metered

    def _tick(self, _: object = None) -> None:
        if time.thread_time() > self._ends:
            refuse(f"it ran for more than {BUDGET_S} s")

    def _made(self, value: Value) -> Value:
        within(weight(value))
        self._total += 64
        if isinstance(value, str | bytes):
            self._total += len(value)
        elif isinstance(value, list | tuple | dict):
            self._total += 64 * len(value)
        if self._total > TOTAL_LIMIT:
            refuse("it makes too much text")
        return value

    def _concat(self, *values: Any) -> str:
        self._tick()
        within(sum(weight(value) for value in values))
        return self._made("".join(map(str, values)))


class Metering(NodeTransformer):
    """Rewrites a parsed template so that loops, literals, `~` and what is shown go through the meter."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(filtered(nodes.Const(None), "_tick")))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return filtered(node.nodes[0], "_concat", *node.nodes[1:])

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [self.metered_output(child) for child in node.nodes]
        return node

    def metered_output(self, child: nodes.Expr) -> nodes.Expr:
        if isinstance(child, nodes.TemplateData):
            return filtered(nodes.Const(child.data), "_made") if len(child.data) > 256 else child
        return filtered(child, "_made")

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return filtered(node, "_made")

    visit_Dict: Any = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return filtered(node, "_made") if node.ctx == "load" else node


def filtered(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    """`node | name(*args)`."""
    found = nodes.Filter(node, name, list(args), [], None, None)
    found.set_lineno(node.lineno or 1)
    return found


def unfolded(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as a filter that jinja does not evaluate while compiling."""

    @jinja2.pass_context
    def filter(context: object, *values: Any) -> Any:
        return function(*values)

    return filter


def names_content(iterated: nodes.Node) -> bool:
    """Whether a loop goes over a message's content, as templates do that know parts."""
    named = {node.name for node in iterated.find_all(nodes.Name)} | {node.attr for node in iterated.find_all(nodes.Getattr)}
    named |= {node.value for node in iterated.find_all(nodes.Const)}
    if isinstance(iterated, nodes.Name | nodes.Getattr):  # find_all leaves out the node itself
        named.add(iterated.name if isinstance(iterated, nodes.Name) else iterated.attr)
    return "content" in named


def weight(value: Any) -> int:
    """Characters and items of `value`, all the way down, counted until they are too many."""
    if isinstance(value, str | bytes):
        return len(value)
    total, stack = 0, [value]
    while stack and total <= VALUE_LIMIT:
        item = stack.pop()
        total += len(item) if isinstance(item, str | bytes) else 64
        if isinstance(item, Names):
            item = object.__getattribute__(item, "_Namespace__attrs")
        if isinstance(item, dict):
            stack += item.keys()
            stack += item.values()
        elif isinstance(item, list | tuple | set | frozenset):
            stack += item
    return total


def size(value: Any) -> int:
    """What `value` can multiply another by: a number's value, or a thing's weight."""
    return max(abs(int(value)) if isinstance(value, int) else weight(value), 1)


def within(amount: int) -> None:
    if amount > VALUE_LIMIT:
        refuse("it makes a value that is too large")


def grows(name: str, subject: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises when `name` could make too much of what it is given."""
    given = [*args, *kwargs.values()]
    if name in ("format", "format_map"):
        if isinstance(subject, str) and (WIDE_PERCENT.search(subject) or WIDE_FORMAT.search(subject)):
            refuse("it pads to a width that is too large")
        within(size(subject) * max((weight(value) for value in given), default=1))
        return
    if name == "replace":
        given = given[1:]
    amount = size(subject)
    for value in given:
        amount *= size(value)
    within(amount)


def refuse(reason: str) -> NoReturn:
    raise jinja2.TemplateRuntimeError(reason)


def shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"


class Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what the model said, for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012  as jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, in a scope of its own."""
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(lineno)


class Dict:
    """`dict(...)` without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


class Names(Namespace):
    """`namespace(...)` without underscored names."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that namespace(self=...) works
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            no_underscore(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        no_underscore(name)
        super().__setitem__(name, value)


def no_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name like {name!r}")


def raise_exception(message: object) -> NoReturn:
    """How a template says that a conversation is not for its model."""
    raise jinja2.TemplateError(str(message))


def strftime_now(format: str) -> str:
    """Today, as the template wants it written."""
    return datetime.now().strftime(format)


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """JSON without HTML escapes, as transformers' filter of that name."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
