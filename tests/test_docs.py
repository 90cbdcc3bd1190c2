"Links: in the notebooks and texts as they are, and in the site made from them."
import json
import re
import subprocess
import sys
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT

TEXTS = [ROOT/'README.md', ROOT/'CHANGELOG.md',
         *sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)]


def markdown(path):
    "A file's prose, without code."
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.ipynb':
        cells = json.loads(text)['cells']
        text = '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    return re.sub(r'^ *(```|~~~).*?^ *\1', '', text, flags=re.S | re.M)


@lru_cache(None)
def anchors(path):
    "What links to headings are called, as GitHub calls them."
    heads = re.findall(r'^#+ +(.+?) *$', markdown(path), re.M)
    return {re.sub(r'[^\w\- ]', '', head.lower()).replace(' ', '-') for head in heads}


def dead_links(path, text):
    "The relative links of a text that lead nowhere."
    text = re.sub('(`+).+?\\1', 'code', text)
    for link in re.findall(r'\]\(([^)\s]+)[^)]*\)|<(?:img|a)\b[^>]*?(?:src|href)="([^"]+)"', text):
        link = urlsplit(''.join(link))
        if link.scheme: continue
        target = path.parent/unquote(link.path) if link.path else path
        if not target.exists(): yield link.geturl()
        elif link.fragment and link.fragment.lower() not in anchors(target): yield link.geturl()


@pytest.mark.parametrize('path', TEXTS, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(path): assert list(dead_links(path, markdown(path))) == []


@pytest.mark.parametrize('text, dead', [
    ('[a](README.md) ![b](nbs/images/house.svg) [c](https://nowhere.example) `[d](no.md)`', []),
    ('[what `it` is](#what-it-is), [serve](README.md#serve)', []), ('[x](no.md)', ['no.md']), ('[x](#no)', ['#no']),
    ('[x](CHANGELOG.md#no)', ['CHANGELOG.md#no']), ('<img src="no.png">', ['no.png'])])
def test_a_dead_link_is_seen(text, dead): assert list(dead_links(ROOT/'README.md', text)) == dead


class Page(HTMLParser):
    "The links, the parts that a browser loads, and the anchors of a page."
    def __init__(self, path):
        super().__init__()
        self.links, self.parts, self.ids = [], [], {''}
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found.get('id'), found.get('name')}
        if tag == 'a' and 'href' in found: self.links.append(found['href'])
        if tag == 'link' and found.get('rel') in ('stylesheet', 'icon', 'preload'): self.parts.append(found['href'])
        if tag in ('img', 'script', 'source', 'iframe') and found.get('src'): self.parts.append(found['src'])


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    pytest.importorskip('furo', reason='needs the extra `docs`')
    out = tmp_path_factory.mktemp('docs')/'site'
    done = subprocess.run([sys.executable, ROOT/'.ci/docs.py', out], cwd=out.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # a warning of Sphinx fails too
    return out


@pytest.fixture(scope='module')
def pages(site): return {path.resolve(): Page(path) for path in site.rglob('*.html')}


@pytest.mark.slow
def test_the_site_leads_nowhere_but_to_itself(site, pages):
    dead, remote = [], []
    for path, page in pages.items():
        remote += [(path.name, part) for part in page.parts if urlsplit(part).scheme not in ('', 'data')]
        for link in page.links + page.parts:
            link = urlsplit(link)
            if link.scheme or link.netloc: continue
            target = (path.parent/unquote(link.path)).resolve() if link.path else path
            if target.is_dir(): target /= 'index.html'
            there = target.exists() and target.is_relative_to(site.resolve())
            if there and target in pages: there = unquote(link.fragment) in pages[target].ids
            if not there: dead.append((path.name, link.geturl()))
    assert dead == [] and remote == []


@pytest.mark.slow
def test_the_site_has_a_page_for_every_notebook(site, pages):
    wanted = {(site/p.relative_to(ROOT/'nbs')).with_name(p.stem + '.html').resolve() for p in TEXTS[2:]}
    assert wanted <= pages.keys()
    def reached(name): return {(site/name).parent.joinpath(urlsplit(link).path).resolve()
                               for link in pages[(site/name).resolve()].links}
    home = reached('index.html')
    assert {p for p in wanted if p.parent.name in ('tutorials', 'studies')} <= home  # the course is in the navigation
    assert wanted <= home.union(*(reached(f'reference/{p.name}') for p in site.glob('reference/*.html')))


@pytest.mark.slow
def test_the_search_finds_words_and_names(site):
    text = (site/'searchindex.js').read_text(encoding='utf-8')
    index = json.loads(re.fullmatch(r'Search\.setIndex\((.*)\);?\s*', text, re.S)[1])
    def found(word):
        numbers = [index[where].get(word, []) for where in ('terms', 'titleterms')]  # one alone stands without its list
        return {index['docnames'][n] for some in numbers for n in (some if isinstance(some, list) else [some])}
    assert 'tutorials/01_first_student' in found('owl')
    assert {'06_losses', '08_train'} <= found('temperatur')  # words are cut to their stems
    names = str(index['objects']['llm_distill.train'])
    assert 'DistillTrainer' in names and '_option' not in names


@pytest.mark.slow
def test_descriptions_say_what_the_source_says(site):
    text = re.sub('<[^>]+>', '', (site/'04_collect.html').read_text(encoding='utf-8'))
    for words in ('Requests in flight at most', 'concurrency: int = 64', 'One for each prompt, in order'):
        assert text.count(words) >= 2, words  # `collect` takes what `acollect` takes
    config = re.sub('<[^>]+>', '', (site/'08_train.html').read_text(encoding='utf-8'))
    assert 'top_k: int = 20' in config and re.search('top_k – The teacher.s alternatives', config)


@pytest.mark.slow
def test_pages_hold_no_paths_of_this_machine(site):
    places = [str(ROOT), str(Path.home()) + '/', str(site.parent)]
    found = [(p.name, place) for p in site.rglob('*.*') if p.suffix in ('.html', '.js', '.inv')
             for place in places if place in p.read_text(encoding='utf-8', errors='ignore')]
    assert found == []


@pytest.mark.slow
def test_a_folder_with_something_else_is_left_alone(site, tmp_path):
    (tmp_path/'mine.txt').write_text('mine')
    done = subprocess.run([sys.executable, ROOT/'.ci/docs.py', tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and 'name another folder' in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['mine.txt']
