"Progress where people see it: in a real kernel, and in processes whose stderr is a file or a terminal."
import json
import os
import re
import subprocess
import sys

import pytest

from llm_distill.progress import Progress
from llm_distill.types import Event

STEPS = '''
import threading
from llm_distill.progress import Progress
from llm_distill.types import Event
def work(show, name, n=40):
    for i in range(n + 1): show(Event(name, i, n, {'loss': 3/(1 + i), 'usd': i/1000, '<b>': '&'}))
'''


@pytest.fixture(scope='module')
def ran():
    "Outputs of cells that ran in a kernel."
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    cells = [STEPS, "work(Progress(), 'train')",
             '''show = Progress(labels={'one': 'the first'})
threads = [threading.Thread(target=work, args=(show, name)) for name in ('one', 'two')]
for t in threads: t.start()
for t in threads: t.join()
show(Event('sample', 40, 40, {'samples': [{'prompt': 'p', 'teacher': '<i>t</i>', 'student': 's'}]}))''',
             "work(show, 'three')", "with Progress() as late: late(Event('x', 2, 5))",
             '''import time
show = Progress()
threading.Timer(.2, work, (show, 'from a timer')).start(); show(Event('here', 1, 2)); time.sleep(1)''']
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbclient.NotebookClient(nb, timeout=60, kernel_name='python3').execute()
    return nb


def test_a_kernel_keeps_one_block_a_listener_with_its_last_state(ran):
    outputs = [c.outputs for c in ran.cells]
    assert [len(o) for o in outputs] == [0, 1, 1, 1, 1, 1], outputs
    page = outputs[1][0].data['text/html']
    assert '40 of 40 · under 10 s · $0.0400' in page and 'aria-valuenow="100"' in page and '<polyline' in page
    assert '&lt;b&gt;' in page and '<b>&' not in page
    assert outputs[1][0].data['text/plain'].startswith('train: 40 of 40')
    assert '2 of 5 · stopped' in outputs[4][0].data['text/html']


def test_threads_share_a_block_and_the_next_cell_begins_another(ran):
    page = ran.cells[2].outputs[0].data['text/html']
    assert page.count('role="progressbar"') == 2 and 'the first' in page and '&lt;i&gt;t' in page
    other = ran.cells[3].outputs[0].data['text/html']
    assert other.count('role="progressbar"') == 1 and 'three' in other
    timed = ran.cells[5].outputs[0].data['text/html']
    assert 'from a timer' in timed and '40 of 40' in timed


def test_a_notebook_keeps_no_widgets_and_little_text(ran):
    text = json.dumps(ran)
    assert 'jupyter.widget' not in text and len(text) < 40_000


def test_times_do_not_change_what_is_stored(ran):
    pages = [re.sub('train|three', '', ran.cells[i].outputs[0].data['text/html']) for i in (1, 3)]
    assert pages[0] == pages[1]


def test_a_log_gets_lines_and_no_carriage_returns(tmp_path):
    with open(tmp_path/'log', 'w') as log:
        subprocess.run([sys.executable, '-c', STEPS + "work(Progress(), 'train', 5000)"], check=True, stderr=log)
    lines = (tmp_path/'log').read_text().split('\n')
    assert len(lines) < 10 and '\r' not in ''.join(lines) and lines[-2].startswith('train: 5,000 of 5,000')


@pytest.mark.skipif(sys.platform == 'win32', reason='no pseudo-terminals')
def test_a_terminal_gets_a_bar():
    import fcntl
    import pty
    import struct
    import termios
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    env = {k: v for k, v in os.environ.items() if k != 'TQDM_DISABLE'}
    code = STEPS + "work(Progress(), 'train', 50)"
    child = subprocess.Popen([sys.executable, '-c', code], stderr=theirs, env=env)
    os.close(theirs)
    said = b''
    while True:
        try: more = os.read(ours, 4096)
        except OSError: break  # Linux says so when the last writer is gone
        if not more: break
        said += more
    assert child.wait() == 0 and b'\r' in said and b'50/50' in said


def test_nothing_is_loaded_that_a_terminal_does_not_need():
    code = "import sys, llm_distill.progress; print([m for m in ('IPython', 'torch', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


def test_what_is_no_number_does_not_break_it(capsys):
    with Progress(kind='lines', every=0) as show:
        for loss in (float('nan'), float('inf'), 2., None, 'none'): show(Event('train', 1, 3, {'loss': loss}))
        show(Event('empty', 0, 0))
        show(Event('open', 7, None, {'usd': None}))
    said = capsys.readouterr().err
    assert 'empty: 0 of 0' in said and 'open: 7, stopped' in said
