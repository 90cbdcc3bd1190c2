"What a notebook exports, described in MyST markdown from its own source: signatures, docstrings, comments."
import ast
import io
import re
import tokenize

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
MADE_OF_FIELDS = ('NamedTuple', 'TypedDict', 'Struct', 'BaseModel')


def last_name(node: ast.expr) -> str: return ast.unparse(node).split('.')[-1]


def markdown(text: str) -> str:
    "A comment or docstring as markdown: outside of `code`, signs are themselves."
    parts = re.split('(`[^`]*`)', text)
    return ''.join(p if i % 2 else re.sub(r'([<*\[\]$])', r'\\\1', p) for i, p in enumerate(parts))


class Names:
    "What is public, and where it is described."
    def __init__(self):
        self.homes: dict[str, list[str]] = {}             # modules by the names that they define
        self.imports: dict[tuple[str, str], str] = {}     # dotted names by module and the name taken into it
        self.classes: dict[str, ast.ClassDef] = {}
        self.alike: dict[str, str] = {}                   # functions that take the arguments of others
        self.cells: dict[str, Cell] = {}                  # by the names that they define

    def learn(self, cell: 'Cell') -> None:
        for node in cell.tree.body:
            if isinstance(node, DEFINITIONS):
                self.homes.setdefault(node.name, []).append(cell.module)
                self.cells[node.name] = cell
            if isinstance(node, ast.ClassDef): self.classes[node.name] = node
            if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('llm_distill.'):
                self.imports.update({(cell.module, a.asname or a.name): f'{node.module}.{a.name}' for a in node.names})
            same = re.fullmatch(r'(\w+)\.__signature__ = inspect\.signature\((\w+)\)', ast.unparse(node))
            if same: self.alike[same[1]] = same[2]

    def full(self, name: str, module: str|None = None) -> str|None:
        "The dotted name of something described: the module's own, one that it imports, or one without a namesake."
        homes = self.homes.get(name, [])
        if name.startswith('_') or not homes: return None
        if module in homes: return f'llm_distill.{module}.{name}'
        taken = self.imports.get((module, name), '')
        if taken and taken.removeprefix('llm_distill.').rsplit('.', 1)[0] in homes: return taken
        return f'llm_distill.{homes[0]}.{name}' if len(homes) == 1 else None

    def linked(self, text: str, module: str|None = None) -> str:
        "Markdown whose `names` lead to their descriptions; a plain word may mean something else."
        def link(found):
            full = found[2] and not re.fullmatch('[a-z]+', found[2]) and self.full(found[2], module)
            return f'{{py:obj}}`{found[2]} <{full}>`' if full else found[0]
        lines, fenced = [], False
        for line in text.split('\n'):
            if re.match(r'\s*(```|~~~)', line): fenced = not fenced
            plain = fenced or re.match('#|<|    ', line)
            lines.append(line if plain else re.sub(r'(!?\[[^\]]*\]\([^)]*\)|``.*?``)|`([A-Za-z_]\w*)`', link, line))
        return '\n'.join(lines)

    def parents(self, node: ast.ClassDef) -> list[ast.ClassDef]:
        found = [self.classes.get(last_name(base)) for base in node.bases]
        return [parent for parent in found if parent is not None and parent is not node]

    def made_of_fields(self, node: ast.ClassDef) -> bool:
        return (any('dataclass' in ast.unparse(mark) for mark in node.decorator_list)
                or any(last_name(base) in MADE_OF_FIELDS for base in node.bases)
                or any(map(self.made_of_fields, self.parents(node))))

    def fields(self, node: ast.ClassDef) -> dict[str, ast.AnnAssign]:
        "The annotated names of a class, those of its parents first."
        found = {}
        for parent in self.parents(node): found |= self.fields(parent)
        own = [f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
        return found | {f.target.id: f for f in own
                        if f.target.id[0] != '_' and 'ClassVar' not in ast.unparse(f.annotation)}


class Qualified(ast.NodeTransformer):
    "Annotations with whole names, which become links."
    def __init__(self, names: Names, module: str): self.names, self.module = names, module

    def visit_Name(self, node):
        full = self.names.full(node.id, self.module)
        return ast.parse(full, mode='eval').body if full else node


class Cell:
    "One cell that exports."
    def __init__(self, names: Names, module: str, source: str):
        self.names, self.module, self.tree = names, module, ast.parse(source)
        self.linking = Qualified(names, module)
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        self.comments = {t.start[0]: t.string.lstrip('# ').strip() for t in tokens if t.type == tokenize.COMMENT}

    def note(self, node) -> str: return self.prose(self.comments.get(node.end_lineno, ''))
    def prose(self, text: str) -> str: return self.names.linked(markdown(text), self.module)
    def annotation(self, node) -> str: return ast.unparse(self.linking.visit(node)) if node else ''

    def text(self) -> str:
        "All that it defines for others, as MyST markdown; empty where there is nothing."
        nodes = [n for n in self.tree.body if isinstance(n, DEFINITIONS) and n.name[0] != '_']
        return '\n\n'.join(self.a_class(n) if isinstance(n, ast.ClassDef) else self.function(n) for n in nodes)

    def arguments(self, node, bound: bool) -> tuple[str, list[str]]:
        "A signature as Sphinx reads it, and what the comments say; without the first argument where it is bound."
        a, words, owners = node.args, [], {}
        places = [*a.posonlyargs, *a.args]
        values = dict(zip([p.arg for p in places[::-1]], a.defaults[::-1]))
        values |= {p.arg: value for p, value in zip(a.kwonlyargs, a.kw_defaults) if value}
        def add(p, stars=''):
            kind = f': {self.annotation(p.annotation)}' if p.annotation else ''
            words.append(stars + p.arg + kind + (f' = {ast.unparse(values[p.arg])}' if p.arg in values else ''))
            owners[p.end_lineno] = (p, 'param ' + stars.replace('*', r'\*') + p.arg)  # the last of a line
        for p in places[bound:]: add(p)
        if a.posonlyargs: words.insert(len(a.posonlyargs) - bound, '/')
        if a.vararg: add(a.vararg, '*')
        elif a.kwonlyargs: words.append('*')
        for p in a.kwonlyargs: add(p)
        if a.kwarg: add(a.kwarg, '**')
        if node.returns: owners[node.returns.end_lineno] = (node.returns, 'returns')
        notes = [f':{who}: {self.note(p)}' for p, who in owners.values() if self.note(p)]
        return f'({", ".join(words)})' + (f' -> {self.annotation(node.returns)}' if node.returns else ''), notes

    def function(self, node, inside: bool = False) -> str:
        "A function, a method or a property."
        marks = [last_name(mark) for mark in node.decorator_list]
        cell, like = self, node
        if not inside and node.name in self.names.alike:
            other = self.names.alike[node.name]
            cell = self.names.cells[other]
            like = next(n for n in cell.tree.body if isinstance(n, FUNCTIONS) and n.name == other)
        words, notes = cell.arguments(like, bound=inside and 'staticmethod' not in marks)
        options = [f':{m}:' for m in ('classmethod', 'staticmethod', 'abstractmethod') if m in marks]
        if isinstance(node, ast.AsyncFunctionDef): options.append(':async:')
        kind = 'method' if inside else 'function'
        if {'property', 'cached_property'} & {*marks}:
            kind, words, options = 'property', '', [f':type: {self.annotation(node.returns)}'] if node.returns else []
        doc = self.prose(ast.get_docstring(node) or '')
        return '\n'.join([f'::::{{py:{kind}}} {node.name}{words}', *options, '', doc, '', *notes, '::::'])

    def a_class(self, node: ast.ClassDef) -> str:
        "A class with its public methods."
        maker = next((f for f in node.body if isinstance(f, FUNCTIONS) and f.name == '__init__'), None)
        fields, words, notes = self.names.fields(node), '', []
        if maker: words, notes = self.arguments(maker, bound=True)
        elif self.names.made_of_fields(node):
            parts = [f'{name}: {self.annotation(f.annotation)}{self.default(f)[0]}' for name, f in fields.items()]
            parts.sort(key=lambda part: ' = ' in part)  # fields without a default may follow others by name only
            words = f'({", ".join(parts)})' if parts else ''
        what = 'param' if words and not maker else 'ivar'
        own = {name: self.note(f) or self.default(f)[1] for name, f in fields.items() if f in node.body}
        notes += [f':{what} {name}: {note}' for name, note in own.items() if note]
        bases = [last_name(b) for b in node.bases if last_name(b)[0] != '_']
        known = {b: self.names.full(b, self.module) for b in bases}
        said = ', '.join(f'{{py:obj}}`{b} <{known[b]}>`' if known[b] else f'`{b}`' for b in bases)
        methods = [f for f in node.body if isinstance(f, FUNCTIONS) and (f.name[0] != '_' or f.name == '__call__')
                   and not any(last_name(mark) == 'setter' for mark in f.decorator_list)]
        kind = 'exception' if re.search('Error|Exception|Warning', ' '.join(bases)) else 'class'
        doc = self.prose(ast.get_docstring(node) or '')
        return '\n'.join([f'::::::{{py:{kind}}} {node.name}{words.split(" -> ")[0]}', '', doc, '',
                          f'Bases: {said}\n' if bases else '', *notes, '',
                          *(self.function(f, inside=True) + '\n' for f in methods), '::::::'])

    def default(self, field: ast.AnnAssign) -> tuple[str, str]:
        "What a field is where nothing is given, as in a signature; and what the call that makes it says of it."
        value = field.value
        if value is None: return '', ''
        if not (isinstance(value, ast.Call) and last_name(value.func).lower().endswith(('field', 'option'))):
            return f' = {ast.unparse(value)}', ''
        given = {k.arg: k.value for k in value.keywords}
        first, *others = [*value.args, given.get('default')]
        said = next((a for a in [*others, given.get('description')] if isinstance(a, ast.Constant)), None)
        needed = not value.args and not given.keys() & {'default', 'default_factory'}
        made = first is None or ast.unparse(first) in ('list', 'dict', 'set')  # by a factory
        shown = '' if needed else ' = ...' if made else f' = {ast.unparse(first)}'
        return shown, self.prose(str(said.value)) if said else ''
