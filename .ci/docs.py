"""Make the site of the course and the reference from the notebooks: python .ci/docs.py [OUT]

Nothing is executed and nothing is fetched: stored outputs are shown as they are, and each exported cell becomes the
description of what it defines, with its code folded below. A link that leads nowhere is an error."""
import ast
import os
import re
import shutil
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

from reference import Cell, Names
try:
    import nbformat
    from nbdev.process import NBProcessor
    from nbdev.processors import clean_magics, hide_line, rm_header_dash, strip_ansi
    from sphinx.cmd.build import build_main
    import furo, myst_nb, ziamath  # noqa: E401, F401
except ImportError as e: sys.exit(f"{e}: the site needs more packages: pip install -c constraints.txt -e '.[docs]'")

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
# The reference: pages with the first and the last number of the chapters on them.
GROUPS = {'types': ('Types, money, models', '00', '01'), 'teachers': ('Teachers', '02_', '02_'),
          'collecting': ('Cache and collecting', '02a', '04'), 'targets': ('Targets', '05', '05'),
          'losses': ('Losses and distributions', '06', '06'), 'training': ('Students and training', '07', '08'),
          'evaluation': ('Evaluation', '09', '09'), 'serving': ('Serving', '10', '10'),
          'tuning': ('Tuning jobs', '11', '11'), 'interface': ('Progress, panels, commands', '12', '99')}


class Book:
    "A notebook, read by nbdev."
    def __init__(self, path: Path):
        self.path, self.name = path, path.relative_to(NBS).as_posix().removesuffix('.ipynb')
        nb = NBProcessor(path, procs=[strip_ansi, hide_line, clean_magics, rm_header_dash])
        nb.process()
        self.cells = [c for c in nb.nb.cells if c.cell_type in ('code', 'markdown') and c.source.strip()]
        module = (c.directives_['default_exp'] for c in nb.nb.cells if 'default_exp' in c.directives_)
        self.module = next(module, '').strip() or None
        first = next((c.source for c in self.cells if c.cell_type == 'markdown'), '')
        title, line = (re.search(f'^{mark} +(.+)', first, re.M) for mark in '#>')
        if not title: sys.exit(f'{path.name}: the first markdown cell needs a line "# Title"')
        self.title, self.line = title[1], line[1] if line else ''

    def short(self) -> str:
        "The title within its group."
        words = self.title.split(': ', 1)[-1]
        return words[0].upper() + words[1:]

    def exports(self) -> list: return [c for c in self.cells if self.module and 'export' in c.directives_]

    def converted(self, names: Names, chapters: dict, url: str):
        "Prose, examples with their outputs, descriptions of what is exported."
        new, made, told = nbformat.v4, [], not self.module
        for cell in self.cells:
            marks = cell.directives_.keys()
            if cell.cell_type == 'markdown':
                made.append(new.new_markdown_cell(prose(cell.source, names, self.module, chapters)))
                if not told: made.append(new.new_markdown_cell(self.place(url)))
                told = True
            elif marks & {'hide', 'default_exp'}: continue
            elif 'export' in marks and self.module:
                found = Cell(names, self.module, cell.source)
                if all(isinstance(n, ast.Import|ast.ImportFrom) for n in found.tree.body): continue
                if found.text(): made.append(new.new_markdown_cell(found.text()))
                made.append(new.new_code_cell(cell.source, metadata={'tags': ['hide-input']}))
            else:
                outputs = [nbformat.from_dict(o) for o in cell.get('outputs', [])]
                made.append(new.new_code_cell(cell.source, outputs=outputs))
        for i, cell in enumerate(made): cell.id = f'cell-{i}'
        return new.new_notebook(cells=made, metadata={
            'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'},
            'language_info': {'name': 'python', 'pygments_lexer': 'ipython3'}})

    def place(self, url: str) -> str:
        where = f'nbs/{self.name}.ipynb'
        return (f'{{.room}}\nModule `llm_distill.{self.module}`, written in [{where}]({url}/blob/main/{where}).\n\n'
                f'```{{py:module}} llm_distill.{self.module}\n```')


def within(stem: str, group: tuple) -> bool:
    _, first, last = group
    return first <= stem[:len(first)] and stem[:len(last)] <= last


def prose(text: str, names: Names, module: str|None, chapters: dict) -> str:
    "A cell's markdown: badges as words; names and the table of rooms as links."
    text = re.sub(r'\[!\[[^\]]*\]\(https://colab[^)]*\)\]\(([^)]*)\)', r'[Open in Colab](\1)', text)
    text = re.sub(r'^\| *(\d\d[a-z]?_[^|]+?) *\|', lambda found: f'| {rooms(found[1], chapters)} |', text, flags=re.M)
    return names.linked(text, module)


def rooms(words: str, chapters: dict) -> str:
    "Links for `10_serving.words, .engine`, as the table of rooms has them."
    links, home = [], ''
    for word in words.split(', '):
        stem = home + word if word.startswith('.') else word
        home = stem.split('.')[0]
        group = next((key for key, group in GROUPS.items() if within(stem, group)), None)
        shown = word.replace('*', r'\*')
        if stem in chapters: shown = f'[{shown}](/{stem}.ipynb)'
        elif stem.endswith('*') and group: shown = f'[{shown}](/reference/{group}.md)'
        links.append(shown)
    return ', '.join(links)


def toctree(entries, caption: str = '') -> str:
    return '\n'.join(['```{toctree}', ':hidden:', *([f':caption: {caption}'] if caption else []), '', *entries, '```'])


def contents(books: list[Book]) -> str:
    "The navigation of the whole site."
    def under(folder): return [b for b in books if b.name.startswith(folder)]
    course = [f'{int(b.path.name[:2])}. {b.title} </{b.name}>' for b in under('tutorials/')]
    guide = [b.name for b in books if '/' not in b.name and not b.name[:2].isdigit() and b.name != 'index']
    return '\n\n'.join([toctree(course, 'Course'), toctree([b.name for b in under('studies/')], 'Studies'),
                        toctree([*guide, 'changelog'], 'Guide'),
                        toctree([*(f'reference/{key}' for key in GROUPS), 'All names <genindex>'], 'Reference')])


def group_page(title: str, chapters: list[Book]) -> str:
    rows = [f'| [{b.short()}](/{b.name}.ipynb) | `{b.module}` | {b.line} |' for b in chapters]
    table = '\n'.join(['| chapter | module | what lives there |', '|---|---|---|', *rows])
    return f'# {title}\n\n{table}\n\n' + toctree([f'{b.short()} </{b.name}>' for b in chapters]) + '\n'


def sources(folder: Path, url: str) -> None:
    "Write all that Sphinx reads into a new folder."
    shutil.copytree(NBS, folder, ignore=shutil.ignore_patterns('.*', '_*', '*.ipynb'))
    paths = [p for p in sorted(NBS.rglob('*.ipynb')) if not any(part[0] in '._' for part in p.relative_to(NBS).parts)]
    books = [Book(p) for p in paths]
    chapters = {b.name: b for b in books if re.match(r'\d\d', b.name)}
    names = Names()
    for book in books:
        for cell in book.exports(): names.learn(Cell(names, book.module, cell.source))
    for book in books:
        page = book.converted(names, chapters, url)
        if book.name == 'index': page.cells[0].source += '\n\n' + contents(books)
        nbformat.write(page, folder/f'{book.name}.ipynb')
    texts = {f'reference/{key}.md': group_page(group[0], [b for b in chapters.values() if within(b.name, group)])
             for key, group in GROUPS.items()}
    texts['changelog.md'] = names.linked((ROOT/'CHANGELOG.md').read_text(encoding='utf-8'))
    for name, text in texts.items():
        (folder/name).parent.mkdir(exist_ok=True)
        (folder/name).write_text(text, encoding='utf-8')
    pages = ROOT/'.ci/pages'
    shutil.copy(pages/'conf.py', folder)
    (folder/'_static').mkdir()
    for name in ('site.css', 'site.js'): shutil.copy(pages/name, folder/'_static')


def main(out: str = '_site') -> int:
    "Build the site into a folder; gives the exit code."
    site = Path(out).resolve()
    mark = site/'.nojekyll'  # without it GitHub leaves out _static
    if site.exists() and any(site.iterdir()) and not mark.exists():
        sys.exit(f'{out} holds something else than a site: name another folder')
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    mark.touch()
    os.chdir(ROOT)  # where nbdev finds its settings
    settings = ConfigParser(interpolation=None)
    settings.read('settings.ini')
    about = settings['DEFAULT']
    package = Path('llm_distill/__init__.py').read_text(encoding='utf-8')
    version = re.search(r"""^__version__ = ['"](.+)['"]""", package, re.M)[1]
    values = {'project': 'llm_distill', 'author': about['author'], 'copyright': about['author'], 'version': version,
              'html_title': f'llm_distill {version}', 'html_theme_options.source_repository': about['git_url']}
    options = [word for key, value in values.items() for word in ('-D', f'{key}={value}')]
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)/'llm_distill'
        sources(folder, about['git_url'])
        code = build_main(['-q', '-W', '--keep-going', '-j', 'auto', '-b', 'html', '-d', f'{temp}/read', *options,
                           str(folder), str(site)])
    if not code: print(f'{out}/index.html')
    return code


if __name__ == '__main__': sys.exit(main(*sys.argv[1:2]))
