"The Studio in real JupyterLab and in Voila, in a headless Chromium: one way through all of it."
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser import browser, classic, free_port, lab, missing, run_classic, run_notebook, running, write_notebook
from environments import COLAB, over_this_one
from small_student import small_student

pytestmark = pytest.mark.skipif(bool(missing()), reason=str(missing()))
PROMPTS = '\n'.join(f'What is {i} and {i + 1}?' for i in range(8))


@pytest.fixture(scope='module')
def student(tmp_path_factory): return small_student(tmp_path_factory.mktemp('tiny'))


@pytest.fixture
def root(tmp_path):
    (tmp_path/'root').mkdir()
    return tmp_path/'root'


class Hand:
    "Presses buttons of one panel and reads its status line."
    def __init__(self, page, name: str, tab: str = ''):
        if tab: page.get_by_role('tab', name=tab, exact=True).click()
        self.panel = page.locator(f'.ld-{name}')
        self.panel.locator('h3').wait_for()

    def fill(self, label: str, value):
        box = self.panel.get_by_label(label, exact=True)
        box.fill(str(value))
        box.press('Tab')

    def choose(self, label: str, value: str): self.panel.get_by_label(label, exact=True).select_option(label=value)

    def press(self, words: str, said: str = '', seconds: float = 90):
        from playwright.sync_api import expect
        button = self.panel.get_by_role('button', name=words, exact=True)
        expect(button).to_be_enabled(timeout=30_000)
        button.click()
        if said: self.says(said, seconds)

    def says(self, words: str, seconds: float = 90):
        "Waits for words in the status line; an error ends the wait."
        end, status = time.monotonic() + seconds, self.panel.locator('.ld-status').first
        while not re.search(words, said := status.inner_text()):
            assert not said.startswith('✗') and time.monotonic() < end, self.panel.inner_text()
            self.panel.page.wait_for_timeout(100)


def processes(folder: Path) -> list[str]:
    "What runs in a folder or below it."
    found = []
    for process in Path('/proc').glob('[0-9]*'):
        try:
            if os.readlink(process/'cwd').startswith(str(folder)): found.append((process/'cmdline').read_text())
        except OSError: pass
    return found


def use_studio(page, student: str, all_of_it: bool = True):
    "From a teacher to a served student."
    page.locator('.ld-studio').wait_for(timeout=60_000)
    hand = Hand(page, 'teacher', 'Teacher')
    hand.fill('Model', student)
    hand.fill('Longest answer', 5)
    hand.press('Ask', 'answered in')

    hand = Hand(page, 'collect', 'Collect')
    hand.fill('Prompts, one a line', PROMPTS)
    hand.fill('Longest answer', 300)
    hand.fill('At a time', 1)
    hand.press('Start')
    hand.press('Stop', 'Press Resume|8 answers are there')
    hand.fill('Longest answer', 300)
    stopped = hand.panel.get_by_role('button', name='Resume', exact=True).count()
    hand.press('Resume' if stopped else 'Start', '8 answers are there')

    hand = Hand(page, 'distill', 'Distil')
    hand.fill('Student', student)
    hand.choose('Take', 'as it is')
    hand.fill('Steps', 4)
    hand.fill('Held out', .25)
    hand.fill('Samples every', 2)
    hand.press('Start', 'The student is in')
    hand.panel.locator('img').first.wait_for()

    hand = Hand(page, 'chat', 'Chat')
    hand.fill('Second model', student)
    hand.fill('Longest answer', 8)
    hand.press('Ask', '2 of 2 answered')
    if not all_of_it: return

    hand = Hand(page, 'jobs', 'Jobs')
    hand.press('Start a service here', 'looking every')
    hand.press('New job', 'is (running|pending|queued)')
    Hand(page, 'serve', 'Serve').press('Start')  # both take seconds: together
    hand = Hand(page, 'jobs', 'Jobs')
    hand.press('Cancel job', 'is told to end')
    hand.panel.get_by_role('cell', name='■ cancelled').wait_for(timeout=60_000)
    Hand(page, 'serve', 'Serve').says('Serving .* at http')  # and is left running


def test_studio_in_jupyterlab(tmp_path, root, student):
    write_notebook(root/'studio.ipynb', "from llm_distill.panels import Studio\n\nStudio('project')")
    with lab(tmp_path, root) as url, browser(tmp_path) as page:
        run_notebook(page, url, 'studio.ipynb')
        use_studio(page, student)
        before = processes(root)
        page.evaluate('() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()')
        end = time.monotonic() + 30
        def kernels(): return [p for p in processes(root) if 'jupyter' not in p or 'ipykernel' in p]
        while (left := kernels()) and time.monotonic() < end: time.sleep(.2)
    assert any('serving.process' in p for p in before) and left == []


@pytest.mark.slow
def test_a_cell_that_is_run_again_in_jupyterlab(tmp_path, root, student):
    write_notebook(root/'serve.ipynb', f'from llm_distill.panels import ServePanel\n\nServePanel({student!r})')
    def servers(): return [p for p in processes(root) if 'serving.process' in p]
    with lab(tmp_path, root) as url, browser(tmp_path) as page:
        run_notebook(page, url, 'serve.ipynb')
        Hand(page, 'serve').press('Start', 'Serving .* at http')
        assert servers()
        page.evaluate("async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        hand, end = Hand(page, 'serve'), time.monotonic() + 30
        hand.says('showed before was told to stop')
        while servers(): assert time.monotonic() < end; time.sleep(.1)
        hand.press('Start', 'Serving .* at http')


@pytest.mark.slow
def test_studio_by_voila(tmp_path, root, student):
    port = free_port()
    command = [sys.executable, '-m', 'llm_distill.cli', 'studio', 'project', '--no-browser', '--port', str(port)]
    with running(command, tmp_path, f'http://127.0.0.1:{port}/static/voila.js', root), browser(tmp_path) as page:
        page.goto(f'http://127.0.0.1:{port}/')
        use_studio(page, student, all_of_it=False)


@pytest.mark.slow
def test_studio_in_classic_notebook_with_the_widgets_of_colab(tmp_path, root, student):
    python = over_this_one(tmp_path/'venv', *COLAB, 'nbclassic')
    write_notebook(root/'studio.ipynb', 'import ipywidgets\nfrom llm_distill.panels import Studio\n\n'
                   'print("ipywidgets", ipywidgets.__version__)\nStudio("project")')
    with classic(tmp_path, root, python) as url, browser(tmp_path) as page:
        run_classic(page, url, 'studio.ipynb')
        use_studio(page, student, all_of_it=False)
        assert 'ipywidgets 7.7.1' in page.locator('.output_stdout').first.inner_text()
        page.get_by_role('tab', name='Collect', exact=True).click()
        asked = page.locator('.llm-distill-browser summary .asked').first  # no style of the page's own has got at it
        assert asked.evaluate('e => getComputedStyle(e).textAlign') in ('start', 'left')


def test_the_studio_command_refuses_a_file(tmp_path):
    (tmp_path/'taken').write_text('')
    done = subprocess.run([sys.executable, '-m', 'llm_distill.cli', 'studio', 'taken'], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 1 and 'is a file; name a folder' in done.stderr
