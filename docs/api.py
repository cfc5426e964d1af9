"API entries of the modules' pages: signature, docstring and a table of parameters, from the docments."
import ast, inspect, re

from fastcore.docments import docments

EMPTY = inspect.Parameter.empty


def escape(text):
    "Plain text for a Markdown table; what stands in backticks stays code."
    parts = re.split(r"(`[^`]*`)", " ".join(str(text).split()))
    return "".join(p.replace("|", "\\|") if p.startswith("`") else re.sub(r"([\\*_<>\[\]|$~])", r"\\\1", p)
                   for p in parts)


def type_name(annotation):
    "An annotation as its author would write it."
    if annotation in (EMPTY, None): return ""
    return (annotation.__name__ if isinstance(annotation, type)
            else str(annotation).replace("typing.", "").replace("torch.", ""))


def code(text): return f"`{text}`".replace("|", "\\|") if text else ""


def signature(symbol, name):
    "The call with its defaults, without types: those are in the table."
    try: parameters = inspect.signature(symbol).parameters.values()
    except (TypeError, ValueError): return name
    shown = [str(p.replace(annotation=EMPTY)) for p in parameters if p.name not in ("self", "cls")]
    if len(shown) > 16: shown = [*shown[:4], "...", shown[-1]]
    call = f"{name}({', '.join(shown)})"
    return call if len(call) <= 100 else f"{name}(\n    " + ",\n    ".join(shown) + ")"


def documented(symbol):
    "Parameter -> docment, annotation and default; of a class those of __init__ or of its fields."
    source = symbol
    if inspect.isclass(symbol) and not hasattr(symbol, "__dataclass_fields__"):
        if "__init__" not in vars(symbol): return {}
        source = inspect.unwrap(symbol.__init__)
    return {k: v for k, v in docments(inspect.unwrap(source), full=True).items() if k not in ("self", "cls", "kwargs")}


def table(symbol):
    "The parameters and what comes back, one a line."
    rows = []
    for name, about in documented(symbol).items():
        back = name == "return"
        if back and not about["docment"] and about["anno"] in (EMPTY, None): continue
        default = ("" if back or about["default"] is EMPTY
                   else code(about["default"] if inspect.isclass(about["default"]) else repr(about["default"])))
        rows.append(f"| {'**returns**' if back else code(name)} | {code(type_name(about['anno']))} | {default} | "
                    f"{escape(about['docment'] or '')} |")
    return "\n".join(["| parameter | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n\n" if rows else ""


def text(symbol):
    return ("\n\n".join(escape(p) for p in re.split(r"\n\s*\n", inspect.getdoc(symbol) or ""))
            if "__doc__" in dir(symbol) else "")


def methods(cls):
    """Public methods and properties that the class's own cell defines and describes; those patched in later have
    their own entries."""
    for node in ast.parse(inspect.getsource(cls)).body[0].body:
        if (not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node)
                or node.name.startswith("_") and node.name != "__getitem__"):
            continue
        value = vars(cls)[node.name]
        yield node.name, getattr(value, "__func__", getattr(value, "fget", value))


class Api:
    "The entry of one symbol: of a class its methods as well."
    def __init__(self, symbol):
        self.is_property = isinstance(symbol, property)
        self.symbol = symbol.fget if self.is_property else symbol
        self.name = self.symbol.__qualname__

    def entry(self, symbol, name, level, property=False):
        call = name if property else signature(symbol, name)
        return (f"{'#'*level} `{name}`\n\n```python\n{'class ' if inspect.isclass(symbol) else ''}{call}\n```\n\n"
                f"{text(symbol)}\n\n{table(symbol)}")

    def markdown(self):
        own = self.entry(self.symbol, self.name, 2, self.is_property)
        if not inspect.isclass(self.symbol): return own
        return own + "".join(self.entry(m, f"{self.name}.{n}", 3, isinstance(vars(self.symbol)[n], property))
                             for n, m in methods(self.symbol))
